"""Map elements around the car, cut from the map expansion and rastered on the BEV grid.

UniAD's three thing classes and its stuff class: dividers (lane and road dividers, one instance a
line), pedestrian crossings (one a polygon), boundaries (edges of the drivable area, one a connected
piece) and the drivable area itself.

The index holds each location as flat arrays of segments (map_geometry.py), so that a frame costs a
few array operations and no geometry library.

Shape legend: S segments of a location, E elements near the car, H x W cells.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.map_geometry import Segments
from datamodules.poses import FloatArray, yaw_of
from datamodules.records import FrameRecord, Index
from odvla.types import MAP_CLASSES, BevGrid, MapTargets

DIVIDER, CROSSING, BOUNDARY = (
    MAP_CLASSES.index(name) for name in ("divider", "ped_crossing", "boundary")
)


def map_targets(index: Index, frame: FrameRecord, grid: BevGrid) -> MapTargets:
    """Map elements of one key-frame as one row, no padding.

    Only elements with at least one cell on the grid are given. A crossing covers the cells whose
    centre lies in it (or, if too small for any, those its edge touches); lines cover every cell
    they pass through; the drivable area covers the cells whose centre lies in it.

    Raises:
        UserError: the location has no map expansion.
    """
    layers = index.map_of(frame)
    x_min, x_max, y_min, y_max = grid.extent_m
    reach_m = float(np.hypot(max(-x_min, x_max), max(-y_min, y_max))) + grid.cell_m
    raster = _FrameRaster(frame, grid, reach_m)
    parts = [
        (DIVIDER, raster.lines(layers.dividers)),
        (CROSSING, raster.areas(layers.crossings)),
        (BOUNDARY, raster.lines(layers.boundaries, closed=True)),
    ]
    masks = np.concatenate([part for _, part in parts])
    labels = np.concatenate([np.full(len(part), label) for label, part in parts])
    return MapTargets(
        masks=torch.from_numpy(masks)[None],
        labels=torch.from_numpy(labels.astype(np.int64))[None],
        mask=torch.ones(1, len(masks), dtype=torch.bool),
        drivable=torch.from_numpy(raster.union(layers.drivable))[None],
    )


def drivable_area(index: Index, frame: FrameRecord, grid: BevGrid) -> NDArray[np.bool_]:
    """Drivable cells [H, W] around one key-frame, without the other layers of the map.

    Raises:
        UserError: the location has no map expansion.
    """
    layers = index.map_of(frame)
    x_min, x_max, y_min, y_max = grid.extent_m
    reach_m = float(np.hypot(max(-x_min, x_max), max(-y_min, y_max))) + grid.cell_m
    return _FrameRaster(frame, grid, reach_m).union(layers.drivable)


def map_lines(
    index: Index, frame: FrameRecord, reach_m: float
) -> list[tuple[int, NDArray[np.float64]]]:
    """Map elements near the car as lines: the vector form, for pictures and text.

    Args:
        index: the root's index.
        frame: t0.
        reach_m: elements that come within this square around the lidar are given, in one line for
            each connected piece inside it (a piece keeps its segments that cross the border).

    Returns:
        Index into MAP_CLASSES and points [k, 2] in the lidar frame of t0; crossings are closed.

    Raises:
        UserError: the location has no map expansion.
    """
    layers = index.map_of(frame)
    raster = _FrameRaster(frame, BevGrid(-reach_m, -reach_m, 1.0, 1, 1), reach_m * np.sqrt(2))
    found = []
    for label, segments, whole in (
        (DIVIDER, layers.dividers, False),
        (CROSSING, layers.crossings, True),
        (BOUNDARY, layers.boundaries, False),
    ):
        rows = (segments.whole_near if whole else segments.near)(raster.centre, raster.reach_m)
        start, end = (raster.in_lidar(ends[rows]) for ends in (segments.start, segments.end))
        if not whole:
            low, high = np.minimum(start, end), np.maximum(start, end)
            inside = ((low <= reach_m) & (high >= -reach_m)).all(1)
            rows, start, end = rows[inside], start[inside], end[inside]
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(segments.element[rows]) != 0)) + 1
        for piece in np.split(np.arange(len(rows)), breaks):
            if len(piece):
                found.append((label, np.concatenate([start[piece], end[piece[-1:]]])))
    return found


class _FrameRaster:
    """Draws segments of the global frame on the grid of one key-frame."""

    def __init__(self, frame: FrameRecord, grid: BevGrid, reach_m: float) -> None:
        self.grid = grid
        self.reach_m = reach_m
        self.centre = frame.lidar_to_global[:2, 3]
        yaw = float(yaw_of(frame.lidar_to_global[:3, :3]))
        cos, sin = np.cos(yaw), np.sin(yaw)
        self.to_lidar = np.array([[cos, sin], [-sin, cos]])

    def in_lidar(self, points: FloatArray) -> FloatArray:
        """Global points [n, 2] in the lidar frame of t0."""
        return (points - self.centre) @ self.to_lidar.T

    def lines(self, segments: Segments, *, closed: bool = False) -> NDArray[np.bool_]:
        """Masks [E, H, W] of the lines (or closed rings) near the car, one a connected piece."""
        near = segments.near(self.centre, self.reach_m)
        element = segments.element[near]
        broken = np.ones(len(near), dtype=bool)
        broken[1:] = (np.diff(near) != 1) | (np.diff(element) != 0)
        piece = np.cumsum(broken) - 1
        for number in np.unique(element) if closed else ():
            self._join_ends(segments, near, element, piece, number)
        start, end = self._cells(segments, near)
        return draw_lines(start, end, _renumber(piece), self.grid)

    def areas(self, segments: Segments) -> NDArray[np.bool_]:
        """Masks [E, H, W] of the polygons near the car."""
        near = segments.whole_near(self.centre, self.reach_m)
        element = _renumber(segments.element[near])
        start, end = self._cells(segments, near)
        shape = (int(element.max()) + 1 if len(element) else 0, self.grid.rows, self.grid.columns)
        masks = np.zeros(shape, dtype=bool)
        outlines = draw_lines(start, end, element, self.grid, keep_empty=True)
        for number in range(shape[0]):
            own = element == number
            filled = fill_rings(start[own], end[own], self.grid)
            masks[number] = filled if filled.any() else outlines[number]
        return masks[masks.any((1, 2))]

    def union(self, segments: Segments) -> NDArray[np.bool_]:
        """Cells [H, W] whose centre lies in any of the polygons near the car."""
        near = segments.whole_near(self.centre, self.reach_m)
        return fill_rings(*self._cells(segments, near), self.grid)

    def _cells(self, segments: Segments, rows: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Both ends of segments in units of cells: (column, row), cell centres at integers."""
        origin = np.array([self.grid.x_min_m, self.grid.y_min_m])
        return tuple(
            (self.in_lidar(ends[rows]) - origin) / self.grid.cell_m - 0.5
            for ends in (segments.start, segments.end)
        )

    @staticmethod
    def _join_ends(
        segments: Segments,
        near: NDArray[np.int64],
        element: NDArray[np.int64],
        piece: NDArray[np.int64],
        number: int,
    ) -> None:
        """Give the last piece of a closed ring the first one's number where they meet."""
        own = np.flatnonzero(element == number)
        first, last = own[0], own[-1]
        if piece[first] != piece[last] and np.array_equal(
            segments.start[near[first]], segments.end[near[last]]
        ):
            piece[own[piece[own] == piece[last]]] = piece[first]


