"""What a validation saw is what the next stage would see if it looked again."""

import logging
from dataclasses import replace

import lightning
import pytest
import torch

from callbacks.remember import KeepSeen, RememberTokens, look_at_scenes
from experiments.pipeline import open_pipeline
from experiments.prepare import build_model, build_tokenizer, data_module
from experiments.tiny import smoke
from odvla.config import apply_overrides
from odvla.token_memory import TokenMemory


def on_town(town_root):
    base = smoke()
    version = next(town_root.glob("v1.0-*")).name
    sizes = {"image_size": (64, 36), "train_scenes": 1, "version": version}
    stages = {
        name: replace(base.stages.of(name), steps=1, ablations=())
        if name == "planning"
        else replace(base.stages.of(name), steps=1)
        for name in ("perception", "planning")
    }
    return replace(
        base,
        town=None,
        pictures=0,
        log_model=False,
        run=("perception", "planning"),
        data=replace(base.data, root=str(town_root), **sizes),
        stages=replace(base.stages, **stages),
    )


def test_tokens_are_those_of_another_look_to_the_last_bit(town_root, tmp_path):
    config = on_town(town_root)
    tokenizer = build_tokenizer(config)
    vla, memories = build_model(config, tokenizer), {}
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[KeepSeen(memories)],
    )
    stage = config.stages.perception.build(vla)
    trainer.validate(stage, data_module(config, "perception", tokenizer), verbose=False)
    (memory,) = memories.values()
    data = data_module(config, "planning", tokenizer)
    again = {}
    for batch, seen in look_at_scenes(
        vla.eval(), data.stream("val", talk=False), torch.device("cpu")
    ):
        TokenMemory(again).keep(batch.valid_rows(), seen)
    assert len(memory) == len(again) == 40
    for token, row in again.items():
        kept = memory.recall([token])
        for stream, tokens in row.items():
            assert torch.equal(kept.tokens[stream].feats, tokens.feats)
            assert torch.equal(kept.tokens[stream].mask, tokens.mask)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ([], 40),
        (["trainer.precision=bf16-mixed"], 0),
        (["data.planning.eval_batch_size=2"], 0),  # rounded otherwise
    ],
)
def test_the_next_stage_looks_at_what_was_not_seen(
    town_root, tmp_path, caplog, monkeypatch, changes, known
):
    config, looked = apply_overrides(on_town(town_root), changes), []
    caplog.set_level(logging.INFO)
    keep = RememberTokens._look

    def look(self, trainer, vla, device, memory):
        looked.append(len(memory))
        keep(self, trainer, vla, device, memory)
        looked.append(len(memory))

    monkeypatch.setattr(RememberTokens, "_look", look)
    open_pipeline(config, tmp_path, progress=False).fit()
    assert looked == [known, 80]
    assert f"the vision half saw {80 - known} key-frames" in caplog.text
