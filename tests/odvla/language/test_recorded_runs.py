"""Runs that are recorded and played again write what ordinary runs write.

On a CPU a stand-in records: it remembers the run as a graph does, by what it reads and where it
writes. With a GPU the same is shown of CUDA graphs.
"""

import copy
import logging

import pytest
import torch

from odvla.errors import UserError
from odvla.fake_batch import fake_tokenizer
from odvla.language import recorded_runs
from odvla.language.causal_lm import LanguageConfig
from odvla.language.draft import MotionDraft
from odvla.language.generation import decode
from odvla.language.grammar import plan_grammar
from odvla.language.recorded_runs import RUNS, nodes_run
from odvla.language.splice import Spliced
from odvla.language.waypoints import PlanForm

TOKENIZER = fake_tokenizer()
GRAMMAR = plan_grammar(TOKENIZER, decimals=2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


def stand_in(run):
    """Do a run once, and a way to do it again that writes where the first wrote."""
    states = run().clone()
    return states, lambda: states.copy_(run())


@pytest.fixture(params=DEVICES)
def language(request, monkeypatch):
    torch.manual_seed(0)
    config = LanguageConfig(hidden=48, layers=2, heads=4, kv_heads=2, intermediate=64)
    language = config.build(len(TOKENIZER)).eval().to(request.param)
    with torch.no_grad():  # larger weights: less uniform choices
        for parameter in language.parameters():
            parameter.mul_(4.0)
    if request.param == "cpu":
        monkeypatch.setattr(recorded_runs, "recorder_for", lambda language: stand_in)
    yield language
    RUNS.forget(language)


def prompts(language, lengths, seed=0):
    """Left-padded random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    embeds = torch.randn(*mask.shape, language.hidden, generator=generator) * mask[..., None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    found = Spliced(embeds, mask, positions, torch.full(mask.shape, -100))
    return Spliced(*(t.to(language.head.weight.device) for t in vars(found).values()))


def drafts(rows):
    history = torch.tensor([[0.0, -8.0], [0.0, -6.0], [0.0, -4.0], [0.0, -2.0]])
    return [MotionDraft(TOKENIZER, GRAMMAR, PlanForm(), history) for _ in range(rows)]


def plays(language):
    """Recordings that are kept for the model."""
    return RUNS._kept[language][1]._recordings


@pytest.mark.parametrize("drafted", [False, True])
def test_plans_are_the_same_call_after_call(language, drafted):
    for call, lengths in enumerate([(5, 12, 9), (30, 7, 9), (300, 7, 2), (5, 12, 9), (4, 4)]):
        asked = prompts(language, lengths, seed=call)
        drafted_by = drafts(len(lengths)) if drafted else ()
        common = dict(max_new_tokens=80, grammar=GRAMMAR, drafts=drafted_by)
        played = decode(language, asked, TOKENIZER.end_id, **common)
        plain = decode(language, asked, TOKENIZER.end_id, record=False, **common)
        assert played.ids == plain.ids
        assert (played.runs, played.read) == (plain.runs, plain.read)
        assert plays(language)


def test_drawn_texts_are_the_same(language):
    for call in range(3):
        asked = prompts(language, (5, 12), seed=call)
        common = dict(max_new_tokens=40, seeds=(call, 7), temperature=0.7)
        played = decode(language, asked, TOKENIZER.end_id, **common)
        plain = decode(language, asked, TOKENIZER.end_id, record=False, **common)
        assert played.ids == plain.ids


def test_weights_that_change_in_place_are_followed(language):
    asked = prompts(language, (5, 12))
    before = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids
    recorded = list(plays(language).values())
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    played = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids
    plain = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40, record=False).ids
    assert played == plain != before
    assert list(plays(language).values())[: len(recorded)] == recorded


def test_weights_in_another_place_are_recorded_anew(language):
    asked = prompts(language, (5, 12))
    decode(language, asked, TOKENIZER.end_id, max_new_tokens=40)
    recorded = list(plays(language).values())
    language.load_state_dict(
        {k: v + 0.5 * torch.randn_like(v) for k, v in language.state_dict().items()}, assign=True
    )
    played = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids
    plain = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40, record=False).ids
    assert played == plain
    assert not set(map(id, plays(language).values())) & set(map(id, recorded))


def test_inference_mode_and_its_absence_take_turns(language):
    asked = prompts(language, (5, 12))
    expected = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40, record=False).ids
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            found = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40)
        assert found.ids == expected


def test_mixed_precision_writes_what_it_writes_unrecorded(language):
    device = language.head.weight.device.type
    for seed in range(3):
        asked = prompts(language, (5, 12), seed)
        with torch.autocast(device, torch.bfloat16):
            played = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids
            plain = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40, record=False).ids
        assert played == plain


def test_training_frees_what_was_recorded(language):
    decode(language, prompts(language, (5, 12)), TOKENIZER.end_id, max_new_tokens=40)
    assert language in RUNS._kept
    language.train()
    assert language not in RUNS._kept


def test_nothing_is_kept_of_a_call_that_failed(language):
    asked = prompts(language, (5, 12))
    expected = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids
    broken = copy.deepcopy(asked)
    broken.embeds[0, -1] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        decode(language, broken, TOKENIZER.end_id, max_new_tokens=40)
    assert language not in RUNS._kept
    assert decode(language, asked, TOKENIZER.end_id, max_new_tokens=40).ids == expected


def test_a_model_that_cannot_be_recorded_says_so_and_writes_on(language, monkeypatch, caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recorded_runs, "recorder_for", lambda language: fails)
    asked = prompts(language, (5, 12))
    with caplog.at_level(logging.WARNING):
        found = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40)
    plain = decode(language, asked, TOKENIZER.end_id, max_new_tokens=40, record=False)
    assert found.ids == plain.ids
    assert [r.getMessage() for r in caplog.records] == [
        "runs of the language model cannot be recorded: "
        "operation not permitted when stream is capturing"
    ]


def test_hooks_and_processors_are_not_recorded():
    language = LanguageConfig(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16).build(50)
    assert recorded_runs.recorder_for(language) is None  # on a CPU
    if torch.cuda.is_available():
        language = language.cuda()
        assert recorded_runs.recorder_for(language) is recorded_runs.cuda_graph
        language.layers[0].register_forward_hook(lambda *_: None)
        assert recorded_runs.recorder_for(language) is None


def test_sizes_of_runs_are_few():
    assert [nodes_run(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 40)] == [1, 2, 4, 8, 8, 16, 16, 24, 40]
