"""Waypoints survive the way through text, and nothing else is taken for waypoints."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.language.waypoints import (
    ParseFailure,
    PlanForm,
    Waypoints,
    format_future,
    format_waypoints,
    parse_future,
    parse_waypoints,
    reference_repair,
)

PLANS = arrays(np.float64, (6, 2), elements=st.floats(-500, 500))


@given(PLANS)
def test_reading_what_was_written_gives_the_plan_rounded_to_centimetres(plan):
    text = format_waypoints(plan)
    read = parse_waypoints(text)
    assert isinstance(read, Waypoints)
    assert np.abs(read.xy - plan).max() <= 0.005 + 1e-9
    assert format_waypoints(read.xy) == text
    assert "-0.00" not in text.replace("-0.001", "")


@given(PLANS, arrays(np.bool_, (6,)))
def test_futures_keep_which_points_are_known(plan, known):
    read = parse_future(format_future(plan, known))
    assert isinstance(read, Waypoints)
    assert (read.known == known).all()
    assert np.allclose(read.xy[known], plan[known], atol=0.0051)
    assert np.isnan(read.xy[~known]).all()


def test_the_exact_form():
    plan = [[0.0, 1.5], [-0.004, 3], [0.125, 4.5], [-1, 6], [2, 7.5], [10, 90.999]]
    assert format_waypoints(plan) == (
        "<traj_start>[(0.00,1.50),(0.00,3.00),(0.12,4.50),(-1.00,6.00),(2.00,7.50),(10.00,91.00)]"
        "<traj_end>"
    )


GOOD = format_waypoints(np.arange(12.0).reshape(6, 2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not of the form"),
        (GOOD[:-1], "not of the form"),
        (GOOD + " and more", "not of the form"),
        (GOOD.replace(",(10.00,11.00)", ""), "5 points instead of 6"),
        (GOOD.replace("]", ",(1.00,1.00)]"), "7 points instead of 6"),
        (GOOD.replace("4.00", "4.0"), "a point is malformed"),
        (GOOD.replace("4.00", "nan"), "a point is malformed"),
        (GOOD.replace("4.00", "UN"), "a point is malformed"),
        (GOOD.replace("4.00", "04.00"), "a point is malformed"),
        (GOOD.replace("4.00", "4.\u0660\u0660"), "a point is malformed"),  # Arabic zeros
        (GOOD.replace("4.00", f"{'9' * 400}.00"), "a number is too large"),
        (GOOD.replace("),(", "), (", 1), "a point is malformed"),
    ],
)
def test_anything_else_is_a_failure_with_a_reason(text, reason):
    failure = parse_waypoints(text)
    assert isinstance(failure, ParseFailure)
    assert reason in failure.reason


@pytest.mark.parametrize("plan", [np.zeros((5, 2)), np.full((6, 2), np.nan)])
def test_what_is_no_plan_is_not_written(plan):
    with pytest.raises(ValueError, match="trajectory"):
        format_waypoints(plan)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("[(1.0,2.0),(2.0,3.0)]", [[1, 2], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]),
        ("go to (1, -2.0), then (3, 4).", [[1, -2], [3, 4], [3, 4], [3, 4], [3, 4], [3, 4]]),
        (",".join(["(1.0,2.0)"] * 9), [[1, 2]] * 6),
    ],
)
def test_the_lenient_reader_fills_up_and_cuts(text, points):
    assert reference_repair(text).xy.tolist() == points


@pytest.mark.parametrize(
    ("text", "reason"), [("no numbers here", "no pair"), ("(1.0,-)", "number is malformed")]
)
def test_the_lenient_reader_names_what_it_cannot_read(text, reason):
    failure = reference_repair(text)
    assert isinstance(failure, ParseFailure)
    assert reason in failure.reason


def test_the_lenient_reader_is_the_reference_on_every_recorded_text(shared):
    cases = json.loads((shared / "golden" / "i_retrieve_traj.json").read_text())
    assert len(cases) > 80
    for case in cases:
        read = reference_repair(case["input"])
        if "output" in case:
            assert isinstance(read, Waypoints), case
            assert np.allclose(read.xy, case["output"]), case
        else:
            assert isinstance(read, ParseFailure), case
            assert read.exception == case["exception"], case


@given(PLANS)
def test_zeros_may_keep_their_sign(plan):
    form = PlanForm(signed_zero=True)
    text = format_waypoints(plan, form)
    numbers = [number for point in plan for number in point]
    assert text == (
        "<traj_start>["
        + ",".join(f"({x:.2f},{y:.2f})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
        + "]<traj_end>"
    )
    read = parse_waypoints(text, form)
    assert format_waypoints(read.xy, form) == text
    assert PlanForm.from_meta(form.as_meta()) == form
