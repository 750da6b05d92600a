"""Overlap is the area that polygons share, by shapely and by hand; its gradient pushes apart."""

import math

import pytest
import shapely
import torch

from odvla.errors import UserError
from odvla.losses.collision import CollisionLossConfig, collision_loss, overlap_areas
from odvla.metrics.collisions import EGO_FORWARD_SHIFT_M, EGO_LENGTH_M, EGO_WIDTH_M, corners
from odvla.types import TrafficTargets

FORWARD = math.pi / 2
NORTH = torch.stack([torch.zeros(6), 5.0 * torch.arange(1, 7)], -1)[None]  # straight on, 10 m/s
KNOWN = torch.ones(1, 6, dtype=torch.bool)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = boxes([-3, -3, 0.3, 0.3, -4]), boxes([3, 3, 4, 6, 4])
    return low + torch.rand(count, 5, generator=generator, dtype=torch.float64) * (high - low)


def by_shapely(one, other):
    def shapes(rectangles):
        return [shapely.Polygon(ring) for ring in corners(rectangles).detach().tolist()]

    pairs = zip(shapes(one), shapes(other), strict=True)
    return torch.tensor([a.intersection(b).area for a, b in pairs], dtype=torch.float64)


def test_areas_are_those_of_polygons():
    one, other = random_boxes(2000, 0), random_boxes(2000, 1)
    expected = by_shapely(one, other)
    assert 0.2 < (expected > 0).double().mean() < 0.95
    torch.testing.assert_close(overlap_areas(one, other), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(overlap_areas(other, one), expected, atol=1e-5, rtol=0)


def test_areas_by_hand():
    car = [0.0, 0.0, 2.0, 4.0, FORWARD]
    pairs = {
        8.0: [(0, 0, 2, 4, FORWARD), (0, 0, 2, 4, -FORWARD), (0, 0, 4, 2, 0)],  # the same places
        1.0: [(0, 0, 1, 1, 0.3), (1.5, 3.0 - 2.0, 2, 2, 0), (0.5, 0, 1, 1, 0)],
        0.0: [(2, 0, 2, 4, FORWARD), (0, 4, 2, 4, FORWARD), (9, 9, 2, 4, 1)],  # side by side, away
        # A diamond's corner that reaches half a metre over the side.
        0.25: [(1 + math.sqrt(0.5) - 0.5, 0, 1, 1, math.pi / 4)],
    }
    for area, others in pairs.items():
        for other in others:
            found = overlap_areas(boxes(car), boxes(other))
            assert found.item() == pytest.approx(area, abs=1e-5), other


def test_the_gradient_is_that_of_the_area():
    one, other = random_boxes(300, 2).requires_grad_(), random_boxes(300, 3)
    overlap_areas(one, other).sum().backward()
    step = 1e-5
    for column in range(5):
        move = torch.zeros(5, dtype=torch.float64)
        move[column] = step
        with torch.no_grad():
            slope = (by_shapely(one + move, other) - by_shapely(one - move, other)) / (2 * step)
        smooth = (slope - one.grad[:, column]).abs() < 1e-3
        assert smooth.double().mean() > 0.99  # but where a corner meets a side


def traffic(*rows, steps):
    found = torch.tensor([rows], dtype=torch.float32)
    return TrafficTargets(found, torch.tensor([steps]), torch.ones(1, len(rows), dtype=torch.bool))


def at_step(step, to_the_right=0.0):
    """A car of the ego's own size where the ego will be, half a length ahead."""
    y = 5.0 * (step + 1) + EGO_FORWARD_SHIFT_M + EGO_LENGTH_M / 2
    return (to_the_right, y, EGO_WIDTH_M, EGO_LENGTH_M, FORWARD)


def test_the_loss_by_hand():
    others = traffic(at_step(1), at_step(4), steps=[1, 4])
    config = CollisionLossConfig(1.0, (0.0, 0.5, 1.0), (1.0, 0.4, 0.1))
    expected = sum(
        weight * 2 * EGO_WIDTH_M * (EGO_LENGTH_M / 2 + inflation / 2)
        for inflation, weight in ((0.0, 1.0), (0.5, 0.4), (1.0, 0.1))
    )
    plans = NORTH.clone().requires_grad_()
    found = collision_loss(plans, NORTH, KNOWN, others, config)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    # A metre further on shares a car's width more, at each of the two steps and no other.
    slope = torch.zeros(1, 6)
    slope[0, [1, 4]] = EGO_WIDTH_M * 1.5
    torch.testing.assert_close(plans.grad[..., 1], slope, atol=1e-4, rtol=1e-4)
    # The same boxes at other times are in nobody's way.
    elsewhere = traffic(at_step(1), at_step(4), steps=[4, 1])
    assert collision_loss(NORTH, NORTH, KNOWN, elsewhere, config).item() == 0.0
    # A step that is not known does not count, nor does what fills up.
    known = KNOWN.clone()
    known[0, 4:] = False
    driven = NORTH.clone()
    driven[0, 4:] = torch.nan
    half = collision_loss(plans, driven, known, others, config)
    assert half.item() == pytest.approx(expected / 2, rel=1e-5)
    plans.grad = None
    half.backward()
    assert plans.grad.isfinite().all()


def test_a_car_beside_in_a_bend_is_no_collision():
    """Turned by 45 degrees, upright rectangles around the two would touch."""
    t = torch.arange(1, 7) * 5.0
    turned = torch.stack([t, t], -1)[None] / math.sqrt(2)
    middle = turned[0, 2] + EGO_FORWARD_SHIFT_M / math.sqrt(2)
    right = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    config = CollisionLossConfig(1.0, (0.0,), (1.0,))
    for gap_m, meets in ((2.0, False), (1.7, True)):
        x, y = (middle + gap_m * right).tolist()
        beside = traffic((x, y, EGO_WIDTH_M, EGO_LENGTH_M, math.pi / 4), steps=[2])
        plans = turned.clone().requires_grad_()
        cost = collision_loss(plans, turned, KNOWN, beside, config)
        assert (cost.item() > 0) == meets
        cost.backward()
        # Down the gradient the car moves away, to its left.
        assert (-plans.grad[0, 2] @ right < 0).item() == meets


def test_rows_are_averaged_and_nothing_costs_nothing():
    two = TrafficTargets(
        *(torch.cat([part, part]) for part in vars(traffic(at_step(0), steps=[0])).values())
    )
    two = TrafficTargets(two.boxes, two.step, torch.tensor([[True], [False]]))
    config = CollisionLossConfig(1.0, (0.0,), (1.0,))
    plans, known = NORTH.repeat(2, 1, 1), KNOWN.repeat(2, 1)
    found = collision_loss(plans, plans, known, two, config)
    assert found.item() == pytest.approx(EGO_WIDTH_M * EGO_LENGTH_M / 4, rel=1e-5)
    nobody = TrafficTargets(two.boxes[:, :0], two.step[:, :0], two.mask[:, :0])
    nothing = collision_loss(plans.clone().requires_grad_(), plans, known, nobody, config)
    assert nothing.item() == 0.0
    nothing.backward()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="has a negative number, -1"):
        CollisionLossConfig(-1.0)
    with pytest.raises(UserError, match="has 1 inflations_m and 3 inflation_weights"):
        CollisionLossConfig(1.0, (0.0,))
