"""Pinhole cameras without lens distortion: points into a camera, pixels, the near plane."""

from __future__ import annotations

import numpy as np

from datamodules.town.rig import FloatArray

NEAR_M = 0.25
# Fixed-point coordinates must fit in 32 bits; a tighter bound bends the edges of what is close.
FARTHEST_PIXEL = 1e6


def to_camera(points: FloatArray, global_to_camera: FloatArray) -> FloatArray:
    """Global points [..., 3] in the camera's frame."""
    # One product of all rows: [n, 4, 3] would be n small ones.
    turned = points.reshape(-1, 3) @ global_to_camera[:3, :3].T
    return turned.reshape(points.shape) + global_to_camera[:3, 3]


def to_pixels(camera: FloatArray, intrinsics: FloatArray) -> FloatArray:
    """Pixels [..., 2] of points [..., 3] in front of a camera; centres of pixels are integers."""
    pixels = camera[..., :2] / camera[..., 2:] * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2]
    return np.clip(pixels - 0.5, -FARTHEST_PIXEL, FARTHEST_PIXEL)


def cut(polygon: FloatArray) -> FloatArray:
    """The part [k, 3] of a polygon [P, 3] before the near plane (Sutherland and Hodgman)."""
    kept: list[list[float]] = []
    corners = polygon.tolist()  # plain numbers: arrays of three take several times as long
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        inside_a, inside_b = a[2] >= NEAR_M, b[2] >= NEAR_M
        if inside_a:
            kept.append(a)
        if inside_a != inside_b:
            ahead, span = NEAR_M - a[2], b[2] - a[2]
            kept.append([p + (q - p) * ahead / span for p, q in zip(a, b, strict=True)])
    return np.array(kept).reshape(-1, 3)
