"""The car's own state, history, plan and CAN vector, from poses and CAN bus messages.

Fields follow GPT-Driver's cached nuScenes info, as OpenDriveVLA's prompts use it, with one
difference: the cache computes the heading through mixed-up quaternion orders, so that its yaw rate
comes out near 0; here it is the real one. (The cached velocity, about (0, speed), is what the rear
axle does anyhow.) ego_trajectories.py has the cache's own form, and UniAD's.

An index holds all of this for every key-frame (Index.ego); the functions here read it there, and
compute it only while an index is being built, or at other lengths and heights.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.poses import FloatArray, inverse, wrap_angle, yaw_of
from datamodules.records import EgoTable, FrameRecord, Index
from odvla.types import COMMANDS, HISTORY, STEP_S, WAYPOINTS, EgoState, PlanTargets

TURN_OFFSET_M = 2.0  # lateral offset at the end of the plan that makes a command "turn"
WHEELBASE_M = 2.588  # of the Renault Zoe, as the cache divides by it
# The cache flips the sign of the steering where traffic keeps left; so do we, to be comparable.
FLIPPED_STEERING_PREFIX = "singapore"


# UniAD's planning labels follow the bottom of the car's 1.56 m high box, which it centres on the
# lidar. Where the car pitches or rolls that is up to a few centimetres from where the lidar went.
UNIAD_PLAN_POINT_M = -0.78


def past_positions(index: Index, frame: FrameRecord, steps: int = HISTORY) -> FloatArray:
    """Where LIDAR_TOP was before t0, in the lidar frame of t0.

    Before the scene's first key-frame the oldest known step is continued backwards, as the cache
    does; in the first key-frame itself that is the step that is yet to come, a leak every user of
    the cache has.

    Returns:
        [steps, 2], oldest first, STEP_S apart.
    """
    if index.ego is not None and steps == HISTORY:
        return index.ego.history[frame.number].copy()
    positions: list[FloatArray] = []
    oldest = frame
    while len(positions) < steps and oldest.prev >= 0:
        oldest = index.frames[oldest.prev]
        positions.append(oldest.lidar_to_global[:3, 3])
    step = _step_after(index, oldest)
    start = oldest.lidar_to_global[:3, 3]
    missing = steps - len(positions)
    positions.extend(start - step * (k + 1) for k in range(missing))
    return _to_lidar_xy(frame, np.array(positions[::-1]))


def future_positions(
    index: Index, frame: FrameRecord, steps: int = WAYPOINTS, height_m: float = 0.0
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Where LIDAR_TOP will be after t0, in the lidar frame of t0.

    Args:
        index: the root's index.
        frame: t0.
        steps: key-frames ahead.
        height_m: follow a point this far above the lidar instead; UNIAD_PLAN_POINT_M gives the
            ground truth of UniAD's and OpenDriveVLA's evaluation.

    Returns:
        [steps, 2], STEP_S apart, the last known point repeated after the scene's end; and [steps]
        True where the scene still goes on.
    """
    if index.ego is not None and steps == WAYPOINTS and height_m == 0:
        return index.ego.future[frame.number].copy(), index.ego.future_mask[frame.number].copy()
    positions, mask = [], np.zeros(steps, dtype=bool)
    newest = frame
    for k in range(steps):
        if newest.next >= 0:
            newest = index.frames[newest.next]
            mask[k] = True
        up = newest.lidar_to_global[:3, 2]
        positions.append(newest.lidar_to_global[:3, 3] + height_m * up)
    return _to_lidar_xy(frame, np.array(positions)), mask


def velocity_ahead(index: Index, frame: FrameRecord) -> FloatArray:
    """Velocity [2] of the ego origin over the next step, as UniAD labels the car with it.

    By time stamps, in the axes of the lidar where the step starts. A scene's last key-frame repeats
    the one before, in that one's axes; a scene of one key-frame stands still.
    """
    earlier, later = frame, frame
    if frame.next >= 0:
        later = index.frames[frame.next]
    elif frame.prev >= 0:
        earlier = index.frames[frame.prev]
    if earlier is later:
        return np.zeros(2)
    seconds = (later.timestamp_us - earlier.timestamp_us) * 1e-6
    moved = later.ego_to_global[:3, 3] - earlier.ego_to_global[:3, 3]
    return ((moved / seconds) @ earlier.lidar_to_global[:3, :3])[:2]


def plan_targets(index: Index, frame: FrameRecord, height_m: float = 0.0) -> PlanTargets:
    """The next 3 s of LIDAR_TOP (see future_positions) as targets of one row."""
    waypoints, mask = future_positions(index, frame, height_m=height_m)
    return PlanTargets(
        waypoints=torch.from_numpy(waypoints).float()[None], mask=torch.from_numpy(mask)[None]
    )


def command_of(waypoints: FloatArray) -> int:
    """Index into COMMANDS by where a plan [steps, 2] ends, as nuScenes work derives it."""
    offset_m = waypoints[-1, 0]
    if offset_m >= TURN_OFFSET_M:
        return COMMANDS.index("turn right")
    if offset_m <= -TURN_OFFSET_M:
        return COMMANDS.index("turn left")
    return COMMANDS.index("keep forward")


