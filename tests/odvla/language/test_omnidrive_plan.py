"""OmniDrive's plans: written as its loader writes them, read strictly."""

import numpy as np
import pytest

from odvla.language.omnidrive_plan import format_rear_axle_plan, parse_rear_axle_plan
from odvla.language.waypoints import ParseFailure


def test_numbers_carry_signs_and_small_ones_are_zero():
    points = [
        [4.5, 0.0],
        [9.018, -0.004],
        [13.5, 0.0149],
        [-0.01, 0.0151],
        [1e2, -2.5],
        [0.02, -0.02],
    ]
    assert format_rear_axle_plan(points) == (
        "[PT, (+4.50, 0.0), (+9.02, 0.0), (+13.50, 0.0), (0.0, +0.02), (+100.00, -2.50), "
        "(+0.02, -0.02)]"
    )


def test_what_is_written_is_read():
    rng = np.random.default_rng(1)
    for _ in range(50):
        points = rng.normal(0, 10, (6, 2))
        text = f"Here is the planning trajectory {format_rear_axle_plan(points)}."
        read = parse_rear_axle_plan(text)
        assert np.abs(read - points).max() <= 0.0151  # what rounds to a centimetre is 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I slow down.", "no [PT"),
        ("[PT, (+1.00, 0.0), (+2.00, 0.0)]", "2 points instead of 6"),
        ("[PT, (+1.00, 0.0), (+2.00)]", "no [PT"),
        ("[PT, (1, 2)]", "no [PT"),
        ("[PT" + ", (+1.\u0660, 0.0)" * 6 + "]", "no [PT"),  # an Arabic zero
        ("[PT, (+1.00, 0.0)" + ", (+1.00, 0.0)" * 5, "no [PT"),
    ],
)
def test_what_is_no_plan_is_named(text, reason):
    found = parse_rear_axle_plan(text)
    assert isinstance(found, ParseFailure)
    assert reason in found.reason


def test_only_plans_are_written():
    for points in ([[0.0, 0.0]] * 5, [[np.nan, 0.0]] * 6):
        with pytest.raises(ValueError, match="6 x 2 finite numbers"):
            format_rear_axle_plan(points)
