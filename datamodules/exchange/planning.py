"""The ground truth of the published planning scores: driven paths, their masks, and rasters.

Rasters are stored [1, 6, 200, 200], one byte a cell. How they are turned is part of the format: the
evaluation flips them as it loads them, and only then are they what its metric reads (rows forward,
columns to the left, see occupancy.metric_orientation).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datamodules.ego_trajectories import planning_label
from datamodules.exchange.source import Source
from datamodules.occupancy import metric_orientation
from datamodules.records import FrameRecord
from odvla.types import WAYPOINTS

# Axes that the evaluation flips as it loads a file.
UNIAD_FLIPS: tuple[int, ...] = (-1,)
VAD_FLIPS: tuple[int, ...] = (-1, -2)
CELLS = 200
Cells = NDArray[np.bool_]


def driven_path(source: Source, frame: FrameRecord) -> NDArray[np.float32]:
    """gt_traj.pkl: UniAD's planning label [1, 6, 2], 0 after the scene's end."""
    return planning_label(source.index, frame).path[None, :, :2].astype(np.float32)


def driven_mask(source: Source, frame: FrameRecord) -> NDArray[np.float32]:
    """gt_traj_mask.pkl: [1, 6, 2], 1 where the scene goes on, for x and for y."""
    mask = planning_label(source.index, frame).mask
    return np.repeat(mask[None, :, None], 2, axis=2).astype(np.float32)


def vehicles(source: Source, frame: FrameRecord) -> NDArray[np.uint8]:
    """planing_gt_segmentation_val: cells of vehicles."""
    cells = source.occupancy(frame)
    return as_stored(metric_orientation(cells), UNIAD_FLIPS)


def vehicles_and_pedestrians(source: Source, frame: FrameRecord) -> NDArray[np.uint8]:
    """vad_gt_seg.pkl: cells of vehicles and pedestrians."""
    cells = source.occupancy(frame, pedestrians=True)
    return as_stored(metric_orientation(cells), VAD_FLIPS)


def as_stored(cells: Cells, flips: tuple[int, ...]) -> NDArray[np.uint8]:
    """Rasters [6, 200, 200] of the metric as a file holds them."""
    return np.ascontiguousarray(np.flip(cells, flips)[None]).astype(np.uint8)


def six_steps(cells: Cells) -> Cells:
    """The rasters of the six key-frames ahead, of a file's [1, 6 or 7, 200, 200] or without the 1.

    Where there are seven, the first is that of t0; the evaluation drops it.

    Raises:
        ValueError: the shape is another one.
    """
    inner = cells[0] if cells.ndim == 4 and cells.shape[0] == 1 else cells
    steps = (WAYPOINTS, WAYPOINTS + 1)
    if inner.ndim != 3 or inner.shape[0] not in steps or inner.shape[1:] != (CELLS, CELLS):
        raise ValueError(f"(1, 6 or 7, {CELLS}, {CELLS})")
    return inner[-WAYPOINTS:]
