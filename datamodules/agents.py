"""Annotated agents of a key-frame: boxes, tracks, futures and pasts.

Shape legend: A agents of one key-frame.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.ego_state import velocity_ahead
from datamodules.poses import FloatArray, inverse, rotation_matrices, yaw_of
from datamodules.records import AgentPaths, Annotations, FrameRecord, Index
from odvla.types import BOX_DIM, HISTORY, WAYPOINTS, AgentTargets

PAST_STEPS = HISTORY  # key-frames back that agents' pasts reach
EGO_SIZE_M = (1.73, 4.08, 1.56)  # width, length, height of the Renault Zoe, as in UniAD's labels


def boxes_in_lidar(
    index: Index, rows: NDArray[np.int64], frame: FrameRecord
) -> NDArray[np.float32]:
    """Boxes of annotation rows (of any key-frame) in the lidar frame of `frame`.

    Returns:
        [n, 9] as odvla.types describes a box; velocity over ground in lidar axes, 0 where unknown.
    """
    data = index.annotations
    to_lidar = inverse(frame.lidar_to_global)
    boxes = np.zeros((len(rows), BOX_DIM), dtype=np.float32)
    boxes[:, :3] = data.centre[rows] @ to_lidar[:3, :3].T + to_lidar[:3, 3]
    boxes[:, 3:6] = data.size[rows]
    boxes[:, 6] = yaw_of(to_lidar[:3, :3] @ rotation_matrices(data.rotation[rows]))
    boxes[:, 7:9] = data.velocity[rows] @ to_lidar[:2, :2].T
    return boxes


def rows_of(index: Index, frame: FrameRecord) -> NDArray[np.int64]:
    """All annotation rows of a key-frame."""
    return np.arange(frame.first_annotation, frame.last_annotation)


def learnable_rows(
    index: Index, frame: FrameRecord, extent_m: tuple[float, float, float, float]
) -> NDArray[np.int64]:
    """Annotation rows a detector is asked for.

    Those of the ten detection classes with at least one lidar or radar point inside (the devkit's
    evaluation leaves out the others too), whose centre lies within x_min, x_max, y_min, y_max of
    the lidar.
    """
    rows = rows_of(index, frame)
    data = index.annotations
    rows = rows[(data.label[rows] >= 0) & (data.points[rows] > 0)]
    to_lidar = inverse(frame.lidar_to_global)
    x, y = (data.centre[rows] @ to_lidar[:3, :3].T + to_lidar[:3, 3])[:, :2].T
    x_min, x_max, y_min, y_max = extent_m
    return rows[(x >= x_min) & (x < x_max) & (y >= y_min) & (y < y_max)]


def learnable_mask(
    index: Index, rows: NDArray[np.int64] | NDArray[np.int32], extent_m: tuple[float, ...]
) -> NDArray[np.bool_]:
    """Which annotation rows [n], of any key-frames, learnable_rows has: [n]."""
    data = index.annotations
    mask = (data.label[rows] >= 0) & (data.points[rows] > 0)
    to_lidar = inverse(np.asarray(index.arrays["frame.lidar_to_global"]))
    x_min, x_max, y_min, y_max = extent_m
    # In parts: a matrix a row takes memory.
    for part in np.array_split(np.flatnonzero(mask), 1 + len(rows) // 65536):
        matrix, centre = to_lidar[data.frame[rows[part]]], data.centre[rows[part]]
        x, y = (np.einsum("nij,nj->ni", matrix[:, :2, :3], centre) + matrix[:, :2, 3]).T
        mask[part] = (x >= x_min) & (x < x_max) & (y >= y_min) & (y < y_max)
    return mask


def futures(index: Index, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where agents go, each in its own frame at t0 (origin its centre, x right, y forward).

    Args:
        index: the root's index.
        rows: annotation rows at t0.

    Returns:
        Positions [n, 6, 2] in metres, 0 where unknown, and [n, 6] True where the agent is annotated
        in that key-frame of the same scene.
    """
    paths = index.paths
    if paths is not None:
        return paths.future_own[rows], paths.future_mask[rows]
    data = index.annotations
    points, mask = _positions_along(data, rows, data.next, WAYPOINTS)
    return in_own_frame(data, rows, points, mask).astype(np.float32), mask