def ego_state(index: Index, frame: FrameRecord) -> EgoState:
    """The car's state at t0 as one row.

    Velocity is the speed of the rear axle over the last step (the next one in a scene's first
    frame) along the heading; acceleration is the last minus the previous displacement of the
    lidar. Steps are counted as STEP_S, as in the cache, whatever the exact times of the key-frames.
    Without CAN bus, can_accel and steering are 0 and heading_speed is that speed.
    """
    if index.ego is not None:
        return _stored_state(index.ego, frame.number)
    history = past_positions(index, frame)
    steps = np.diff(np.concatenate([history, np.zeros((1, 2))]), axis=0)
    earlier, later = _last_step(index, frame)
    moved = later.ego_to_global[:2, 3] - earlier.ego_to_global[:2, 3]
    speed = float(np.hypot(*moved)) / STEP_S
    turned = yaw_of(later.ego_to_global[:3, :3]) - yaw_of(earlier.ego_to_global[:3, :3])
    can = index.can_bus
    can_speed = float(can.speed[frame.number])
    if earlier is later:  # a scene of one key-frame
        speed = can_speed
    ego_to_lidar = inverse(frame.lidar_to_global) @ frame.ego_to_global
    sign = -1.0 if index.location(frame).startswith(FLIPPED_STEERING_PREFIX) else 1.0
    waypoints, _ = future_positions(index, frame)
    heading_speed = can_speed if can.available[frame.number] else speed
    return EgoState(
        velocity=_row(speed * ego_to_lidar[:2, 0]),
        yaw_rate=_row(wrap_angle(turned) / STEP_S),
        acceleration=_row(steps[-1] - steps[-2]),
        can_accel=_row(can.acceleration[frame.number, :2]),
        heading_speed=_row(heading_speed),
        steering=_row(2 * sign * can.steering[frame.number] / WHEELBASE_M),
        history=_row(history),
        command=torch.tensor([command_of(waypoints)]),
    )


def _stored_state(table: EgoTable, number: int) -> EgoState:
    return EgoState(
        velocity=_row(table.velocity[number]),
        yaw_rate=_row(table.yaw_rate[number]),
        acceleration=_row(table.acceleration[number]),
        can_accel=_row(table.can_accel[number]),
        heading_speed=_row(table.heading_speed[number]),
        steering=_row(table.steering[number]),
        history=_row(table.history[number]),
        command=torch.tensor([int(table.command[number])]),
    )


def can_bus_vector(index: Index, frame: FrameRecord, scene_start: bool) -> NDArray[np.float32]:
    """BEVFormer's can_bus vector after its preparation for a clip.

    Args:
        index: the root's index.
        frame: t0.
        scene_start: there is no previous frame to the model; the motion is 0 then (as in the
            reference's training; its evaluation puts absolute positions there by mistake).

    Returns:
        [18]: 0:3 ego translation since the previous key-frame in global axes, 3:7 ego quaternion,
        7:10 acceleration, 10:13 rotation rate, 13:16 velocity, 16 heading in radians within
        [0, 2 pi), 17 heading change since the previous key-frame in degrees.
    """
    if index.ego is not None:
        vector = index.ego.can_bus[frame.number].copy()
        if scene_start:
            vector[:3], vector[17] = 0.0, 0.0
        return vector
    yaw = float(yaw_of(frame.ego_to_global[:3, :3]))
    vector = np.zeros(18, dtype=np.float32)
    vector[3:7] = frame.ego_quaternion
    vector[7:10] = index.can_bus.acceleration[frame.number]
    vector[10:13] = index.can_bus.rotation_rate[frame.number]
    vector[13:16] = index.can_bus.velocity[frame.number]
    vector[16] = yaw % (2 * np.pi)
    if not scene_start and frame.prev >= 0:
        before = index.frames[frame.prev]
        vector[:3] = frame.ego_to_global[:3, 3] - before.ego_to_global[:3, 3]
        vector[17] = np.degrees(wrap_angle(yaw - yaw_of(before.ego_to_global[:3, :3])))
    return vector


def _last_step(index: Index, frame: FrameRecord) -> tuple[FrameRecord, FrameRecord]:
    """Key-frames at both ends of the last step, or of the next one in a scene's first frame."""
    if frame.prev >= 0:
        return index.frames[frame.prev], frame
    return frame, index.frames[frame.next] if frame.next >= 0 else frame


def _step_after(index: Index, frame: FrameRecord) -> FloatArray:
    """Displacement [3] of the lidar from a key-frame to the next, in global axes."""
    if frame.next >= 0:
        return index.frames[frame.next].lidar_to_global[:3, 3] - frame.lidar_to_global[:3, 3]
    speed = index.can_bus.velocity[frame.number, 0]
    return frame.ego_to_global[:3, 0] * speed * STEP_S


def _to_lidar_xy(frame: FrameRecord, points: FloatArray) -> FloatArray:
    """Global points [n, 3] in the lidar frame of t0, x and y only: [n, 2]."""
    to_lidar = inverse(frame.lidar_to_global)
    return (points @ to_lidar[:3, :3].T + to_lidar[:3, 3])[:, :2]


def _row(values: NDArray[np.floating] | float) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))[None]
