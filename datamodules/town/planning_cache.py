"""GPT-Driver's cached_nuscenes_info: the fields of the public converter, from the town's truth.

Frame: LIDAR_TOP at t0 (x right, y forward). Quirks of the original are kept, each by name: readers
of the real file meet them too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.can_bus import nearest, pose_vectors
from datamodules.exchange.frames import goals
from datamodules.town.log import (
    KEYFRAMES_PER_SCENE,
    TICKS_PER_KEYFRAME,
    Actor,
    FloatArray,
    SceneLog,
)
from datamodules.town.recorded import Recorded, RecordedSample, RecordedSensor
from datamodules.town.scene_facts import to_lidar, to_lidar_origin, wrap
from odvla.types import CAMERAS, HISTORY, STEP_S, WAYPOINTS

if TYPE_CHECKING:
    from datamodules.town.tokens import TokenIndex

MAX_SWEEPS = 10
LIDAR_UP_M = 1.84023
TURN_OFFSET_M = 2.0
EGO_LENGTH_M, EGO_WIDTH_M = 4.084, 1.85
WHEELBASE_M = 2.588
# The original negates the steering where traffic keeps left.
FLIPPED_STEERING_PREFIX = "singapore"
# The original hands a quaternion (w, x, y, z) to a function that expects (x, y, z, w). For a car
# on level ground the "yaw" that comes out is 0, whatever the heading: the velocity is then
# (0, speed) and the yaw rate 0.
MIXED_UP_EGO_YAW = 0.0
MAX_VELOCITY_GAP_S = 1.5  # devkit: boxes further apart have no velocity


def scene_infos(log: SceneLog, tokens: TokenIndex, recorded: Recorded) -> dict[str, dict[str, Any]]:
    """The cached record of every key-frame of a scene, keyed by sample token."""
    can_poses = recorded.can_bus(log.name, "pose")
    can_steers = recorded.can_bus(log.name, "steeranglefeedback")
    seen_at = annotated_at(log.name, tokens)
    rows = [recorded.sample_rows[tokens.sample(log.name, k)] for k in range(KEYFRAMES_PER_SCENE)]
    times = np.array([row["timestamp"] for row in rows])
    cans = pose_vectors(can_poses, times)
    speeds = [can_poses[n]["vel"][0] for n in nearest(can_poses, times)] if can_poses else None
    steers = [can_steers[n]["value"] for n in nearest(can_steers, times)] if can_steers else None
    origins = np.array(
        [to_lidar_origin(log, k * TICKS_PER_KEYFRAME) for k in range(KEYFRAMES_PER_SCENE)]
    )
    infos = {}
    for keyframe, row in enumerate(rows):
        token = tokens.sample(log.name, keyframe)
        lidar = recorded.samples[token].sensors["LIDAR_TOP"]
        can = cans[keyframe]
        speed = speeds[keyframe] if speeds else None
        steering = steers[keyframe] if steers else None
        infos[token] = {
            **_sensor_fields(recorded.samples[token]),
            "token": token,
            "prev": row["prev"],
            "next": row["next"],
            "can_bus": can,
            "frame_idx": keyframe,
            "sweeps": [
                _sensor(recorded.samples[tokens.sample(log.name, k)].sensors["LIDAR_TOP"], lidar)
                for k in range(keyframe - 1, max(-1, keyframe - 1 - MAX_SWEEPS), -1)
            ],
            "scene_token": tokens.scene(log.name),
            "timestamp": row["timestamp"],
            "fut_valid_flag": keyframe + WAYPOINTS < KEYFRAMES_PER_SCENE,
            "map_location": log.location,
            **agent_fields(log, keyframe, tokens, recorded, seen_at),
            **ego_fields(log, keyframe, origins, can, speed, steering),
        }
    return infos


def annotated_at(name: str, tokens: TokenIndex) -> dict[int, list[int]]:
    """For each actor of a scene the key-frames in which it is annotated, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for keyframe in range(KEYFRAMES_PER_SCENE):
        for number in tokens.annotated[name, keyframe]:
            found[number].append(keyframe)
    return found


def whole_future_tokens(name: str, tokens: TokenIndex) -> list[str]:
    """Samples of a scene that GPT-Driver trains on: its last six have no whole future."""
    return [tokens.sample(name, k) for k in range(KEYFRAMES_PER_SCENE - WAYPOINTS)]