def agent_paths(index: Index) -> AgentPaths:
    """Futures and pasts of all annotations, for the index."""
    data = index.annotations
    rows = np.arange(len(data.frame))
    future, future_mask = _positions_along(data, rows, data.next, WAYPOINTS)
    past, past_mask = _positions_along(data, rows, data.prev, PAST_STEPS)
    to_lidar = inverse(np.asarray(index.arrays["frame.lidar_to_global"]))

    def in_lidar(points: FloatArray, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        matrix = to_lidar[data.frame]
        moved = np.einsum("nij,nkj->nki", matrix[:, :2, :3], points) + matrix[:, None, :2, 3]
        return np.where(mask[..., None], moved, 0.0).astype(np.float32)

    return AgentPaths(
        future_own=in_own_frame(data, rows, future, future_mask).astype(np.float32),
        past_own=in_own_frame(data, rows, past, past_mask).astype(np.float32),
        future_lidar=in_lidar(future, future_mask),
        past_lidar=in_lidar(past, past_mask),
        future_mask=future_mask,
        past_mask=past_mask,
    )


def _positions_along(
    data: Annotations, rows: NDArray[np.int64], link: NDArray[np.int64], steps: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Global positions [n, steps, 3] in the key-frames 1 .. steps along a link, and their mask."""
    mask = np.zeros((len(rows), steps), dtype=bool)
    points = np.repeat(data.centre[rows, None], steps, axis=1)
    current = rows.copy()
    for _ in range(steps):  # at most one annotation a key-frame, so `steps` hops reach all of them
        current = np.where(current >= 0, link[current], -1)
        away = np.abs(data.frame[current] - data.frame[rows]) - 1
        found = np.flatnonzero((current >= 0) & (away >= 0) & (away < steps))
        mask[found, away[found]] = True
        points[found, away[found]] = data.centre[current[found]]
    return points, mask


def in_own_frame(
    data: Annotations, rows: NDArray[np.int64], points: FloatArray, mask: NDArray[np.bool_]
) -> FloatArray:
    """Global points [n, steps, 3] as [n, steps, 2]: right and forward of each agent, level."""
    yaw = yaw_of(rotation_matrices(data.rotation[rows]))
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    dx, dy, _ = np.moveaxis(points - data.centre[rows, None], -1, 0)
    own = np.stack([dx * sin - dy * cos, dx * cos + dy * sin], axis=-1)
    return np.where(mask[..., None], own, 0.0)


def pasts(index: Index, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where agents came from, each in its own frame at t0, latest first; else as `futures`."""
    paths = index.paths
    if paths is not None:
        return paths.past_own[rows], paths.past_mask[rows]
    data = index.annotations
    points, mask = _positions_along(data, rows, data.prev, PAST_STEPS)
    return in_own_frame(data, rows, points, mask).astype(np.float32), mask


def ego_box(index: Index, frame: FrameRecord) -> NDArray[np.float32]:
    """The car's own box [9] in its lidar frame, as UniAD has it: centred on the lidar.

    The velocity is that of the next step, in a scene's last key-frame that of the last one.
    """
    box = np.zeros(BOX_DIM, dtype=np.float32)
    box[3:6], box[6] = EGO_SIZE_M, np.pi / 2
    box[7:9] = velocity_ahead(index, frame)
    return box


def agent_targets(
    index: Index, frame: FrameRecord, extent_m: tuple[float, float, float, float]
) -> AgentTargets:
    """Targets of one key-frame as one row, no padding."""
    rows = learnable_rows(index, frame, extent_m)
    future, future_mask = futures(index, rows)
    past, past_mask = pasts(index, rows)
    return AgentTargets(
        boxes=torch.from_numpy(boxes_in_lidar(index, rows, frame))[None],
        labels=torch.from_numpy(index.annotations.label[rows])[None],
        track_ids=torch.from_numpy(index.annotations.instance[rows])[None],
        mask=torch.ones(1, len(rows), dtype=torch.bool),
        future=torch.from_numpy(future)[None],
        future_mask=torch.from_numpy(future_mask)[None],
        past=torch.from_numpy(past)[None],
        past_mask=torch.from_numpy(past_mask)[None],
        ego=torch.from_numpy(ego_box(index, frame))[None],
    )
