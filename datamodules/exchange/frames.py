"""UniAD's infos and GPT-Driver's cache: one record a key-frame, made from raw tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.agents import rows_of
from datamodules.ego_state import FLIPPED_STEERING_PREFIX, WHEELBASE_M
from datamodules.ego_trajectories import cached_trajectories
from datamodules.exchange.source import Source
from datamodules.records import FrameRecord
from odvla.metrics.collisions import EGO_LENGTH_M, EGO_WIDTH_M
from odvla.types import WAYPOINTS

STANDING_GOAL = 9.0  # of an agent that moves less than STANDING_M in 3 s
STANDING_M = 1.0
# Where a scene has no CAN bus, the script that makes the cache adds up the car's present position
# and its first future position, both of which are the origin.
SPEED_WITHOUT_CAN = 0.0


def uniad_info(source: Source, frame: FrameRecord) -> dict[str, Any]:
    """One info of nuscenes_infos_temporal_*.pkl; without boxes where the root is v1.0-test.

    Source: uniad_nuscenes_converter.py.
    """
    info = source.frame_fields(frame)
    if source.index.version == "v1.0-test":
        return info
    data = source.index.annotations
    rows = rows_of(source.index, frame)
    future, mask = source.long_future(frame)
    tokens = [source.index.instance_tokens[k] for k in data.instance[rows]]
    return info | {
        **source.agent_fields(frame, raw_names=False),
        "gt_inds": data.instance[rows].astype(np.int64),
        "gt_ins_tokens": np.array(tokens, dtype=str),
        "fut_traj": future,
        "fut_traj_valid_mask": np.repeat(mask[..., None], 2, axis=2).astype(np.float64),
        "visibility_tokens": data.visibility[rows].astype(np.int64),
    }


def cached_info(source: Source, frame: FrameRecord) -> dict[str, Any]:
    """One record of cached_nuscenes_info.pkl.

    Source: VAD's converter with four steps of history, as GPT-Driver's forks have it.
    """
    scene = source.scene(frame)
    return {
        **source.frame_fields(frame),
        "fut_valid_flag": frame.position + WAYPOINTS < scene.last - scene.first,
        "map_location": scene.location,
        **source.agent_fields(frame, raw_names=True),
        **agents_ahead(source, frame),
        **ego_fields(source, frame),
        "gt_tokens": [record["token"] for record in source.annotations(frame)],
    }


def agents_ahead(source: Source, frame: FrameRecord) -> dict[str, NDArray[np.float32]]:
    """Futures, goals and states of the N agents; steps in the axes of t0's lidar."""
    rows = rows_of(source.index, frame)
    count = len(rows)
    later = source.chain(rows, WAYPOINTS)
    path = np.concatenate([rows[:, None], later], axis=1)
    known = later >= 0
    boxes, _ = source.boxes(frame, path.reshape(-1))
    boxes = boxes.reshape(count, WAYPOINTS + 1, 7)
    steps = np.where(known[..., None], np.diff(boxes[..., :2], axis=1), 0.0)
    turns = np.where(known, np.diff(boxes[..., 6], axis=1), 0.0)
    agents = source.agent_fields(frame, raw_names=True)
    kinds = [source.category_numbers[name] for name in agents["gt_names"].tolist()]
    state = np.zeros((count, 9))
    state[:, :2] = agents["gt_boxes"][:, :2]
    state[:, 2] = -(agents["gt_boxes"][:, 6] + np.pi / 2)
    state[:, 3:5] = agents["gt_velocity"]
    state[:, 5:8] = agents["gt_boxes"][:, 3:6]
    state[:, 8] = kinds
    fields = {
        "gt_agent_fut_trajs": steps.reshape(count, 2 * WAYPOINTS),
        "gt_agent_fut_masks": known,
        "gt_agent_lcf_feat": state,
        "gt_agent_fut_yaw": turns,
        "gt_agent_fut_goal": goals(steps),
    }
    return {name: values.astype(np.float32) for name, values in fields.items()}


def goals(steps: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Eighths of the circle [n] that agents with steps [n, 6, 2] move towards, or STANDING_GOAL.

    The converter forgets a sign: an agent that moves to the left and backwards alone stands.
    """
    path = steps.cumsum(axis=1)
    moved = path[:, -1] - path[:, 0]
    eighth = (np.arctan2(moved[:, 1], moved[:, 0]) + np.pi) // (np.pi / 4)
    return np.where(moved.max(axis=1) < STANDING_M, STANDING_GOAL, eighth)


def ego_fields(source: Source, frame: FrameRecord) -> dict[str, NDArray[np.float32]]:
    """The car's fields (gt_ego_...)."""
    cached = cached_trajectories(source.index, frame)
    can, motion = source.can(frame)
    speed, steering = motion if motion is not None else (SPEED_WITHOUT_CAN, 0.0)
    left_hand = source.scene(frame).location.startswith(FLIPPED_STEERING_PREFIX)
    state = [
        *cached.velocity,
        *can[7:9],
        cached.yaw_rate,
        EGO_LENGTH_M,
        EGO_WIDTH_M,
        speed,
        2 * (-steering if left_hand else steering) / WHEELBASE_M,
    ]
    fields = {
        "gt_ego_his_trajs": cached.history,
        "gt_ego_his_diff": cached.history_steps,
        "gt_ego_fut_trajs": cached.future,
        "gt_ego_fut_diff": cached.future_steps,
        "gt_ego_fut_masks": cached.mask,
        "gt_ego_fut_cmd": cached.command,
        "gt_ego_lcf_feat": np.array(state),
    }
    return {name: values.astype(np.float32) for name, values in fields.items()}
