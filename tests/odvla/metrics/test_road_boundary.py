"""Leaving the drivable area: closed forms, and polygons."""

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon, box

from odvla.metrics.collisions import corners, ego_boxes, headings
from odvla.metrics.road_boundary import leaves_road
from odvla.types import BevGrid

GRID = BevGrid(-50.0, -50.0, 0.1, 1000, 1000)


def _road(x_min, x_max):
    """Drivable between two x [1, 1000, 1000]."""
    x = GRID.x_min_m + (np.arange(GRID.columns) + 0.5) * GRID.cell_m
    return torch.from_numpy(np.tile((x > x_min) & (x < x_max), (GRID.rows, 1)))[None]


def _line(x, y):
    return torch.stack([torch.tensor(x), torch.tensor(y)], -1)[None].double()


def test_a_straight_plan_leaves_where_its_side_crosses_the_edge():
    """The car is 1.85 m wide; it drives along x = 0, and the road ends at x = 0.9 or 1.1."""
    plan = _line([0.0] * 6, [2.0 * k for k in range(1, 7)])
    assert not leaves_road(plan, _road(-5, 1.1), GRID).any()
    # Off at t0 already: not counted.
    assert not leaves_road(plan, _road(-5, 0.7), GRID).any()
    # The fourth step moves right by 1 m; later ones count as well, wherever they are.
    aside = _line([0.0, 0, 0, 1.0, 0, 0], [2.0 * k for k in range(1, 7)])
    assert leaves_road(aside, _road(-5, 1.5), GRID)[0].tolist() == [False] * 3 + [True] * 3


def test_what_lies_beyond_the_raster_is_not_judged():
    far = _line([0.0] * 6, [20.0 * k for k in range(1, 7)])
    assert not leaves_road(far, _road(-5, 5), GRID).any()


@pytest.mark.parametrize("seed", range(4))
def test_turned_cars_are_judged_as_polygons_are(seed):
    random = np.random.default_rng(seed)
    steps = random.normal([0.3, 4.0], [1.0, 1.0], (40, 6, 2))
    plans = torch.from_numpy(steps.cumsum(1))
    edge_m = 3.0
    road = _road(-50, edge_m).expand(40, -1, -1)
    found = leaves_road(plans, road, GRID)
    outside = box(edge_m, -50, 50, 50)
    cars = corners(ego_boxes(plans, headings(plans))).numpy()
    gone = np.zeros((40, 6), dtype=bool)
    depth = np.zeros((40, 6))
    for k in range(40):
        for step in range(6):
            gone[k, step] = Polygon(cars[k, step]).intersects(outside)
            depth[k, step] = cars[k, step, :, 0].max() - edge_m
    # A corner that crosses by less than a cell may be missed.
    clear = (np.abs(depth) > 0.15).all(1)
    assert clear.sum() > 20
    expected = np.maximum.accumulate(gone, axis=1)
    assert found.numpy()[clear].tolist() == expected[clear].tolist()
    assert 0 < expected[clear].mean() < 1