def _renumber(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels replaced by 0, 1, ... in their order."""
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)


def draw_lines(
    start: FloatArray,
    end: FloatArray,
    element: NDArray[np.int64],
    grid: BevGrid,
    *,
    keep_empty: bool = False,
) -> NDArray[np.bool_]:
    """Cells that segments pass through (up to corners cut by less than an eighth of a cell).

    Args:
        start: [S, 2] (column, row) in units of cells, cell centres at integers.
        end: [S, 2].
        element: [S] which mask a segment belongs to, 0, 1, ...
        grid: gives the size.
        keep_empty: keep masks without a cell.

    Returns:
        [E, H, W].
    """
    count = int(element.max()) + 1 if len(element) else 0
    masks = np.zeros((count, grid.rows, grid.columns), dtype=bool)
    start, end, element = _clip(start, end, element, grid)
    if len(start):
        # Points an eighth of a cell apart along every segment, all segments at once.
        points = np.ceil(np.abs(end - start).max(1) * 8).astype(np.int64) + 1
        owner = np.repeat(np.arange(len(start)), points)
        order = np.arange(points.sum()) - np.repeat(np.cumsum(points) - points, points)
        share = (order / np.maximum(points - 1, 1)[owner])[:, None]
        column, row = np.floor(start[owner] + share * (end - start)[owner] + 0.5).astype(int).T
        inside = (column >= 0) & (column < grid.columns) & (row >= 0) & (row < grid.rows)
        masks[element[owner[inside]], row[inside], column[inside]] = True
    return masks if keep_empty else masks[masks.any((1, 2))]


def _clip(
    start: FloatArray, end: FloatArray, element: NDArray[np.int64], grid: BevGrid
) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
    """Cut segments to the grid (Liang and Barsky), so that long ones cost no more than short."""
    low, high = np.zeros(len(start)), np.ones(len(start))
    step = end - start
    for axis, size in enumerate((grid.columns, grid.rows)):
        still = np.abs(step[:, axis]) < 1e-9
        rate = np.where(still, 1.0, step[:, axis])
        at_low = (-0.5 - start[:, axis]) / rate
        at_high = (size - 0.5 - start[:, axis]) / rate
        outside = still & ((start[:, axis] < -0.5) | (start[:, axis] > size - 0.5))
        low = np.where(still, low, np.maximum(low, np.minimum(at_low, at_high)))
        high = np.where(still, high, np.minimum(high, np.maximum(at_low, at_high)))
        high = np.where(outside, -1.0, high)
    kept = low <= high
    first = start[kept] + low[kept, None] * step[kept]
    last = start[kept] + high[kept, None] * step[kept]
    return first, last, element[kept]


def fill_rings(start: FloatArray, end: FloatArray, grid: BevGrid) -> NDArray[np.bool_]:
    """Cells whose centre lies inside closed rings, by winding number.

    Args:
        start: [S, 2] (column, row) in units of cells, cell centres at integers.
        end: [S, 2] the other ends; exteriors counter-clockwise and holes clockwise.
        grid: gives the size.

    Returns:
        [H, W].
    """
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    left = np.minimum(start[:, 0], end[:, 0])
    counts = (high >= 0) & (low < grid.rows) & (left <= grid.columns)
    start, end, low, high = start[counts], end[counts], low[counts], high[counts]
    winding = np.zeros((grid.rows, grid.columns + 1), dtype=np.int64)
    rows = np.arange(grid.rows)[None]
    crosses = (rows >= low[:, None]) & (rows < high[:, None])  # [S, H], half open: each once
    segment, row = np.nonzero(crosses)
    # A share of the way, not a slope: that may overflow where a segment is almost level.
    share = (row - start[segment, 1]) / (end[segment, 1] - start[segment, 1])
    column = start[segment, 0] + share * (end[segment, 0] - start[segment, 0])
    first_right = np.clip(np.ceil(column), 0, grid.columns).astype(np.int64)
    direction = np.where(end[segment, 1] > start[segment, 1], -1, 1)
    np.add.at(winding, (row, first_right), direction)
    return np.cumsum(winding, axis=1)[:, :-1] != 0
