"""The approximations of closed-loop scores, on hand-made traffic."""

import math
from dataclasses import replace

import pytest
import torch

from odvla.metrics.driving import Surroundings, judge

STEPS = torch.arange(1, 7, dtype=torch.float64)


def straight(speed_mps=6.0):
    """A car that drives straight on: [1, 6, 2]."""
    return torch.stack([torch.zeros(6), STEPS * 0.5 * speed_mps], -1)[None].double()


def around(box=None, moving_mps=0.0, speed_mps=6.0):
    """An empty road, or one other car that moves along +y from (x, y) at t0."""
    times = torch.arange(7) * 0.5
    boxes = torch.zeros(1, 7, 1, 7, dtype=torch.float64)
    boxes[..., 2], boxes[..., 3], boxes[..., 4] = 1.9, 4.5, math.pi / 2
    if box is not None:
        boxes[0, :, 0, 0] = box[0]
        boxes[0, :, 0, 1] = box[1] + times * moving_mps
        boxes[..., 6] = moving_mps
    driven = torch.stack([torch.full((6,), 10.0), STEPS * 0.5 * speed_mps], -1)[None].double()
    return Surroundings(
        boxes=boxes,
        mask=torch.full((1, 7, 1), box is not None),
        instance=torch.zeros(1, 7, 1, dtype=torch.int64),
        driven=driven,
        recorded=torch.ones(1, 6, dtype=torch.bool),
        last_steps=torch.tensor([[[0.0, 0.5 * speed_mps]] * 2], dtype=torch.float64),
    )


def scores(plan, surroundings):
    return {name: value.item() for name, value in judge(plan, surroundings).as_rows().items()}


def test_an_empty_road_is_driven_perfectly():
    found = scores(straight(), replace(around(), driven=straight()))
    assert math.isnan(found.pop("drivable_area"))  # there is no map
    assert set(found.values()) == {1.0}


def test_running_into_somebody_is_at_fault_and_being_run_into_is_not():
    parked = scores(straight(), around((0.0, 15.0)))
    assert parked["no_fault_collision"] == parked["composite"] == 0.0
    from_behind = scores(straight(2.0), around((0.0, -8.0), moving_mps=8.0, speed_mps=2.0))
    assert from_behind["no_fault_collision"] == 1.0
    standing = scores(torch.zeros(1, 6, 2).double(), around((0.0, 15.0), moving_mps=-6.0))
    assert standing["no_fault_collision"] == 1.0


def test_nobody_is_blamed_for_what_the_driven_path_touches():
    blocked = around((0.0, 15.0))
    assert scores(straight(), replace(blocked, driven=straight()))["no_fault_collision"] == 1.0
    at_start = around((0.0, 1.0))
    assert scores(straight(), at_start)["no_fault_collision"] == 1.0
    after = replace(blocked, recorded=torch.zeros(1, 6, dtype=torch.bool))
    assert scores(straight(), after)["no_fault_collision"] == 1.0


def test_time_to_collision_looks_ahead():
    # The last step ends at 18 m, front bumper at 20.54 m; in 0.9 s it would be at 25.94 m.
    near = scores(straight(), around((0.0, 27.0)))  # rear bumper at 24.75 m
    far = scores(straight(), around((0.0, 28.5)))  # at 26.25 m
    assert (near["no_fault_collision"], near["time_to_collision"]) == (1.0, 0.0)
    assert far["time_to_collision"] == 1.0
    fleeing = scores(straight(), around((0.0, 9.0), moving_mps=6.0))
    assert fleeing["time_to_collision"] == 1.0


@pytest.mark.parametrize(("change", "fine"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.0), (-1.5, 0.0)])
def test_comfort_bounds_acceleration_and_jerk(change, fine):
    """One step longer or shorter by `change` m than the 3 m before: 4 x that in m/s^2."""
    steps = torch.full((6,), 3.0) + change
    plan = torch.stack([torch.zeros(6), steps.cumsum(0)], -1)[None].double()
    # Jerk of 0.5 m: 4 m/s^3; acceleration 2 m/s^2.
    assert scores(plan, around())["comfort"] == fine


def test_leaving_the_road_is_seen_at_every_corner():
    road = torch.zeros(1, 200, 200, dtype=torch.bool)
    road[:, :, 97:103] = True  # x from -1.5 to 1.5 m
    held = replace(around(), drivable=road)
    assert scores(straight(), held)["drivable_area"] == 1.0
    assert scores(straight() + torch.tensor([0.8, 0.0]), held)["drivable_area"] == 0.0


def test_progress_is_measured_along_the_driven_way():
    held = replace(around(), driven=straight(6.0))
    assert scores(straight(3.0), held)["progress"] == pytest.approx(0.5)
    assert scores(straight(9.0), held)["progress"] == pytest.approx(1.0)
    assert scores(-straight(3.0), held)["progress"] == 0.0
    short = replace(around(), driven=straight(0.2))
    assert scores(torch.zeros(1, 6, 2).double(), short)["progress"] == 1.0
