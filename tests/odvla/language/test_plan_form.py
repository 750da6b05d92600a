"""Every form of a plan says the same, as exactly as its decimals allow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.fake_batch import fake_tokenizer
from odvla.language.grammar import Range, plan_grammar
from odvla.language.prompts import Dialect
from odvla.language.waypoints import (
    PlanForm,
    Waypoints,
    format_future,
    format_waypoints,
    median_plan,
    parse_future,
    parse_waypoints,
)

FORMS = [PlanForm(values, n) for values in ("points", "offsets", "changes") for n in (1, 2)]
POSITIONS = arrays(np.float64, (6, 2), elements=st.floats(-40, 40))
STEP = arrays(np.float64, (2,), elements=st.floats(-9, 9))


@pytest.mark.parametrize("form", FORMS)
@given(plan=POSITIONS, last_step=STEP)
def test_every_form_reads_back_to_the_rounded_plan(form, plan, last_step):
    read = parse_waypoints(format_waypoints(plan, form, last_step), form, last_step)
    assert isinstance(read, Waypoints)
    # Half of the last decimal, however many steps have been added up.
    assert np.abs(read.xy - plan).max() <= 0.5 * 10.0**-form.decimals + 1e-9


@given(plan=POSITIONS, decimals=st.sampled_from([1, 2]))
def test_futures_have_as_many_decimals_as_asked_for(plan, decimals):
    read = parse_future(format_future(plan, decimals=decimals), decimals)
    assert isinstance(read, Waypoints)
    assert np.abs(read.xy - plan).max() <= 0.5 * 10.0**-decimals + 1e-9


def test_the_median_plan_is_the_median_of_each_coordinate():
    rng = np.random.default_rng(0)
    plans = rng.normal(size=(7, 6, 2)).cumsum(1) * 3
    form, step = PlanForm("changes", 1), (0.2, 3.0)
    texts = [format_waypoints(plan, form, step) for plan in plans]
    read = parse_waypoints(median_plan([*texts, "no plan"], form, step), form, step)
    assert isinstance(read, Waypoints)
    # Each plan is a decimetre's rounding off, and so is the text of their median.
    np.testing.assert_allclose(read.xy, np.median(plans, axis=0), atol=0.1 + 1e-9)
    assert median_plan(["nothing", "to read"], form, step) == "nothing"


def test_driving_on_is_a_repeated_step_and_no_change():
    plan = np.stack([np.zeros(6), 2.5 * np.arange(1, 7)], -1)
    assert format_waypoints(plan, PlanForm("offsets")).count("(0.00,2.50)") == 6
    assert format_waypoints(plan, PlanForm("changes", 1), (0.0, 2.5)).count("(0.0,0.0)") == 6


@given(step=STEP)
def test_driving_on_is_no_change_at_any_speed(step):
    plan = step * np.arange(1, 7)[:, None]
    text = format_waypoints(plan, PlanForm("changes", 1), step)
    assert text.count("(0.0,0.0)") == 6


def test_a_conversation_tells_its_form():
    for form in FORMS:
        assert PlanForm.from_meta(form.as_meta()) == form


def test_shipped_dialects_write_points_and_changes():
    assert Dialect("odvla").plan_form == PlanForm("points", 2)
    assert Dialect("compact").plan_form == PlanForm("changes", 1)


def test_the_grammar_of_one_decimal_holds_its_plans_and_no_others():
    tokenizer = fake_tokenizer(vocab_size=500)
    bounds = Range(-1.3, 2.0)
    grammar = plan_grammar(tokenizer, bounds, bounds, decimals=1)
    for tenths in range(-30, 31):
        plan = np.full((6, 2), tenths / 10)
        text = format_waypoints(plan, PlanForm("points", 1))
        accepted = grammar.accepts([*tokenizer.text_ids(text), tokenizer.end_id])
        assert accepted == (-13 <= tenths <= 20), tenths
    two_decimals = format_waypoints(np.ones((6, 2)))
    assert not grammar.accepts([*tokenizer.text_ids(two_decimals), tokenizer.end_id])
