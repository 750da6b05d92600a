"""Plane curves and oriented rectangles, in metres and radians."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

FloatArray = NDArray[np.float64]


def distances(first: FloatArray, second: FloatArray) -> FloatArray:
    """Between points [..., 2] that broadcast: [...]. np.linalg.norm is slow along short axes."""
    x, y = first[..., 0] - second[..., 0], first[..., 1] - second[..., 1]
    return np.sqrt(x * x + y * y)


def arc_lengths(points: FloatArray) -> FloatArray:
    """Distance along a polyline [P, 2] at each of its points: [P]."""
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])


def resample(points: FloatArray, step_m: float) -> FloatArray:
    """The polyline [P, 2] at about equal steps, both ends kept."""
    s = arc_lengths(points)
    count = max(2, round(s[-1] / step_m) + 1)
    at = np.linspace(0.0, s[-1], count)
    return np.stack([np.interp(at, s, points[:, i]) for i in (0, 1)], axis=-1)


def headings(points: FloatArray) -> FloatArray:
    """Unwrapped direction of travel at each point of a polyline [P, 2]: [P]."""
    along = np.gradient(points, axis=0)
    return np.unwrap(np.arctan2(along[:, 1], along[:, 0]))


def normals(points: FloatArray) -> FloatArray:
    """Unit vectors to the left of the direction of travel: [P, 2]."""
    yaw = headings(points)
    return np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1)


def shifted(points: FloatArray, left_m: float | FloatArray) -> FloatArray:
    """The polyline moved to its left by a constant or by one value a point."""
    return points + normals(points) * np.broadcast_to(left_m, len(points))[:, None]


def smooth(points: FloatArray, sigma_m: float, step_m: float) -> FloatArray:
    """Round off the corners of an evenly sampled polyline; its ends stay where they are."""
    if len(points) < 4:
        return points
    # Reflecting about the end points keeps them fixed, so that lanes still meet.
    pad = min(len(points) - 1, int(4 * sigma_m / step_m) + 1)
    before = 2 * points[0] - points[pad:0:-1]
    after = 2 * points[-1] - points[-2 : -pad - 2 : -1]
    padded = np.concatenate([before, points, after])
    return gaussian_filter1d(padded, sigma_m / step_m, axis=0)[pad:-pad]


def hermite(start: FloatArray, start_yaw: float, end: FloatArray, end_yaw: float) -> FloatArray:
    """A curve from one pose to another, tangent to both: [P, 2] sampled every 0.25 m or so."""
    reach = float(np.linalg.norm(end - start))
    tangent = 1.1 * reach
    a = tangent * np.array([np.cos(start_yaw), np.sin(start_yaw)])
    b = tangent * np.array([np.cos(end_yaw), np.sin(end_yaw)])
    u = np.linspace(0.0, 1.0, max(8, int(reach / 0.25)))[:, None]
    return (
        (2 * u**3 - 3 * u**2 + 1) * start
        + (u**3 - 2 * u**2 + u) * a
        + (-2 * u**3 + 3 * u**2) * end
        + (u**3 - u**2) * b
    )


def strip(points: FloatArray, left_m: float, right_m: float) -> FloatArray:
    """Outline of a band along a polyline, counter-clockwise: [2P, 2]."""
    return np.concatenate([shifted(points, -right_m), shifted(points, left_m)[::-1]])


def rectangle(
    centre: FloatArray,
    yaw: float | FloatArray,
    width: float | FloatArray,
    length: float | FloatArray,
) -> FloatArray:
    """Corners of a box [..., 4, 2], its length along yaw: front left, front right, back right..."""
    yaw, half_width, half_length = (np.asarray(v) for v in (yaw, width / 2, length / 2))
    forward = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) * half_length[..., None]
    left = np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1) * half_width[..., None]
    corners = np.stack([forward + left, forward - left, -forward - left, -forward + left], axis=-2)
    return np.asarray(centre)[..., None, :] + corners


def rectangles_overlap(first: FloatArray, second: FloatArray) -> NDArray[np.bool_]:
    """Whether two rectangles share area, by the separating axis theorem.

    Args:
        first: corners [..., 4, 2].
        second: corners [..., 4, 2].

    Returns:
        [...].
    """
    separated = np.zeros(np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), dtype=bool)
    for box in (first, second):
        for edge in (0, 1):
            axis = box[..., edge + 1, :] - box[..., edge, :]
            a = (first * axis[..., None, :]).sum(-1)
            b = (second * axis[..., None, :]).sum(-1)
            separated |= (a.max(-1) <= b.min(-1)) | (b.max(-1) <= a.min(-1))
    return ~separated
