"""Learning from a feature cache is learning from images; a cache that is stale is refused."""

from dataclasses import dataclass, replace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.feature_cache import CacheSettings, FeatureCache, LearnFromCache
from callbacks.freeze import FreezeByName
from callbacks.remember import RememberTokens
from experiments.prepare import build_model, build_tokenizer, data_module
from experiments.tiny import smoke
from odvla.augmentation import AugmentationConfig
from odvla.errors import UserError
from odvla.token_memory import TokenMemory
from odvla.token_shards import TokenShards
from stages.instruction import InstructionStage, InstructionStageConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(town_root):
    base = smoke()
    data = replace(
        base.data,
        root=str(town_root),
        version=next(town_root.glob("v1.0-*")).name,
        image_size=(64, 36),
        train_scenes=1,
        instruction=replace(base.data.instruction, batch_size=8, clip_length=2),
    )
    return replace(base, town=None, data=data, run=("instruction",))


@pytest.fixture(scope="module")
def tokenizer(config):
    return build_tokenizer(config)


def settings(folder, past, **changed):
    return CacheSettings(
        **{"root": folder, "stage": "s", "past": past, "fingerprint": "town"} | changed
    )


def changed(config, **settings):
    data = replace(config.data, instruction=replace(config.data.instruction, **settings))
    return replace(config, data=data)


class Losses(Callback):
    """Writes down every step's loss."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())
        self.images = tuple(batch.clip[-1].images.shape[-2:])


def trained(config, tokenizer, folder, *callbacks):
    """Losses of an epoch of training and of the val split after it, and the weights."""
    vla = build_model(config, tokenizer)
    stage_config = config.stages.instruction
    data = data_module(config, "instruction", tokenizer)
    stage, losses = stage_config.build(vla, 5), Losses()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[FreezeByName(vla, stage_config.freeze), losses, *callbacks],
    )
    trainer.fit(stage, data)
    val = trainer.callback_metrics["val/loss"].item()
    return losses, val, {name: p.detach().clone() for name, p in vla.named_parameters()}


@pytest.mark.parametrize("past", ["clip", "scene"])
def test_losses_and_weights_are_the_same_bit_by_bit(config, tokenizer, tmp_path, past):
    if past == "clip":  # the last bits of a row depend on the rows beside it
        config = changed(config, batch_size=1)
    without = [RememberTokens("s", {}, progress=False)] if past == "scene" else []
    images, val, weights = trained(config, tokenizer, tmp_path, *without)
    for _ in ("made", "found"):
        callback = LearnFromCache(settings(tmp_path / "cache", past))
        cached, cached_val, cached_weights = trained(config, tokenizer, tmp_path, callback)
        assert len(images.values) > 3
        assert cached.values == images.values
        assert cached_val == val
        assert all(torch.equal(cached_weights[name], weights[name]) for name in weights)
        # What is remembered is not read again, either.
        assert images.images == ((36, 64) if past == "clip" else (1, 1))
        assert cached.images == (1, 1)  # nobody read the images


def test_clips_that_were_encoded_in_another_batch_agree_to_rounding(config, tokenizer, tmp_path):
    images, val, _ = trained(config, tokenizer, tmp_path)
    callback = LearnFromCache(settings(tmp_path / "cache", "clip"))
    cached, cached_val, _ = trained(config, tokenizer, tmp_path, callback)
    assert cached.values == pytest.approx(images.values, rel=1e-3)
    assert cached_val == pytest.approx(val, rel=1e-3)


def opened(config, tokenizer, folder, past="scene", seed=0):
    vla = build_model(replace(config, seed=seed), tokenizer)
    config.stages.instruction.freeze.apply(vla)
    data = data_module(config, "instruction", tokenizer)
    return FeatureCache.open(settings(folder, past), vla.eval(), data, CPU)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("past", ["clip", "scene"])
def test_filling_goes_on_where_it_was_killed(config, tokenizer, tmp_path, past, monkeypatch):
    whole = opened(config, tokenizer, tmp_path / "whole", past)
    whole.fill()
    cache = opened(config, tokenizer, tmp_path / "killed", past)
    cache.shards.frames_a_shard = 3
    keep, calls = TokenMemory.keep, []

    def killing(self, rows, seen):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        keep(self, rows, seen)

    monkeypatch.setattr(TokenMemory, "keep", killing)
    with pytest.raises(Killed):
        cache.fill()
    monkeypatch.setattr(TokenMemory, "keep", keep)
    again = opened(config, tokenizer, tmp_path / "killed", past)
    frames = again.frames()
    assert 0 < len(again.known()) < len(frames)
    again.fill()
    assert again.known() == set(frames)
    for frame in frames:
        token = again.data.index.frames[frame].token
        for stream, tokens in whole.shards[token].items():
            assert torch.equal(tokens.feats, again.shards[token][stream].feats)
            assert torch.equal(tokens.mask, again.shards[token][stream].mask)


def test_other_weights_have_a_folder_of_their_own(config, tokenizer, tmp_path):
    first = opened(config, tokenizer, tmp_path)
    assert opened(config, tokenizer, tmp_path).shards.folder == first.shards.folder
    assert opened(config, tokenizer, tmp_path, seed=1).shards.folder != first.shards.folder
    assert opened(config, tokenizer, tmp_path, past="clip").shards.folder != first.shards.folder


@pytest.mark.parametrize("past", ["clip", "scene"])
def test_a_stale_cache_is_refused(config, tokenizer, tmp_path, past):
    cache = opened(config, tokenizer, tmp_path, past)
    cache.fill()
    assert cache.verify() >= 2
    folder = cache.shards.folder
    moved = tmp_path / "moved"
    wrong = TokenShards(moved)
    for frame in cache.frames():
        token = cache.data.index.frames[frame].token
        row = cache.shards[token]
        wrong[token] = {s: replace(t, feats=t.feats + 0.1) for s, t in row.items()}
    wrong.flush()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in moved.glob("*.safetensors"):
        path.rename(folder / path.name)
    with pytest.raises(UserError, match=r"is stale: the \w+ tokens of sample \w+ are others"):
        opened(config, tokenizer, tmp_path, past).verify()


@dataclass(frozen=True)
class Augmented(InstructionStageConfig):
    """A stage that changes its images."""

    augmentation: AugmentationConfig | None = None


def test_what_a_cache_cannot_stand_for_is_refused(config, tokenizer, tmp_path):
    vla = build_model(config, tokenizer)
    data = data_module(config, "instruction", tokenizer)
    check = settings(tmp_path, "clip").check
    with pytest.raises(UserError, match=r"stages\.s\.feature_cache needs frozen encoder"):
        check(vla, config.stages.instruction, data)
    config.stages.instruction.freeze.apply(vla)
    check(vla, config.stages.instruction, data)
    stage = InstructionStage(vla, Augmented(augmentation=AugmentationConfig()))
    with pytest.raises(UserError, match=r"stages\.s\.augmentation is on"):
        check(vla, stage.config, data)
    data.config = replace(data.config, broken_images=2)
    with pytest.raises(UserError, match=r"data\.broken_images allows 2"):
        check(vla, config.stages.instruction, data)
