"""Where the car came from and where it went, in the two conventions that published work uses.

Both live in LIDAR_TOP at t0 (x right, y forward, metres) at key-frame steps, and differ in what
they follow and in how they fill what is not known:

| | UniAD's planning label | GPT-Driver's cached form |
|---|---|---|
| point followed | bottom of a 1.56 m high box around the lidar | the lidar itself |
| after the scene's end | 0, masked | last known point repeated, masked |
| before the scene's start | (no history) | oldest known step continued backwards |
| heading | box yaw: -pi plus the turn, not wrapped | none |
| velocity | to the next key-frame, by time stamps | speed of the last step, see mixed_up_yaw |

UniAD's label is the ground truth of the published planning scores, GPT-Driver's form is what
OpenDriveVLA is trained on. On level ground they agree to the millimetre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.ego_state import (
    UNIAD_PLAN_POINT_M,
    command_of,
    future_positions,
    past_positions,
    velocity_ahead,
)
from datamodules.poses import FloatArray, inverse, wrap_angle, yaw_of
from datamodules.records import FrameRecord, Index
from odvla.types import COMMANDS, HISTORY, STEP_S, WAYPOINTS

# UniAD places the car as a box that looks against the lidar's x axis, and turns it from there.
UNIAD_BOX_YAW = -np.pi


@dataclass(frozen=True)
class PlanningLabel:
    """UniAD's sdc_planning and what goes with it."""

    path: FloatArray  # [6, 3] x, y, yaw of the next key-frames; 0 where masked
    mask: NDArray[np.bool_]  # [6] False after the scene's end
    command: int  # index into COMMANDS
    velocity: FloatArray  # [2] m/s in the axes of the lidar


@dataclass(frozen=True)
class CachedTrajectories:
    """The car's trajectories as cached_nuscenes_info.pkl has them (the gt_ego_ fields)."""

    history: FloatArray  # [5, 2] 2.0 s ago .. now, oldest first
    history_steps: FloatArray  # [4, 2] differences of the above
    future: FloatArray  # [7, 2] now .. in 3.0 s
    future_steps: FloatArray  # [6, 2]
    mask: NDArray[np.bool_]  # [6] False after the scene's end
    command: NDArray[np.bool_]  # [3] one of COMMANDS is True
    velocity: FloatArray  # [2] m/s: about (0, speed), see mixed_up_yaw
    yaw_rate: float  # rad/s: about 0, see mixed_up_yaw


def planning_label(index: Index, frame: FrameRecord, steps: int = WAYPOINTS) -> PlanningLabel:
    """UniAD's planning label of one key-frame (its nuscenes_e2e_dataset, get_sdc_planning_label).

    Args:
        index: the root's index.
        frame: t0.
        steps: key-frames ahead.
    """
    points, mask = future_positions(index, frame, steps, UNIAD_PLAN_POINT_M)
    path = np.zeros((steps, 3))
    path[mask, :2] = points[mask]
    # The two turns, out of the later car's frame and into this one's, are added up as yaws; where
    # the car tilts that is not quite the yaw of their product.
    into = float(yaw_of(inverse(frame.ego_to_global)[:3, :3]))
    later = frame
    for step in range(int(mask.sum())):
        later = index.frames[later.next]
        turned = wrap_angle(yaw_of(later.ego_to_global[:3, :3]) + into)
        path[step, 2] = UNIAD_BOX_YAW + float(turned)
    return PlanningLabel(path, mask, command_of(points), velocity_ahead(index, frame))


def cached_trajectories(index: Index, frame: FrameRecord) -> CachedTrajectories:
    """GPT-Driver's cached form of one key-frame (VAD's converter with four steps of history).

    In a scene's first key-frame the step that is continued backwards, and the velocity, are those
    of the step that is yet to come: a leak every user of the cache has.
    """
    zero = np.zeros((1, 2))
    history = np.concatenate([past_positions(index, frame, HISTORY), zero])
    points, mask = future_positions(index, frame, WAYPOINTS)
    future = np.concatenate([zero, points])
    one_hot = np.arange(len(COMMANDS)) == command_of(points)
    before, after = frame, frame
    if frame.prev >= 0:
        before = index.frames[frame.prev]
    elif frame.next >= 0:
        after = index.frames[frame.next]
    moved = after.ego_to_global[:2, 3] - before.ego_to_global[:2, 3]
    speed = float(np.hypot(*moved)) / STEP_S
    heading = mixed_up_yaw(frame.ego_quaternion) + np.pi / 2
    turned = mixed_up_yaw(after.ego_quaternion) - mixed_up_yaw(before.ego_quaternion)
    return CachedTrajectories(
        history=history,
        history_steps=np.diff(history, axis=0),
        future=future,
        future_steps=np.diff(future, axis=0),
        mask=mask,
        command=one_hot,
        velocity=speed * np.array([np.cos(heading), np.sin(heading)]),
        yaw_rate=turned / STEP_S,
    )


def mixed_up_yaw(quaternion: FloatArray) -> float:
    """What the cache takes for the car's heading: 0 on level ground, whatever the heading.

    Its converter hands (w, x, y, z) to a formula for (x, y, z, w). What that formula gives is the
    roll of the car.

    Args:
        quaternion: [4] as (w, x, y, z).
    """
    x, y, z, w = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
