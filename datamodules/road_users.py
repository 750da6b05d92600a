"""Where the other road users of a key-frame will be: boxes, not cells.

Collisions of turned boxes, time to collision and who is at fault need to know what was hit; the
rasters of occupancy.py do not.

Shape legend: T steps 0.5 s apart, the first one t0 itself; A boxes of a step, padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.agents import boxes_in_lidar, rows_of
from datamodules.records import FrameRecord, Index
from odvla.types import WAYPOINTS

# Of a box [9]: x, y, width, length, yaw, vx, vy.
COLUMNS = (0, 1, 3, 4, 6, 7, 8)


@dataclass(frozen=True)
class RoadUsers:
    """All annotated boxes of the next key-frames, in the lidar frame of t0."""

    boxes: NDArray[np.float32]  # [T, A, 7] x, y, width, length, yaw, vx, vy; metres, m/s
    label: NDArray[np.int64]  # [T, A] index into DETECTION_CLASSES, -1: another category
    points: NDArray[np.int64]  # [T, A] lidar and radar points inside
    instance: NDArray[np.int64]  # [T, A] who it is; -1: padding
    mask: NDArray[np.bool_]  # [T, A] False: padding


def road_users(index: Index, frame: FrameRecord, steps: int = WAYPOINTS) -> RoadUsers:
    """Annotated boxes at t0 and the next key-frames of the scene.

    Args:
        index: the root's index.
        frame: t0.
        steps: key-frames ahead; after the scene's end there are no boxes.
    """
    rows: list[NDArray[np.int64]] = []
    later: FrameRecord | None = frame
    for _ in range(steps + 1):
        rows.append(rows_of(index, later) if later is not None else np.zeros(0, dtype=np.int64))
        later = index.frames[later.next] if later is not None and later.next >= 0 else None
    width = max(len(step) for step in rows)
    mask = np.arange(width)[None] < np.array([len(step) for step in rows])[:, None]
    every = np.concatenate(rows)
    boxes = np.zeros((*mask.shape, len(COLUMNS)), dtype=np.float32)
    boxes[mask] = boxes_in_lidar(index, every, frame)[:, COLUMNS]
    data = index.annotations

    def table(values: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(mask.shape, -1, dtype=np.int64)
        found[mask] = values[every]
        return found

    return RoadUsers(boxes, table(data.label), table(data.points), table(data.instance), mask)
