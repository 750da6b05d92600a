"""Our decoding loop equals Hugging Face's, and a slow loop under a grammar."""

import copy

import pytest
import torch

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language import generation
from odvla.language.causal_lm import LanguageConfig
from odvla.language.draft import Drafting, MotionDraft
from odvla.language.generation import decode, generate
from odvla.language.grammar import Range, plan_grammar
from odvla.language.kv_cache import PREFIXES
from odvla.language.splice import Spliced
from odvla.language.waypoints import PlanForm, Waypoints, parse_waypoints

TOKENIZER = fake_tokenizer()
LENGTHS = (5, 12, 9)


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    config = LanguageConfig(hidden=48, layers=2, heads=4, kv_heads=2, intermediate=64)
    language = config.build(len(TOKENIZER)).eval()
    with torch.no_grad():  # larger weights: less uniform choices
        for parameter in language.parameters():
            parameter.mul_(4.0)
    return language


def prompts(language, rows):
    """Left-padded random embeddings of LENGTHS."""
    longest = max(LENGTHS[row] for row in rows)
    embeds = torch.zeros(len(rows), longest, language.hidden)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for g, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row)
        embeds[g, longest - LENGTHS[row] :] = torch.randn(
            LENGTHS[row], language.hidden, generator=generator
        )
        mask[g, longest - LENGTHS[row] :] = True
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Spliced(embeds, mask, positions, torch.full(mask.shape, -100))


def test_greedy_equals_hugging_face_generate_alone_and_in_a_batch(language):
    together = generate(language, prompts(language, (0, 1, 2)), 1, max_new_tokens=20)
    for row in range(3):
        one = prompts(language, (row,))
        alone = generate(language, one, 1, max_new_tokens=20)
        theirs = language.model.generate(
            inputs_embeds=one.embeds,
            attention_mask=one.attention_mask.long(),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )[0].tolist()
        assert alone == [theirs[: theirs.index(1)] if 1 in theirs else theirs]
        assert together[row] == alone[0]
    assert len({tuple(ids) for ids in together}) == 3


def test_draws_are_as_frequent_as_the_model_says(language):
    prompt = prompts(language, (0,))
    with torch.no_grad():
        states = language.model.model(inputs_embeds=prompt.embeds).last_hidden_state[:, -1]
        # Hotter than the model is, so that more than one token is ever drawn.
        language.head.weight.mul_(0.05)
        wanted = language.head(states)[0].softmax(-1)
        count = 3000
        many = Spliced(
            *(
                getattr(prompt, n).expand(count, *getattr(prompt, n).shape[1:])
                for n in ("embeds", "attention_mask", "position_ids", "labels")
            )
        )
        drawn = generate(language, many, -1, max_new_tokens=1, seeds=range(count))
        language.head.weight.div_(0.05)
    found = torch.tensor(drawn)[:, 0].bincount(minlength=len(wanted)) / count
    error = (found - wanted).abs()
    assert (error < 4.5 * (wanted * (1 - wanted) / count).sqrt() + 1e-3).all()
    assert (found > 0).sum() > 5


def test_a_row_draws_the_same_whatever_stands_beside_it(language):
    together = generate(
        language, prompts(language, (0, 1, 2)), 1, max_new_tokens=9, seeds=(7, 8, 9)
    )
    alone = generate(language, prompts(language, (1,)), 1, max_new_tokens=9, seeds=(8,))
    assert together[1] == alone[0]


def test_rows_stop_at_their_own_end(language):
    free = generate(language, prompts(language, (0, 1, 2)), -1, max_new_tokens=12)
    end = free[0][3]
    stopped = generate(language, prompts(language, (0, 1, 2)), end, max_new_tokens=12)
    for ids, whole in zip(stopped, free, strict=True):
        assert ids == (whole[: whole.index(end)] if end in whole else whole)


def test_under_a_grammar_each_token_is_the_best_of_those_allowed(language):
    grammar = plan_grammar(TOKENIZER)
    rows = generate(
        language, prompts(language, (0, 1)), TOKENIZER.end_id, max_new_tokens=120, grammar=grammar
    )
    for row, ids in enumerate(rows):
        assert isinstance(parse_waypoints(TOKENIZER.decode(ids)), Waypoints)
        embeds = torch.cat(
            [prompts(language, (row,)).embeds, language.embed(torch.tensor([ids]))], dim=1
        )
        logits = language.model(inputs_embeds=embeds).logits[0, LENGTHS[row] - 1 :]
        state = grammar.start
        for token, scores in zip([*ids, TOKENIZER.end_id], logits, strict=True):
            open_ = grammar.token_ids[grammar.next_state[state] >= 0]
            assert token == open_[scores[open_].argmax()]
            column = (grammar.token_ids == token).nonzero().item()
            state = int(grammar.next_state[state, column])


def test_an_answer_that_does_not_fit_is_refused(language):
    with pytest.raises(UserError, match="12 tokens and 2040 new ones exceed"):
        generate(language, prompts(language, (1,)), 1, max_new_tokens=2040)


