"""Tokens that are remembered are those that would be made again."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.freeze import FreezeByName
from callbacks.remember import RememberTokens
from odvla.errors import UserError
from odvla.fake_batch import fake_batch
from odvla.rows import rows_of
from odvla.token_memory import TokenMemory, vision_sha256
from stages.planning import PlanningStageConfig
from stages.talk import TalkStage

KINDS = ("plan", "agent")


def a_batch(tokenizer, rows=3):
    return fake_batch(tokenizer, rows=rows, image_size=(48, 32), kinds=KINDS)


def test_remembered_tokens_give_the_same_loss_and_the_same_answers(make_vla, tokenizer):
    vla = make_vla().eval()
    batch = a_batch(tokenizer)
    seen, _ = vla.perceive(batch.clip)
    memory = TokenMemory()
    for row in (2, 0, 1):  # in another order, one by one
        one, _ = vla.perceive(tuple(rows_of(f, torch.tensor([row])) for f in batch.clip))
        memory.keep([(0, batch.clip[-1].sample_tokens[row])], one)
    recalled = memory.recall(batch.clip[-1].sample_tokens)
    assert len(memory) == 3
    for stream, tokens in seen.tokens.items():
        # A batch of one is computed in another order.
        torch.testing.assert_close(
            recalled.tokens[stream].feats, tokens.feats, atol=1e-4, rtol=1e-4
        )
    # Without images the loss can only come from what is remembered.
    blank = tuple(replace(f, images=torch.zeros_like(f.images)) for f in batch.clip)
    fresh, kept = vla(batch), vla(replace(batch, clip=blank), seen=recalled)
    torch.testing.assert_close(kept.loss, fresh.loss, atol=1e-4, rtol=1e-4)
    assert (kept.matched, kept.unmatched) == (fresh.matched, fresh.unmatched)
    assert fresh.matched == 3
    assert vla.generate(batch, seen=recalled).texts == vla.generate(batch).texts
    assert memory.recall(["somewhere else"]) is None


class Streams(DataLoader):
    """Two key-frames of three scenes, for training and evaluation."""

    def __init__(self, tokenizer):
        self.batches = [a_batch(tokenizer)]
        super().__init__(self.batches, collate_fn=lambda items: items[0], batch_size=1)


def numbered(data):
    """Give key-frames numbers, as an index does."""
    tokens = sorted({token for batch in data.val_dataloader() for _, token in batch.valid_rows()})
    data.index = SimpleNamespace(frames=[SimpleNamespace(token=token) for token in tokens])
    data.frame_numbers = lambda split: range(len(tokens))


def test_the_callback_shows_the_frames_once_and_stages_share_them(
    make_vla, make_data, make_trainer, tokenizer
):
    vla, data = make_vla(), make_data("plan")
    looked = []

    def stream(split, *, talk, known, place):
        looked.append((split, talk, place))
        return data.val_dataloader()

    data.stream = stream
    numbered(data)
    heads = replace(PlanningStageConfig().freeze, train=("projectors.*", "language.*"), but_not=())
    config = PlanningStageConfig(freeze=heads, remember_tokens=True)
    memories = {}
    for _ in range(2):
        stage = config.build(vla, 1)
        callbacks = [
            FreezeByName(vla, config.freeze),
            RememberTokens("planning", memories, progress=False),
        ]
        make_trainer(*callbacks, max_steps=1).fit(stage, data)
        assert isinstance(stage, TalkStage)
        assert stage.memory is memories[vision_sha256(vla)]
        assert len(stage.memory) == 7
        assert data.unseen
    # Where images may be broken they are read, to know which key-frames to leave out.
    data.config = replace(data.config, broken_images=1)
    make_trainer(*callbacks, max_steps=1).fit(config.build(vla, 1), data)
    assert not data.unseen
    # Once, and not again for the val split, which has the same key-frames here.
    assert looked == [("train", False, (0, 1))]


def test_rows_that_only_fill_a_batch_are_not_remembered(
    make_vla, make_data, make_trainer, tokenizer
):
    batch, vla, data = a_batch(tokenizer), make_vla(), make_data("plan")
    now = batch.clip[-1]
    first, _, third = now.sample_tokens
    shown = torch.tensor([1, 0, 1], dtype=torch.uint8)[:, None, None, None, None]
    filled = replace(
        batch,
        # Like a scene that has ended: black images under another row's sample token.
        clip=(replace(now, images=now.images * shown, sample_tokens=(first, first, third)),),
        valid=torch.tensor([True, False, True]),
    )
    data.stream = lambda split, *, talk, known, place: [filled]
    numbered(data)
    heads = replace(PlanningStageConfig().freeze, train=("projectors.*", "language.*"), but_not=())
    stage = PlanningStageConfig(freeze=heads, remember_tokens=True).build(vla, 1)
    callbacks = [
        FreezeByName(vla, stage.config.freeze),
        RememberTokens("planning", {}, progress=False),
    ]
    make_trainer(*callbacks, max_steps=1).fit(stage, data)
    with torch.no_grad():
        seen, _ = vla.perceive(batch.clip[-1:])
    recalled = stage.memory.recall([first, third])
    for stream, tokens in seen.tokens.items():
        torch.testing.assert_close(recalled.tokens[stream].feats, tokens.feats[[0, 2]])


def test_a_vision_half_that_trains_is_refused(make_vla, make_data, make_trainer):
    vla, config = make_vla(), PlanningStageConfig(remember_tokens=True)
    callbacks = [
        FreezeByName(vla, config.freeze),
        RememberTokens("planning", {}, progress=False),
    ]
    with pytest.raises(UserError, match=r"stages\.planning\.remember_tokens needs frozen"):
        make_trainer(*callbacks, max_steps=1).fit(config.build(vla, 1), make_data("plan"))
