"""Plans as action tokens: what bins lose is known in closed form, and tokens read back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.action_bins import ActionBins, ActionBinStore
from odvla.language.grammar import action_grammar, choice_grammar
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import ParseFailure, PlanForm, format_waypoints, parse_waypoints
from odvla.weights import load_weights, save_weights

LOW = tuple((-1.0 - k, -2.0) for k in range(6))
HIGH = tuple((1.0 + 2 * k, 10.0 + 8 * k) for k in range(6))
BINS = ActionBins(LOW, HIGH, 256)
FORM = PlanForm("tokens", bins=BINS)
PARTS = arrays(np.float64, (6, 2), elements=st.floats(-0.5, 1.5))  # of the way from low to high


@pytest.fixture(scope="module")
def tokenizer():
    return fake_tokenizer(vocab_size=400, action_tokens=256)


@given(parts=PARTS)
def test_inside_the_error_is_half_a_bin_at_most_and_outside_is_clipped(parts):
    low, high = np.array(LOW), np.array(HIGH)
    plan = low + parts * (high - low)
    read = parse_waypoints(format_waypoints(plan, FORM), FORM).xy
    half = (high - low) / 256 / 2
    inside = (parts >= 0) & (parts <= 1)
    assert (np.abs(read - plan) <= half + 1e-9)[inside].all()
    ends = np.where(parts < 0, low + half, high - half)
    np.testing.assert_allclose(read[~inside], ends[~inside])
    lost = BINS.error(plan[None])
    # A hair around the edges may fall to either side.
    sure = (parts < -1e-9) | (parts > 1 + 1e-9)
    maybe = (parts < 1e-9) | (parts > 1 - 1e-9)
    assert sure.sum() <= lost.clipped <= maybe.sum()
    assert lost.largest_m == pytest.approx(np.linalg.norm(read - plan, axis=1).max())


def test_bins_lie_between_the_1st_and_99th_percentile_of_what_is_known():
    rng = np.random.default_rng(0)
    plans = rng.uniform(0, 100, (20_000, 6, 2))
    mask = rng.random((20_000, 6)) < 0.5
    plans[~mask] = 1e6  # never to be looked at
    bins = ActionBins.of(plans, 256, mask)
    # Of 10,000 uniform draws the percentiles are 1 and 99, give or take a few tenths.
    np.testing.assert_allclose(bins.low, 1.0, atol=0.5)
    np.testing.assert_allclose(bins.high, 99.0, atol=0.5)
    assert bins.error(plans, mask).clipped_percent == pytest.approx(2.0, abs=0.1)
    # The error of a uniform coordinate is uniform in half a bin: its square is width^2 / 12.
    gaps = (bins.centres(bins.numbers(plans)) - plans)[mask]
    within = ((plans > np.array(bins.low)) & (plans < np.array(bins.high)))[mask]
    assert (gaps[within] ** 2).mean() == pytest.approx(bins.width.mean() ** 2 / 12, rel=0.02)


def test_what_never_moves_has_bins_all_the_same():
    bins = ActionBins.of(np.zeros((5, 6, 2)), 256)
    assert np.abs(bins.centres(bins.numbers(np.zeros((6, 2))))).max() < 1e-3
    with pytest.raises(UserError, match="no whole future"):
        ActionBins.of(np.zeros((5, 6, 2)), 256, np.zeros((5, 6)))


@given(data=st.data())
def test_whatever_the_grammar_lets_be_written_is_a_plan_and_reads_back(tokenizer, data):
    grammar = action_grammar(tokenizer)
    state, ids = grammar.start, []
    while state != grammar.end_state:
        token = data.draw(st.sampled_from(sorted(grammar.steps[state])))
        ids.append(token)
        state = grammar.steps[state][token]
    assert len(ids) == 13
    assert set(ids[:12]) <= set(tokenizer.action_ids)
    text = tokenizer.decode(ids)
    plan = parse_waypoints(text, FORM)
    assert not isinstance(plan, ParseFailure)
    assert format_waypoints(plan.xy, FORM) == text
    assert tokenizer.text_ids(text) == ids[:12]


def test_the_grammar_holds_every_plan_and_nothing_else(tokenizer):
    grammar = action_grammar(tokenizer)
    ids = tokenizer.text_ids(format_waypoints(np.arange(12.0).reshape(6, 2), FORM))
    assert grammar.accepts([*ids, tokenizer.end_id])
    assert not grammar.accepts([*ids[:-1], tokenizer.end_id])
    assert not grammar.accepts([*ids, ids[0], tokenizer.end_id])
    assert not grammar.accepts([*ids[:-1], *tokenizer.text_ids("["), tokenizer.end_id])
    assert len(grammar.token_ids) == 257


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<action_1>" * 11, "11 action tokens instead of 12"),
        ("<action_1>" * 13, "13 action tokens instead of 12"),
        ("<action_1>" * 11 + "<action_256>", "beyond the 256 bins"),
        ("<action_1>" * 12 + " ok", "not of action tokens alone"),
        ("<action_\u0661>" * 12, "not of action tokens alone"),  # an Arabic one
        ("[(1.00,2.00)]", "not of action tokens alone"),
    ],
)
def test_what_is_no_plan_of_tokens_is_a_failure(text, reason):
    failure = parse_waypoints(text, FORM)
    assert isinstance(failure, ParseFailure)
    assert reason in failure.reason


def test_bins_are_kept_with_the_weights(tmp_path):
    store = ActionBinStore(256)
    assert store.bins is None
    fitted = ActionBins.of(np.random.default_rng(0).normal(size=(50, 6, 2)), 256)
    store.keep(fitted)
    save_weights(store, tmp_path / "w.safetensors")
    fresh = ActionBinStore(256)
    load_weights(fresh, tmp_path / "w.safetensors")
    assert fresh.bins == fitted


def test_tokens_without_bins_or_a_vocabulary_without_tokens_are_refused():
    with pytest.raises(UserError, match="needs action bins, which come with the weights"):
        format_waypoints(np.zeros((6, 2)), PlanForm("tokens"))
    with pytest.raises(UserError, match=r"no action tokens.*tokenizer\.action_tokens=256"):
        action_grammar(fake_tokenizer(vocab_size=400))
    with pytest.raises(UserError, match="at least 2 bins"):
        ActionBins(LOW, HIGH, 1)
    with pytest.raises(ValueError, match="must be finite"):
        format_waypoints(np.full((6, 2), np.nan), FORM)


def test_a_tokenizer_keeps_its_action_tokens(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert again.action_ids == tokenizer.action_ids
    assert len(again.action_ids) == 256
    assert set(again.action_ids) <= set(again.added_ids)
    assert len(again) == len(fake_tokenizer(vocab_size=400)) + 256


def test_qwens_tokenizer_takes_action_tokens(shared):
    folder = shared / "tokenizer" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not in ../shared")
    qwen = ChatTokenizer.load(folder, action_tokens=256)
    text = BINS.text(np.arange(12.0).reshape(6, 2))
    assert qwen.decode(qwen.text_ids(text)) == text
    assert action_grammar(qwen).accepts([*qwen.text_ids(text), qwen.end_id])


def test_a_choice_is_one_of_its_texts(tokenizer):
    texts = ("keep the speed, go straight.", "keep the speed, turn left.", "stop, turn left.")
    grammar = choice_grammar(tokenizer, texts)
    for text in texts:
        assert grammar.accepts([*tokenizer.text_ids(text), tokenizer.end_id])
    for text in ("keep the speed, go", "stop, go straight.", "stop, turn left. "):
        assert not grammar.accepts([*tokenizer.text_ids(text), tokenizer.end_id])
    state, ids = grammar.start, []
    while state != grammar.end_state:  # always the last that is allowed
        token = max(grammar.steps[state])
        ids.append(token)
        state = grammar.steps[state][token]
    assert tokenizer.decode(ids) in texts
    with pytest.raises(ValueError, match="beginning of another"):
        choice_grammar(tokenizer, ("stop", "stop, turn left."))


def test_the_edges_are_those_of_single_precision():
    plans = np.random.default_rng(1).normal(size=(50, 6, 2))
    low = torch.tensor(np.percentile(plans, 1, axis=0)).float()
    assert ActionBins.of(plans, 8).low == tuple(map(tuple, low.tolist()))