def test_broken_weights_are_refused_and_training_goes_on_as_before(language):
    broken = LanguageConfig(hidden=16, layers=1, heads=2, gradient_checkpointing=True).build(50)
    embeds = prompts(language, (0,))
    small = Spliced(embeds.embeds[..., :16], *list(vars(embeds).values())[1:])
    broken.train()
    written = generate(broken, small, -1, max_new_tokens=6)
    assert broken.training
    assert written == generate(broken.eval(), small, -1, max_new_tokens=6)
    with torch.no_grad():
        broken.head.weight[3] = torch.nan
    with pytest.raises(UserError, match="logits are NaN"):
        generate(broken, small, -1, max_new_tokens=6)


# -- the fast ways write what a slow loop writes ---------------------------------------------------

HISTORY = [[0.0, -6.0], [0.0, -4.0], [0.1, -2.0]]
WAYS = {
    "alone": None,
    "chains": Drafting(branches=False, tokens_per_run=9),
    "trees": Drafting(tokens_per_run=200),
}


@pytest.fixture(scope="module")
def exact(language):
    """In double precision no two logits are so close that rounding could swap them."""
    return copy.deepcopy(language).double()


def exact_prompts(language, rows):
    given = prompts(language, rows)
    return Spliced(given.embeds.double(), *list(vars(given).values())[1:])


def written_slowly(language, prompt, grammar, limit, noise=None):
    """The best allowed token, all read again for each; without cache, drafts or forced tokens."""
    embeds, ids, state = prompt.embeds, [], grammar.start
    while len(ids) < limit and TOKENIZER.end_id not in ids:
        with torch.no_grad():
            logits = language.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        logits = logits[grammar.token_ids]
        if noise is not None:
            uniform = torch.rand(len(logits), generator=noise)
            logits = logits - (-uniform.clamp_min(1e-30).log()).log()
        allowed = grammar.next_state[state] >= 0
        column = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        ids.append(int(grammar.token_ids[column]))
        state = int(grammar.next_state[state, column])
        embeds = torch.cat([embeds, language.embed(torch.tensor([ids[-1:]]))], dim=1)
    return [token for token in ids if token != TOKENIZER.end_id]


def drafts_of(grammar, form, count):
    return [MotionDraft(TOKENIZER, grammar, form, HISTORY) for _ in range(count)]


@pytest.fixture(scope="module", params=[PlanForm(), PlanForm("changes", 1)])
def slow_plans(request, exact):
    """A form, its grammar, and what the slow loop writes for three prompts."""
    form = request.param
    grammar = plan_grammar(TOKENIZER, Range(-9.9, 9.9), Range(-1.5, 62.0), form.decimals)
    rows = [exact_prompts(exact, (row,)) for row in range(3)]
    return form, grammar, [written_slowly(exact, row, grammar, 120) for row in rows]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_what_a_slow_loop_writes(exact, slow_plans, way):
    form, grammar, slow = slow_plans
    assert len({tuple(ids) for ids in slow}) == 3
    for rows in ((0,), (1,), (0, 1, 2)):
        for limit in (120, 1, 2, 17):
            found = decode(
                exact,
                exact_prompts(exact, rows),
                TOKENIZER.end_id,
                max_new_tokens=limit,
                grammar=grammar,
                drafts=drafts_of(grammar, form, len(rows)) if WAYS[way] else (),
                drafting=WAYS[way],
            )
            assert found.ids == [slow[row][:limit] for row in rows]
            assert found.runs <= max(map(len, found.ids))
            if limit == 120 and way == "alone":
                # Tokens without a choice cost no run.
                assert found.runs < max(map(len, found.ids)) - 3
            if limit == 120 and way == "trees":
                assert found.runs < 0.8 * max(map(len, found.ids))


@pytest.mark.parametrize("way", WAYS)
def test_draws_are_the_same_in_every_way(exact, way):
    grammar = plan_grammar(TOKENIZER)
    slow = [
        written_slowly(
            exact, exact_prompts(exact, (row,)), grammar, 120, torch.Generator().manual_seed(row)
        )
        for row in (0, 1)
    ]
    found = decode(
        exact,
        exact_prompts(exact, (0, 1)),
        TOKENIZER.end_id,
        max_new_tokens=120,
        grammar=grammar,
        seeds=(0, 1),
        drafts=drafts_of(grammar, PlanForm(), 2) if WAYS[way] else (),
        drafting=WAYS[way],
    )
    assert found.ids == slow


def test_a_guess_that_is_right_costs_hardly_a_run(exact):
    grammar, row = plan_grammar(TOKENIZER), (0,)
    settings = {"max_new_tokens": 120, "grammar": grammar}
    alone = decode(exact, exact_prompts(exact, row), TOKENIZER.end_id, **settings)

    class Prophet(MotionDraft):
        def whole_text(self, written):
            return TOKENIZER.decode(alone.ids[0])

    prophet = Prophet(TOKENIZER, grammar, PlanForm(), HISTORY)
    found = decode(
        exact,
        exact_prompts(exact, row),
        TOKENIZER.end_id,
        drafts=[prophet],
        drafting=Drafting(branches=False, tokens_per_run=500),
        **settings,
    )
    assert found.ids == alone.ids
    # The model cuts its text in other places than the tokenizer here and there.
    assert found.runs < 0.3 * alone.runs


