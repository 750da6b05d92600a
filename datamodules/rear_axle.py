"""The car as the middle of its rear axle: where plans of OmniDrive are told and how they are ours.

nuScenes' ego frame stands there: x forward, y left, z up, on the ground. Everything else in this
toolkit follows LIDAR_TOP (x right, y forward), 0.94 m further ahead. Behind a turning car the two
points take different ways, so that plans of one are not plans of the other turned by 90 degrees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datamodules.poses import FloatArray, inverse
from datamodules.records import FrameRecord, Index
from odvla.types import WAYPOINTS


def rear_axle_future(
    index: Index, frame: FrameRecord, steps: int = WAYPOINTS
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Where the middle of the rear axle will be, in the ego frame of t0.

    Returns:
        [steps, 2] x forward, y left, metres, STEP_S apart, the last known point repeated after the
        scene's end; and [steps] True where the scene still goes on.
    """
    poses, mask = _ego_future(index, frame, steps)
    return poses[:, :2, 3], mask


def lidar_plan(index: Index, frame: FrameRecord, points: FloatArray) -> FloatArray:
    """A plan for the rear axle as a plan for LIDAR_TOP.

    A plan is points without headings, and where the lidar is depends on the heading. Taken is the
    heading that was driven at each step: so the distance between the plan and the driven path is
    the same for both points, and errors are those of OmniDrive's own evaluation.

    Args:
        index: the root's index.
        frame: t0.
        points: [steps, 2] x forward, y left, ego frame of t0, metres.

    Returns:
        [steps, 2] x right, y forward, LIDAR_TOP at t0.
    """
    poses, _ = _ego_future(index, frame, len(points))
    # The lidar in the ego frame [4, 4]; the calibration does not change within a scene.
    lidar = inverse(frame.ego_to_global) @ frame.lidar_to_global
    planned = poses.copy()
    planned[:, :2, 3] = points
    positions = (planned @ lidar)[:, :3, 3]
    to_lidar = inverse(lidar)
    return (positions @ to_lidar[:3, :3].T + to_lidar[:3, 3])[:, :2]


def _ego_future(
    index: Index, frame: FrameRecord, steps: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Poses [steps, 4, 4] of the later ego frames in the present one, and which are known."""
    to_ego = inverse(frame.ego_to_global)
    poses = np.empty((steps, 4, 4))
    mask = np.zeros(steps, dtype=bool)
    later = frame
    for step in range(steps):
        if later.next >= 0:
            later = index.frames[later.next]
            mask[step] = True
        poses[step] = to_ego @ later.ego_to_global
    return poses, mask
