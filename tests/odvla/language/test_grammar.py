"""The grammars hold all trajectories in range and nothing else, for four tokenizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.grammar import Range, future_grammar, plan_grammar
from odvla.language.tokenizer import CONTROL_TOKENS, IM_END, ChatTokenizer
from odvla.language.waypoints import (
    PlanForm,
    Waypoints,
    format_future,
    format_waypoints,
    parse_future,
    parse_waypoints,
)

X, Y = Range(-12.34, 7.0), Range(-0.05, 61.5)
SIGNED = PlanForm(signed_zero=True)


class SpelledTags(ChatTokenizer):
    """A tokenizer for which <traj_start> is text like any other."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_id = self.pad_id = tokenizer.get_vocab()[IM_END]
        self._control_ids = frozenset({self.end_id})


def trained_with_spelled_tags():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    plans = np.random.default_rng(0).normal(size=(50, 6, 2)) * 5
    backend.train_from_iterator(map(format_waypoints, plans), trainer)
    backend.decoder = decoders.ByteLevel()
    return SpelledTags(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END))


@pytest.fixture(scope="module", params=["trained", "trained_spelled", "qwen", "qwen_spelled"])
def tokenizer(request):
    if request.param == "trained":
        return fake_tokenizer(vocab_size=500)
    if request.param == "trained_spelled":
        return trained_with_spelled_tags()
    folder = request.getfixturevalue("shared") / "tokenizer" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not in ../shared")
    if request.param == "qwen":
        return ChatTokenizer.load(folder)
    return SpelledTags(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return plan_grammar(tokenizer, X, Y), future_grammar(tokenizer, X, Y)


def walk(grammar, data):
    """Ids of a random whole text; every state on the way must have a way on."""
    state, ids = grammar.start, []
    while state != grammar.end_state:
        tokens = sorted(grammar.steps[state])
        assert tokens
        token = data.draw(st.sampled_from(tokens))
        ids.append(token)
        state = grammar.steps[state][token]
    return ids


def test_whatever_is_written_reads_back_within_range(tokenizer, grammars):
    @given(st.data())
    @settings(max_examples=12, deadline=None)
    def check(data):
        for grammar, parse, form in (
            (grammars[0], parse_waypoints, format_waypoints),
            (grammars[1], parse_future, format_future),
        ):
            ids = walk(grammar, data)
            text = tokenizer.decode(ids)
            assert "".join(grammar.text_of[token] for token in ids) == text
            read = parse(text)
            assert isinstance(read, Waypoints), text
            rest = () if form is format_waypoints else (read.known,)
            assert form(read.xy, *rest) == text
            x, y = read.xy[read.known].T
            assert ((x >= -12.34) & (x <= 7.0) & (y >= -0.05) & (y <= 61.5)).all()

    check()


def test_with_signed_zeros_whatever_is_written_reads_back(tokenizer):
    # A range so narrow that zeros are common; without negative numbers but for -0.00 in y.
    grammar = plan_grammar(tokenizer, Range(-0.01, 0.01), Range(0.0, 0.01), signed_zero=True)
    seen = set()

    @given(st.data())
    @settings(max_examples=12, deadline=None)
    def check(data):
        text = tokenizer.decode(walk(grammar, data))
        read = parse_waypoints(text, SIGNED)
        assert isinstance(read, Waypoints), text
        assert format_waypoints(read.xy, SIGNED) == text
        seen.update(text.split(","))

    check()
    assert "-0.00)" in seen


def test_every_state_is_used_and_none_is_a_dead_end(grammars):
    for grammar in grammars:
        seen, front = {grammar.start}, [grammar.start]
        while front:
            state = front.pop()
            after = set(grammar.steps[state].values()) - seen
            assert grammar.steps[state]
            seen |= after
            front += after
        assert seen == set(range(len(grammar.next_state)))


def test_every_plan_in_range_may_be_written(tokenizer, grammars):
    signed = plan_grammar(tokenizer, X, Y, signed_zero=True)

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
        plan = format_waypoints(xy, SIGNED)
        assert signed.accepts([*tokenizer.text_ids(plan), tokenizer.end_id])

    check()


def test_a_text_may_be_cut_in_any_way(tokenizer, grammars):
    text = format_waypoints(np.arange(12.0).reshape(6, 2) / 2)
    grammar = grammars[0]
    # The shortest tokens everywhere, as no tokenizer would.
    state, ids, rest = grammar.start, [], text
    while rest:
        token = min(
            (t for t in grammar.steps[state] if rest.startswith(grammar.text_of[t])),
            key=lambda t: len(grammar.text_of[t]),
        )
        ids.append(token)
        state, rest = grammar.steps[state][token], rest[len(grammar.text_of[token]) :]
    assert ids != tokenizer.text_ids(text)
    assert grammar.accepts([*ids, tokenizer.end_id])
    assert tokenizer.decode(ids) == text


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


def test_forced_tokens_are_those_without_a_choice(tokenizer, grammars):
    grammar = grammars[0]
    for state in range(len(grammar.next_state)):
        forced = grammar.forced(state)
        for token in forced:
            assert list(grammar.steps[state]) == [token]
            state = grammar.steps[state][token]
        assert state == grammar.end_state or len(grammar.steps[state]) > 1


def test_a_grammar_is_compiled_once_for_a_tokenizer(tokenizer, grammars):
    assert plan_grammar(tokenizer, X, Y) is grammars[0]
    assert plan_grammar(tokenizer, X, Y, 1) is not grammars[0]
    assert len(grammars[0].next_state) < 300


def test_a_range_without_zero_is_refused():
    with pytest.raises(UserError, match="must include 0"):
        Range(1.0, 5.0)
    with pytest.raises(UserError, match=r"99\.99"):
        Range(0.0, 100.0)


def test_a_vocabulary_without_digits_is_refused():
    backend = Tokenizer(models.BPE(vocab={IM_END: 0, "(": 1, "<": 2}, merges=[]))
    lacking = SpelledTags(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(UserError, match="the tokenizer has no token for"):
        plan_grammar(lacking)
