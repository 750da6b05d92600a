"""Our decoding loop equals Hugging Face's, and a slow loop under a grammar."""

import pytest
import torch

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language.causal_lm import LanguageConfig
from odvla.language.generation import generate
from odvla.language.grammar import plan_grammar
from odvla.language.splice import Spliced
from odvla.language.waypoints import Waypoints, parse_waypoints

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
