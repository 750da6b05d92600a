"""Decisions of plans whose decision is plain."""

import numpy as np
import pytest

from odvla.language.decisions import all_decisions, decision_of


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


def test_no_decision_is_the_beginning_of_another():
    texts = all_decisions()
    assert len(set(texts)) == len(texts) == 12
    assert not [a for a in texts for b in texts if a != b and b.startswith(a)]
