"""Rasters of road users against a slow test of every cell."""

import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.agents import boxes_in_lidar, rows_of
from datamodules.index_file import load_index
from datamodules.nuscenes import NuScenesDataConfig
from datamodules.occupancy import (
    OCCUPANCY_GRID,
    FrameOccupancy,
    box_corners,
    metric_orientation,
    occupancy,
)
from odvla.metrics.collisions import box_hits
from odvla.types import DETECTION_CLASSES, BevGrid

GRID = BevGrid(-6.0, -5.0, 0.5, 20, 24)
BOX = st.tuples(
    st.floats(-8, 8), st.floats(-7, 7), st.floats(0.3, 3), st.floats(0.3, 9), st.floats(-4, 4)
)


def _boxes(values):
    boxes = np.zeros((len(values), 9))
    boxes[:, [0, 1, 3, 4, 6]] = np.array(values).reshape(-1, 5)
    return boxes


def _centres(grid):
    x = grid.x_min_m + (np.arange(grid.columns) + 0.5) * grid.cell_m
    y = grid.y_min_m + (np.arange(grid.rows) + 0.5) * grid.cell_m
    return np.meshgrid(x, y)


@settings(max_examples=30)
@given(st.lists(BOX, max_size=4))
def test_exact_filling_agrees_with_polygons(values):
    boxes = _boxes(values)
    filled = occupancy([boxes, boxes[:0], boxes[:1]], GRID, fill="exact")
    x, y = _centres(GRID)
    for step, own in enumerate((boxes, boxes[:0], boxes[:1])):
        slow = np.zeros(filled[step].shape, bool)
        edge = np.zeros_like(slow)
        for corners in box_corners(own):
            polygon = shapely.Polygon(corners)
            slow |= shapely.contains_xy(polygon, x, y)
            edge |= shapely.distance(polygon.exterior, shapely.points(x, y)) < 1e-9
        np.testing.assert_array_equal(filled[step] & ~edge, slow & ~edge)


# Inside the grid: where OpenCV cuts a polygon at the border of the picture, it bends its edges.
INNER = st.tuples(
    st.floats(-2, 2), st.floats(-2, 2), st.floats(0.3, 2), st.floats(0.3, 4), st.floats(-4, 4)
)


@settings(max_examples=30)
@given(st.lists(INNER, max_size=4))
def test_reference_filling_is_the_rounded_polygon_with_its_border(values):
    boxes = _boxes(values)
    (filled,) = occupancy([boxes], GRID)
    column, row = np.meshgrid(np.arange(GRID.columns), np.arange(GRID.rows))
    points = shapely.points(column, row)
    away, deep = np.full(filled.shape, np.inf), np.zeros(filled.shape)
    for corners in box_corners(boxes):
        rounded = np.round((corners - [GRID.x_min_m, GRID.y_min_m]) / GRID.cell_m)
        polygon = shapely.convex_hull(shapely.MultiPoint(rounded))
        outside = shapely.distance(polygon, points)
        away = np.minimum(away, outside)
        if polygon.geom_type == "Polygon":
            inside = shapely.distance(polygon.exterior, points) * (outside == 0)
            deep = np.maximum(deep, inside)
    # The border itself is drawn as OpenCV draws lines, to the nearest cell.
    assert filled[deep > 0.5].all()
    assert not filled[away > 1.01].any()


def test_overlapping_boxes_leave_no_hole():
    boxes = _boxes([(0, 0, 3, 4, 0.0), (0.5, 0, 3, 4, 0.3)])
    (both,) = occupancy([boxes], GRID)
    (one,), (other,) = occupancy([boxes[:1]], GRID), occupancy([boxes[1:]], GRID)
    np.testing.assert_array_equal(both, one | other)


def test_orientation_of_the_metric():
    """A box ahead and to the right: high row; low column, as the metric counts from the right."""
    (cells,) = metric_orientation(occupancy([_boxes([(20, 30, 2, 2, 0.0)])]))
    row, column = np.argwhere(cells).mean(0)
    # Cell 0 lies at -49.75 m, in y and in -x; the reference's rounding moves boxes a quarter metre.
    assert -49.75 + 0.5 * row == pytest.approx(30.25, abs=0.01)
    assert -49.75 + 0.5 * column == pytest.approx(-20.25, abs=0.01)


