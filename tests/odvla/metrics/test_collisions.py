"""Box against box and turned boxes, against shapely and closed forms."""

import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla.metrics.collisions import (
    Traffic,
    boxes_touch,
    collisions,
    corners,
    headings,
    inside_boxes,
    turned_box_hits,
)
from odvla.metrics.protocol import PRESETS, ProtocolCard


@given(st.integers(0, 10_000))
def test_boxes_touch_where_shapely_says_so(seed):
    rng = np.random.default_rng(seed)
    ego, others = (
        torch.from_numpy(
            np.concatenate(
                [
                    rng.uniform(-6, 6, (n, 2)),
                    rng.uniform(0.5, 5, (n, 2)),
                    rng.uniform(-4, 4, (n, 1)),
                ],
                axis=1,
            )
        )
        for n in (1, 8)
    )
    found = boxes_touch(ego, others[None])[0]
    mine = shapely.Polygon(corners(ego)[0].numpy())
    for box, touch in zip(others, found.tolist(), strict=True):
        theirs = shapely.Polygon(corners(box).numpy())
        if mine.distance(theirs) > 1e-9 or mine.intersection(theirs).area > 1e-9:
            assert touch == mine.intersects(theirs)
    point = torch.from_numpy(rng.uniform(-6, 6, (1, 2)))
    within = inside_boxes(point, others[None])[0]
    for box, inside in zip(others, within.tolist(), strict=True):
        assert inside == shapely.Polygon(corners(box).numpy()).covers(shapely.Point(*point[0]))


def test_heading_follows_the_path_and_keeps_still_with_the_car():
    plan = torch.tensor(
        [[[0.0, 0.1], [1.0, 0.1], [1.05, 0.1], [1.05, 2.0], [0.0, 2.0], [0.0, 2.0]]]
    )
    expected = [math.pi / 2, 0.0, 0.0, math.pi / 2, math.pi, math.pi]
    torch.testing.assert_close(headings(plan)[0], torch.tensor(expected, dtype=torch.float64))


def test_a_turned_car_reaches_to_its_sides():
    plan = torch.zeros(1, 6, 2)
    plan[0, :, 0] = torch.arange(1, 7) * 5.0  # to the right
    raster = torch.zeros(1, 6, 200, 200, dtype=torch.bool)
    # The cell with centre (7.25, 0.25): 2.25 m ahead of the point (5, 0), in the turned car.
    raster[0, 0, 100, 100 - 15] = True
    # (5.25, 2.25): within an unturned car's length, but beside the turned one.
    raster[0, 1, 104, 100 - 11] = True
    assert turned_box_hits(plan, headings(plan), raster)[0].tolist() == [True] + [False] * 5
    fixed = ProtocolCard(l2="value_at_t")
    assert collisions(plan, Traffic(raster), fixed)[0].tolist() == [False] * 6


def test_polygons_are_asked_for_where_the_card_wants_them():
    plan = torch.zeros(1, 6, 2)
    boxes = torch.tensor([0.0, 3.4, 1.0, 2.0, math.pi / 2, 0, 0]).expand(1, 6, 1, 7)
    mask = torch.ones(1, 6, 1, dtype=torch.bool)
    card = PRESETS["sparsedrive"]
    # Front bumper at 0.5 + 2.042 m; their rear at 2.4 m.
    assert collisions(plan, Traffic(boxes=boxes, mask=mask), card).all()
    further = boxes + torch.tensor([0, 0.2, 0, 0, 0, 0, 0])
    assert not collisions(plan, Traffic(boxes=further, mask=mask), card).any()
    assert not collisions(plan, Traffic(boxes=boxes, mask=~mask), card).any()
    with pytest.raises(ValueError, match="need the boxes"):
        collisions(plan, Traffic(), card)
    with pytest.raises(ValueError, match="need the raster"):
        collisions(plan, Traffic(boxes=boxes, mask=mask), PRESETS["uniad"])