def test_the_last_row_that_runs_has_room_for_all_guesses(exact):
    grammar = plan_grammar(TOKENIZER)
    slow = [written_slowly(exact, exact_prompts(exact, (row,)), grammar, 120) for row in (0, 1)]
    limit = max(map(len, slow)) - 1  # one ends before it, the other is cut
    found = decode(
        exact,
        exact_prompts(exact, (0, 1)),
        TOKENIZER.end_id,
        max_new_tokens=limit,
        grammar=grammar,
        drafts=drafts_of(grammar, PlanForm(), 2),
        drafting=Drafting(tokens_per_run=900),
    )
    assert found.ids == [ids[:limit] for ids in slow]


def test_mixed_precision_writes_plans_with_a_prefix_and_drafts(language, monkeypatch):
    monkeypatch.setattr(generation, "SHORTEST_PREFIX", 2)
    grammar = plan_grammar(TOKENIZER)
    ids = [4, 8]
    given = prompts(language, (1,))
    embeds = torch.cat([language.embed(torch.tensor([ids])).detach(), given.embeds], dim=1)
    places = torch.arange(embeds.shape[1])[None]
    prompt = Spliced(embeds, places >= 0, places, places)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = decode(
                language,
                prompt,
                TOKENIZER.end_id,
                max_new_tokens=120,
                grammar=grammar,
                drafts=drafts_of(grammar, PlanForm(), 1),
                prefix=ids,
            )
        assert isinstance(parse_waypoints(TOKENIZER.decode(found.ids[0])), Waypoints)


def test_a_prefix_is_read_once_and_changes_nothing(exact, monkeypatch):
    language = copy.deepcopy(exact)
    monkeypatch.setattr(generation, "SHORTEST_PREFIX", 3)
    ids = [3, 7, 2, 9]
    rows = []
    for row in (0, 1):
        alone = exact_prompts(language, (row,))
        text = language.embed(torch.tensor([ids])).detach()
        rows.append(torch.cat([text, alone.embeds], dim=1)[0])
    S = max(map(len, rows))
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, S - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(S) >= S - len(row) for row in rows])
    prompt = Spliced(embeds, mask, (mask.long().cumsum(1) - 1).clamp(min=0), mask.long())
    grammar = plan_grammar(TOKENIZER)
    settings = {"max_new_tokens": 90, "grammar": grammar}
    without = decode(language, prompt, TOKENIZER.end_id, **settings)
    first = decode(language, prompt, TOKENIZER.end_id, prefix=ids, **settings)
    again = decode(language, prompt, TOKENIZER.end_id, prefix=ids, **settings)
    assert first.ids == again.ids == without.ids
    assert (first.runs, again.runs) == (without.runs + 1, without.runs)
    assert PREFIXES.of(language)[tuple(ids)].shape[-2] == 4
    with torch.no_grad():
        language.model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    changed = decode(language, prompt, TOKENIZER.end_id, **settings)
    assert changed.ids != without.ids
    assert decode(language, prompt, TOKENIZER.end_id, prefix=ids, **settings).ids == changed.ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_a_model_trains_with_does_not_matter(language, attention):
    other = copy.deepcopy(language)
    other.model.config._attn_implementation = attention
    theirs = other.model.generate(
        inputs_embeds=prompts(other, (1,)).embeds,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert generate(other, prompts(other, (1,)), -1, max_new_tokens=9) == theirs.tolist()


def test_an_answer_may_be_empty(language):
    first = generate(language, prompts(language, (0,)), -1, max_new_tokens=1)[0][0]
    found = decode(language, prompts(language, (0,)), first, max_new_tokens=5)
    assert (found.ids, found.runs) == ([[]], 1)
    found = decode(language, prompts(language, (0, 1)), 1, max_new_tokens=0)
    assert (found.ids, found.runs) == ([[], []], 0)


def test_of_equal_logits_the_lowest_token_wins(exact):
    language = copy.deepcopy(exact)
    with torch.no_grad():
        language.head.weight.zero_()
    grammar = plan_grammar(TOKENIZER)
    ids = generate(
        language,
        exact_prompts(language, (0,)),
        TOKENIZER.end_id,
        max_new_tokens=120,
        grammar=grammar,
    )
    state = grammar.start
    for token in ids[0]:
        assert token == min(grammar.steps[state])
        state = grammar.steps[state][token]


def test_colder_draws_are_nearer_to_the_best(language):
    best = generate(language, prompts(language, (0,)), -1, max_new_tokens=4)
    settings = {"max_new_tokens": 4, "seeds": (5,)}
    for temperature, same in ((1e-6, True), (1e3, False)):
        found = decode(language, prompts(language, (0,)), -1, temperature=temperature, **settings)
        assert (found.ids == best) == same
    with pytest.raises(UserError, match="temperature must be positive, not 0"):
        decode(language, prompts(language, (0,)), -1, temperature=0, **settings)
