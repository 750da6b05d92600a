"""The grammars hold all trajectories in range and nothing else, for two tokenizers."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.grammar import Range, future_grammar, plan_grammar
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import (
    Waypoints,
    format_future,
    format_waypoints,
    parse_future,
    parse_waypoints,
)

X, Y = Range(-12.34, 7.0), Range(-0.05, 61.5)


@pytest.fixture(scope="module", params=["trained", "qwen"])
def tokenizer(request):
    if request.param == "trained":
        return fake_tokenizer(vocab_size=500)
    folder = request.getfixturevalue("shared") / "tokenizer" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not in ../shared")
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return plan_grammar(tokenizer, X, Y), future_grammar(tokenizer, X, Y)


def random_walk(grammar, chooser):
    """Ids of a random whole text; every state on the way must have a way on."""
    state, ids = grammar.start, []
    while state != grammar.end_state:
        columns = (grammar.next_state[state] >= 0).nonzero()[:, 0].tolist()
        assert columns
        column = chooser.choice(columns)
        ids.append(int(grammar.token_ids[column]))
        state = int(grammar.next_state[state, column])
    return ids


def test_whatever_is_written_reads_back_within_range(tokenizer, grammars):
    chooser = random.Random(0)
    for grammar, parse, form in (
        (grammars[0], parse_waypoints, format_waypoints),
        (grammars[1], parse_future, format_future),
    ):
        for _ in range(60):
            text = tokenizer.decode(random_walk(grammar, chooser))
            read = parse(text)
            assert isinstance(read, Waypoints), text
            rest = () if form is format_waypoints else (read.known,)
            assert form(read.xy, *rest) == text
            x, y = read.xy[read.known].T
            assert ((x >= -12.34) & (x <= 7.0) & (y >= -0.05) & (y <= 61.5)).all()


def test_every_state_is_used_or_at_least_never_a_dead_end(grammars):
    for grammar in grammars:
        seen, front = {grammar.start}, [grammar.start]
        while front:
            state = front.pop()
            after = set(grammar.next_state[state].tolist()) - {-1} - seen
            assert (grammar.next_state[state] >= 0).any()
            seen |= after
            front += after
        assert grammar.end_state in seen


def test_every_plan_in_range_may_be_written(tokenizer, grammars):
    @given(
        arrays(np.float64, (6,), elements=st.floats(-12.34, 7.0)),
        arrays(np.float64, (6,), elements=st.floats(-0.05, 61.5)),
        arrays(np.bool_, (6,)),
    )
    def check(x, y, known):
        xy = np.stack([x, y], 1)
        plan, future = format_waypoints(xy), format_future(xy, known)
        assert grammars[0].accepts([*tokenizer.text_ids(plan), tokenizer.end_id])
        assert grammars[1].accepts([*tokenizer.text_ids(future), tokenizer.end_id])

    check()


@pytest.mark.parametrize(
    ("old", "new"),
    [("1.00", "7.01"), ("1.00", "-12.35"), ("1.00", "-0.00"), ("1.00", "01.00"), ("1.00", "1.0")],
)
def test_what_is_out_of_range_or_form_may_not_be_written(tokenizer, grammars, old, new):
    good = format_waypoints([[1, 2]] * 6)
    assert grammars[0].accepts([*tokenizer.text_ids(good), tokenizer.end_id])
    assert not grammars[0].accepts(tokenizer.text_ids(good))  # the end is missing
    bad = good.replace(old, new, 1)
    assert not grammars[0].accepts([*tokenizer.text_ids(bad), tokenizer.end_id])


def test_a_range_without_zero_is_refused():
    with pytest.raises(UserError, match="must include 0"):
        Range(1.0, 5.0)
    with pytest.raises(UserError, match=r"99\.99"):
        Range(0.0, 100.0)