def test_the_metric_hits_what_stands_there(shared):
    """The metric's own box of the car on recorded paths: cells of that box are hit, others not."""
    arrays = np.load(shared / "golden" / "h_planning_metric.npz")
    plans = torch.from_numpy(arrays["gt"]).float()
    size = (1.85, 4.084)

    def hit(plan, box):
        cells = metric_orientation(occupancy([_boxes([box])], fill="exact"))
        raster = torch.from_numpy(cells.copy())[None]
        return bool(box_hits(plan.reshape(1, 1, 2), raster)[0, 0])

    compared = 0
    for plan in plans[::9].reshape(-1, 2):
        x, y = plan.tolist()
        if max(abs(x), abs(y)) < 40:
            compared += 1
            assert hit(plan, (x, y + 0.5, *size, math.pi / 2))
            assert not hit(plan, (x + 4, y + 0.5, *size, math.pi / 2))
            assert not hit(plan, (x, y + 6.5, *size, math.pi / 2))
    assert compared > 10


def test_rasters_are_kept_and_forgotten(circle_root):
    index = load_index(circle_root, "v1.0-mini")
    rasters = FrameOccupancy(index, keep=2)
    first = rasters(index.frames[1])
    np.testing.assert_array_equal(rasters(index.frames[1]), first)
    rasters(index.frames[1], pedestrians=True)
    rasters(index.frames[2])
    assert len(rasters._kept) == 2
    np.testing.assert_array_equal(rasters(index.frames[1]), first)


def test_occupancy_covers_boxes_where_they_will_be(circle_root):
    data = NuScenesDataConfig(str(circle_root)).build()
    index = data.index
    frame = index.frames[1]
    vehicles = data.occupancy(frame.token).numpy()
    everyone = data.occupancy(frame.token, pedestrians=True).numpy()
    assert vehicles.shape == (6, 200, 200)
    assert (everyone >= vehicles).all()
    assert everyone.sum() > vehicles.sum()
    grid = OCCUPANCY_GRID
    for step in range(6):
        later = index.frames[2 + step]
        rows = rows_of(index, later)
        names = [DETECTION_CLASSES[k] if k >= 0 else "" for k in index.annotations.label[rows]]
        boxes = boxes_in_lidar(index, rows, frame)
        expected_area = 0.0
        for box, name in zip(boxes, names, strict=True):
            column = int((box[0] - grid.x_min_m) / grid.cell_m)
            row = int((box[1] - grid.y_min_m) / grid.cell_m)
            if 0 <= column < 200 and 0 <= row < 200 and name in ("car", "truck"):
                assert vehicles[step, row, column]
                expected_area += box[3] * box[4] / grid.cell_m**2
        # Filled with their border: somewhat more cells than the boxes' area.
        assert expected_area < vehicles[step].sum() < 2 * expected_area
    assert not data.occupancy(index.frames[8].token).any()  # the scene ends


def test_traffic_is_where_the_annotations_of_each_step_are(circle_root):
    data = NuScenesDataConfig(str(circle_root), targets=("traffic",), batch_size=4).build()
    data.setup("fit")
    index, scenes = data.index, data.scenes("train")
    batch = next(iter(data.train_dataloader()))
    assert batch.agents == ()
    for row, token in batch.valid_rows():
        frame = index.frame(token)
        for step in range(6):
            later = frame.number + step + 1
            ended = not any(s.first <= frame.number and later < s.last for s in scenes)
            here = batch.traffic.mask[row] & (batch.traffic.step[row] == step)
            found = batch.traffic.boxes[row][here]
            if ended:
                assert len(found) == 0
                continue
            rows = rows_of(index, index.frames[later])
            rows = rows[index.annotations.label[rows] >= 0]
            expected = boxes_in_lidar(index, rows, frame)[:, [0, 1, 3, 4, 6]]
            assert len(expected) > 0
            torch.testing.assert_close(found, torch.from_numpy(expected))
    assert data.frame(batch.clip[-1].sample_tokens[0]).traffic is not None
