"""Which cells around the car other road users will fill: what plans must not run into.

The grid of UniAD's, ST-P3's and VAD's planning metric: 200 x 200 cells of 0.5 m around LIDAR_TOP at
t0, one raster for each of the next six key-frames. Rasters here have rows along y and columns along
x, both ascending (row 0 at y = -50 m, column 0 at x = -50 m); the collision metric reads columns
from right to left, see `metric_orientation`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.agents import boxes_in_lidar, rows_of
from datamodules.poses import FloatArray
from datamodules.records import FrameRecord, Index
from odvla.types import DETECTION_CLASSES, WAYPOINTS, BevGrid, TrafficTargets

VEHICLES = ("car", "truck", "construction_vehicle", "bus", "trailer", "motorcycle", "bicycle")
OCCUPANCY_GRID = BevGrid(-50.0, -50.0, 0.5, 200, 200)
Fill = Literal["reference", "exact"]
KEPT_FRAMES = 1024  # rasters in memory, 30 kB each


def occupancy(
    boxes_per_step: Sequence[NDArray[np.floating]],
    grid: BevGrid = OCCUPANCY_GRID,
    *,
    fill: Fill = "reference",
) -> NDArray[np.bool_]:
    """Cells that boxes fill.

    Args:
        boxes_per_step: for each step [n, >= 7] boxes (x, y, z, width, length, height, yaw, ...) in
            the lidar frame of t0.
        grid: of the rasters.
        fill: "reference" rounds corners to cells and fills what lies between them together with
            the border, as FIERY, ST-P3 and UniAD do (boxes come out up to a cell too large and a
            quarter metre towards +x, +y); "exact" fills the cells whose centre lies in the box.

    Returns:
        [steps, rows, columns].
    """
    count = [len(boxes) for boxes in boxes_per_step]
    step = np.repeat(np.arange(len(count)), count)
    every = np.concatenate([np.asarray(b, dtype=np.float64)[:, :7] for b in boxes_per_step])
    cells = np.zeros((len(count), grid.rows, grid.columns), dtype=np.uint8)
    if fill == "exact":
        _fill_centres(cells, step, every, grid)
    else:
        corners = np.round((box_corners(every) - [grid.x_min_m, grid.y_min_m]) / grid.cell_m)
        for number, corner in zip(step, corners.astype(np.int32), strict=True):
            # One by one: where polygons of one call overlap, OpenCV leaves a hole.
            cv2.fillPoly(cells[number], [corner], (1,))
    return cells.astype(bool)


def _fill_centres(
    cells: NDArray[np.uint8], step: NDArray[np.int64], boxes: FloatArray, grid: BevGrid
) -> None:
    """All boxes at once: a square window of cells around each, and a test along its two axes."""
    if not len(boxes):
        return
    x, y, width, length, yaw = boxes[:, [0, 1, 3, 4, 6]].T[:, :, None, None]
    reach = int(np.ceil(np.hypot(width, length).max() / 2 / grid.cell_m)) + 1
    window = np.arange(-reach, reach + 1)
    column = np.floor((x - grid.x_min_m) / grid.cell_m).astype(int) + window[None, None]
    row = np.floor((y - grid.y_min_m) / grid.cell_m).astype(int) + window[None, :, None]
    dx = grid.x_min_m + (column + 0.5) * grid.cell_m - x
    dy = grid.y_min_m + (row + 0.5) * grid.cell_m - y
    cos, sin = np.cos(yaw), np.sin(yaw)
    inside = (np.abs(dx * cos + dy * sin) <= length / 2) & (
        np.abs(dy * cos - dx * sin) <= width / 2
    )
    inside &= (column >= 0) & (column < grid.columns) & (row >= 0) & (row < grid.rows)
    box, at_row, at_column = np.nonzero(inside)
    cells[step[box], row[box, at_row, 0], column[box, 0, at_column]] = 1


def box_corners(boxes: NDArray[np.floating]) -> FloatArray:
    """Footprints [n, 4, 2] of boxes [n, >= 7], in order around the box from its front left."""
    width, length, yaw = boxes[:, 3], boxes[:, 4], boxes[:, 6]
    along = np.stack([length, -length, -length, length], axis=1) / 2
    left = np.stack([width, width, -width, -width], axis=1) / 2
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x = boxes[:, :1] + along * cos - left * sin
    y = boxes[:, 1:2] + along * sin + left * cos
    return np.stack([x, y], axis=-1).astype(np.float64)


def metric_orientation(cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rasters as the collision metric reads them: rows along +y, columns along -x."""
    return cells[..., ::-1]


def boxes_ahead(
    index: Index, frame: FrameRecord, classes: Sequence[str], steps: int = WAYPOINTS
) -> list[NDArray[np.float32]]:
    """Boxes [n, 9] of some classes in each of the next key-frames, in the lidar frame of t0.

    All annotated ones count, however hidden, as in UniAD; after the scene's end there are none.
    """
    wanted = [DETECTION_CLASSES.index(name) for name in classes]
    found = []
    later: FrameRecord | None = frame
    for _ in range(steps):
        later = index.frames[later.next] if later is not None and later.next >= 0 else None
        rows = rows_of(index, later) if later is not None else np.zeros(0, dtype=np.int64)
        rows = rows[np.isin(index.annotations.label[rows], wanted)]
        found.append(boxes_in_lidar(index, rows, frame))
    return found


def traffic_targets(index: Index, frame: FrameRecord) -> TrafficTargets:
    """Boxes of all ten classes at the time of each waypoint, as one row, no padding."""
    ahead = boxes_ahead(index, frame, DETECTION_CLASSES)
    step = np.repeat(np.arange(len(ahead)), [len(boxes) for boxes in ahead])
    flat = np.concatenate(ahead)[:, [0, 1, 3, 4, 6]]
    return TrafficTargets(
        boxes=torch.from_numpy(flat)[None],
        step=torch.from_numpy(step)[None],
        mask=torch.ones(1, len(flat), dtype=torch.bool),
    )


class FrameOccupancy:
    """Rasters of key-frames, made on demand; the last ones stay in memory, bit by bit.

    Args:
        index: the root's index.
        keep: how many rasters stay.
    """

    def __init__(self, index: Index, keep: int = KEPT_FRAMES) -> None:
        self.index = index
        self.keep = keep
        self._kept: OrderedDict[tuple[int, bool], NDArray[np.uint8]] = OrderedDict()

    def __call__(self, frame: FrameRecord, *, pedestrians: bool = False) -> NDArray[np.bool_]:
        """Rasters [6, 200, 200] of the next key-frames.

        Args:
            frame: t0.
            pedestrians: with pedestrians (ST-P3's and VAD's), or vehicles only (UniAD's).
        """
        key = (frame.number, pedestrians)
        shape = (WAYPOINTS, OCCUPANCY_GRID.rows, OCCUPANCY_GRID.columns)
        if key in self._kept:
            self._kept.move_to_end(key)
            return np.unpackbits(self._kept[key], count=int(np.prod(shape))).reshape(shape) > 0
        classes = (*VEHICLES, "pedestrian") if pedestrians else VEHICLES
        cells = occupancy(boxes_ahead(self.index, frame, classes))
        self._kept[key] = np.packbits(cells)
        if len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return cells
