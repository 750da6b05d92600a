"""Decisions of plans whose decision is plain."""

import numpy as np
import pytest

from odvla.language.decisions import all_decisions, decision_of, meta_action_of


def driven(speeds, turn=0.0):
    """Positions of a car with a speed (metres in 0.5 s) a step that turns by so much each step."""
    headings = turn * np.arange(1, 7)
    steps = np.array(speeds)[:, None] * np.stack([-np.sin(headings), np.cos(headings)], 1)
    return steps.cumsum(0)


@pytest.mark.parametrize(
    ("plan", "last_step", "decision"),
    [
        (driven([4.0] * 6), 4.0, "keep the speed, go straight."),
        (driven([4, 4.5, 5, 5.5, 6, 6.5]), 4.0, "speed up, go straight."),
        (driven([4, 3.5, 3, 2.5, 2, 1.5]), 4.0, "slow down, go straight."),
        (driven([4, 3, 2, 1, 0, 0]), 4.0, "stop, go straight."),
        (driven([0.0] * 6), 0.0, "stop, go straight."),
        (driven([3.0] * 6, 0.2), 3.0, "keep the speed, turn left."),
        (driven([3.0] * 6, -0.2), 3.0, "keep the speed, turn right."),
        (driven([0, 0, 1, 2, 3, 3], 0.01), 0.0, "speed up, go straight."),
    ],
)
def test_plain_plans(plan, last_step, decision):
    assert decision_of(plan, (0.0, last_step)) == decision
    assert decision in all_decisions()


def sideways(x_m, *, ends_m=None):
    """4 m a step to the front, and steadily to x_m at the side; at the end elsewhere."""
    plan = np.stack([np.linspace(0, x_m, 7)[1:], np.arange(1, 7) * 4.0], axis=1)
    plan[-1, 0] = x_m if ends_m is None else ends_m
    return plan


@pytest.mark.parametrize(
    ("plan", "last_step", "action"),
    [
        (driven([4.0] * 6), 4.0, "move forward with a constant speed."),
        (driven([4.0] * 5 + [4.45]), 4.0, "move forward with a constant speed."),
        (driven([4.0] * 5 + [4.6]), 4.0, "move forward with an acceleration."),
        (driven([4.0] * 5 + [7.9]), 4.0, "move forward with an acceleration."),
        (driven([4.0] * 5 + [8.1]), 4.0, "move forward with a quick acceleration."),
        (driven([4.0] * 5 + [3.4]), 4.0, "move forward with a deceleration."),
        (driven([4.0] * 5 + [1.9]), 4.0, "move forward with a quick deceleration."),
        (driven([4.0] * 5 + [0.4]), 4.0, "move forward with a deceleration to zero."),
        (driven([0.4] * 6), 0.4, "stop."),
        (driven([0.0] * 5 + [0.6]), 0.0, "move forward with a quick acceleration."),
        (sideways(1.9), 4.0, "move forward with a constant speed."),
        (sideways(3.9), 4.0, "change lane to right with a constant speed."),
        (sideways(-2.1), 4.0, "change lane to left with a constant speed."),
        (sideways(4.1), 4.0, "turn right with a constant speed."),
        (sideways(-4.1), 4.0, "turn left with a constant speed."),
        # It swings out to the right by more than 2 m and ends beside where it began.
        (sideways(3.0, ends_m=0.1), 4.4, "change lane to right with a constant speed."),
    ],
)
def test_meta_actions_of_gpt_driver(plan, last_step, action):
    assert meta_action_of(plan, (0.0, last_step)) == action
    assert action in all_decisions("gpt_driver")


@pytest.mark.parametrize(("whose", "count"), [("odvla", 12), ("gpt_driver", 31)])
def test_no_decision_is_the_beginning_of_another(whose, count):
    texts = all_decisions(whose)
    assert len(set(texts)) == len(texts) == count
    assert not [a for a in texts for b in texts if a != b and b.startswith(a)]