def ego_fields(
    log: SceneLog,
    keyframe: int,
    origins: FloatArray,
    can: FloatArray,
    can_speed: float | None,
    steering: float | None,
) -> dict[str, np.ndarray]:
    """History, plan, command and state of the car.

    Args:
        log: the scene.
        keyframe: t0.
        origins: [40, 2] metres, where the lidar is at each key-frame.
        can: [18] the sample's CAN bus vector.
        can_speed: m/s along the heading at t0; None without CAN bus.
        steering: angle of the CAN bus in rad, left positive; None without CAN bus.
    """
    known = origins[max(0, keyframe - HISTORY) : keyframe + 1]
    # Before the scene's start its first step is continued backwards.
    first_step = origins[1] - origins[0]
    missing = HISTORY + 1 - len(known)
    extrapolated = known[0] - first_step * np.arange(missing, 0, -1)[:, None]
    tick = keyframe * TICKS_PER_KEYFRAME
    history = to_lidar(log, tick, np.concatenate([extrapolated, known]))
    # After the scene's end its last point is repeated.
    ahead = np.minimum(keyframe + np.arange(WAYPOINTS + 1), KEYFRAMES_PER_SCENE - 1)
    future = to_lidar(log, tick, origins[ahead])
    mask = keyframe + np.arange(1, WAYPOINTS + 1) < KEYFRAMES_PER_SCENE
    offset_m = future[-1, 0]
    command = [offset_m >= TURN_OFFSET_M, offset_m <= -TURN_OFFSET_M, abs(offset_m) < TURN_OFFSET_M]
    # Speed of the rear axle over the last step, or over the next one at the scene's start.
    earlier = max(0, keyframe - 1) * TICKS_PER_KEYFRAME
    axle = log.ego.track.xy
    speed = np.linalg.norm(axle[earlier + TICKS_PER_KEYFRAME] - axle[earlier]) / STEP_S
    heading = MIXED_UP_EGO_YAW + np.pi / 2
    flip = -1.0 if log.location.startswith(FLIPPED_STEERING_PREFIX) else 1.0
    state = [
        speed * np.cos(heading),
        speed * np.sin(heading),
        can[7],
        can[8],
        0.0,  # rate of MIXED_UP_EGO_YAW
        EGO_LENGTH_M,
        EGO_WIDTH_M,
        speed if steering is None or can_speed is None else can_speed,
        2 * flip * (steering or 0.0) / WHEELBASE_M,
    ]
    fields = {
        "gt_ego_his_trajs": history,
        "gt_ego_his_diff": np.diff(history, axis=0),
        "gt_ego_fut_trajs": future,
        "gt_ego_fut_diff": np.diff(future, axis=0),
        "gt_ego_fut_masks": mask,
        "gt_ego_fut_cmd": np.array(command),
        "gt_ego_lcf_feat": np.array(state),
    }
    return {name: values.astype(np.float32) for name, values in fields.items()}


