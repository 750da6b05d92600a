"""Rigid transforms of nuScenes' tables as 4x4 matrices, many at once.

Quaternions are (w, x, y, z); a matrix named a_to_b takes column vectors of frame a to frame b.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def rotation_matrices(quaternions: ArrayLike) -> FloatArray:
    """Rotation matrices of quaternions.

    Args:
        quaternions: [..., 4] as (w, x, y, z); scaled to unit length here.

    Returns:
        [..., 3, 3].
    """
    q = np.asarray(quaternions, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def rigid(translations: ArrayLike, quaternions: ArrayLike) -> FloatArray:
    """Transforms that rotate by a quaternion, then move by a translation.

    Args:
        translations: [..., 3] in metres.
        quaternions: [..., 4] as (w, x, y, z).

    Returns:
        [..., 4, 4].
    """
    rotation = rotation_matrices(quaternions)
    matrices = np.zeros((*rotation.shape[:-2], 4, 4))
    matrices[..., :3, :3] = rotation
    matrices[..., :3, 3] = translations
    matrices[..., 3, 3] = 1.0
    return matrices


def inverse(matrices: FloatArray) -> FloatArray:
    """Inverse of rigid transforms [..., 4, 4] without a general matrix inversion."""
    inverted = np.zeros_like(matrices)
    transposed = np.swapaxes(matrices[..., :3, :3], -1, -2)
    inverted[..., :3, :3] = transposed
    inverted[..., :3, 3] = -np.einsum("...ij,...j->...i", transposed, matrices[..., :3, 3])
    inverted[..., 3, 3] = 1.0
    return inverted


def yaw_of(rotations: FloatArray) -> FloatArray:
    """Heading of the x axis of [..., 3, 3] rotations in the x-y plane, radians, from +x."""
    return np.arctan2(rotations[..., 1, 0], rotations[..., 0, 0])


def wrap_angle(angles: ArrayLike) -> FloatArray:
    """Angles moved into [-pi, pi)."""
    return (np.asarray(angles, dtype=np.float64) + np.pi) % (2 * np.pi) - np.pi
