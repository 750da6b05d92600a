"""Plans as steps say the same as plans as points."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.language.prompts import Dialect
from odvla.language.waypoints import Waypoints, format_waypoints, parse_waypoints


@given(arrays(np.float64, (6, 2), elements=st.floats(-40, 40)))
def test_steps_and_points_read_back_the_same(plan):
    steps = parse_waypoints(format_waypoints(plan, "steps"), "steps")
    points = parse_waypoints(format_waypoints(plan), "points")
    assert isinstance(steps, Waypoints)
    assert isinstance(points, Waypoints)
    np.testing.assert_allclose(steps.xy, points.xy, atol=1e-9)


def test_a_steady_drive_repeats_one_step():
    plan = np.stack([np.zeros(6), 2.5 * np.arange(1, 7)], -1)
    assert format_waypoints(plan, "steps").count("(0.00,2.50)") == 6


def test_the_paper_writes_points():
    assert Dialect("reference").plan_form == "points"
    assert Dialect("compact").plan_form == "steps"
