"""Lidar sweeps of nuScenes: float32 x, y, z, intensity, ring index, point after point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from odvla.errors import UserError
from odvla.types import LidarPoints

VALUES = 5  # a point; the ring index is not used


def read_sweep(path: Path) -> NDArray[np.float32]:
    """Points [n, 4] of a LIDAR_TOP sweep in its own frame: x, y, z in metres, intensity 0..255.

    Raises:
        UserError: the file is missing, or is not a whole number of points.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"lidar sweep {path} cannot be read: {error.strerror}") from error
    if len(content) % (4 * VALUES):
        raise UserError(
            f"lidar sweep {path} is cut short: {len(content)} bytes, {4 * VALUES} a point"
        )
    return np.frombuffer(content, np.float32).reshape(-1, VALUES)[:, :4]


def one_row(points: NDArray[np.float32]) -> LidarPoints:
    """A sweep as a batch of one row, without padding."""
    return LidarPoints(
        torch.from_numpy(points.copy())[None], torch.ones(1, len(points), dtype=torch.bool)
    )


def no_points() -> LidarPoints:
    """One row in which the lidar saw nothing."""
    return LidarPoints(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool))