def agent_fields(
    log: SceneLog,
    keyframe: int,
    tokens: TokenIndex,
    recorded: Recorded,
    seen_at: dict[int, list[int]],
) -> dict[str, Any]:
    """Boxes of the N annotated agents and their futures.

    `gt_boxes` [N, 7] is (x, y, z, w, l, h, -yaw - pi / 2); `gt_agent_fut_trajs` [N, 12] holds the
    steps from one annotation of the instance to its next, in the axes of t0.

    Args:
        log: the scene.
        keyframe: t0.
        tokens: the town's tokens.
        recorded: point counts and categories.
        seen_at: see annotated_at.
    """
    actors_by_id = {actor.id: actor for actor in log.actors}
    ids = tokens.annotated[log.name, keyframe]
    tick = keyframe * TICKS_PER_KEYFRAME
    right_yaw = log.ego.track.yaw[tick] - np.pi / 2  # heading of the lidar's x axis
    count = len(ids)
    boxes = np.zeros((count, 7))
    velocity = np.zeros((count, 2))
    steps = np.zeros((count, WAYPOINTS, 2), dtype=np.float32)
    masks = np.zeros((count, WAYPOINTS), dtype=np.float32)
    turns = np.zeros((count, WAYPOINTS), dtype=np.float32)
    lcf = np.zeros((count, 9), dtype=np.float32)
    for row, number in enumerate(ids):
        actor = actors_by_id[number]
        following = [k for k in seen_at[number] if k >= keyframe][: WAYPOINTS + 1]
        ticks = np.array(following) * TICKS_PER_KEYFRAME
        path = to_lidar(log, tick, actor.track.xy[ticks])
        yaws = wrap(actor.track.yaw[ticks] - right_yaw)
        boxes[row] = (
            *path[0], actor.size_wlh[2] / 2 - LIDAR_UP_M, *actor.size_wlh, -yaws[0] - np.pi / 2,
        )  # fmt: skip
        velocity[row] = _velocity(log, actor, keyframe, seen_at[number])
        known = len(following) - 1
        steps[row, :known] = np.diff(path, axis=0)
        turns[row, :known] = np.diff(yaws)
        masks[row, :known] = 1.0
        kind = recorded.categories.index(actor.category)
        lcf[row] = (*path[0], yaws[0], *velocity[row], *actor.size_wlh, kind)
    names = [actors_by_id[number].category for number in ids]
    own_tokens = [tokens.annotation(log.name, keyframe, number) for number in ids]
    points = np.array([recorded.points[token] for token in own_tokens], dtype=int).reshape(-1, 2)
    return {
        "gt_boxes": boxes,
        "gt_names": np.array(names, dtype=str),
        "gt_velocity": velocity,
        "num_lidar_pts": points[:, 0],
        "num_radar_pts": points[:, 1],
        "valid_flag": points.sum(1) > 0,
        "gt_agent_fut_trajs": steps.reshape(count, 2 * WAYPOINTS),
        "gt_agent_fut_masks": masks,
        "gt_agent_lcf_feat": lcf,
        "gt_agent_fut_yaw": turns,
        "gt_agent_fut_goal": goals(steps).astype(np.float32),
        "gt_tokens": own_tokens,
    }


def _velocity(log: SceneLog, actor: Actor, keyframe: int, seen_at: list[int]) -> FloatArray:
    """Velocity [2] over the neighbouring annotations, as the devkit takes it; NaN without any."""
    place = seen_at.index(keyframe)
    first = seen_at[max(0, place - 1)]
    last = seen_at[min(len(seen_at) - 1, place + 1)]
    gap_s = (last - first) * STEP_S
    both = first < keyframe < last
    if gap_s == 0 or gap_s > MAX_VELOCITY_GAP_S * (2 if both else 1):
        return np.full(2, np.nan)
    ends = actor.track.xy[np.array([first, last]) * TICKS_PER_KEYFRAME]
    local = to_lidar(log, keyframe * TICKS_PER_KEYFRAME, ends)
    return (local[1] - local[0]) / gap_s


def _sensor_fields(sample: RecordedSample) -> dict[str, Any]:
    lidar = sample.sensors["LIDAR_TOP"]
    return {
        "lidar_path": lidar.filename,
        "cams": {channel: _camera(sample.sensors[channel], lidar) for channel in CAMERAS},
        "lidar2ego_translation": lidar.calibration["translation"],
        "lidar2ego_rotation": lidar.calibration["rotation"],
        "ego2global_translation": lidar.ego_pose["translation"],
        "ego2global_rotation": lidar.ego_pose["rotation"],
    }


def _camera(camera: RecordedSensor, lidar: RecordedSensor) -> dict[str, Any]:
    return {
        **_sensor(camera, lidar),
        "type": camera.channel,
        "cam_intrinsic": np.array(camera.calibration["camera_intrinsic"]),
    }


def _sensor(sensor: RecordedSensor, lidar: RecordedSensor) -> dict[str, Any]:
    """One file; sensor2lidar maps a point of its sensor into the lidar's frame at t0."""
    to_lidar_frame = lidar.global_to_sensor @ sensor.ego_to_global @ sensor.sensor_to_ego
    return {
        "data_path": sensor.filename,
        "type": "lidar",
        "sample_data_token": sensor.token,
        "sensor2ego_translation": sensor.calibration["translation"],
        "sensor2ego_rotation": sensor.calibration["rotation"],
        "ego2global_translation": sensor.ego_pose["translation"],
        "ego2global_rotation": sensor.ego_pose["rotation"],
        "timestamp": sensor.timestamp_us,
        "sensor2lidar_rotation": to_lidar_frame[:3, :3],
        "sensor2lidar_translation": to_lidar_frame[:3, 3],
    }
