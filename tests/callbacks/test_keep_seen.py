"""What a validation saw is what the next stage would see if it looked again."""

import logging

import lightning
import pytest
import torch

from callbacks.remember import KeepSeen, RememberTokens, look_at_scenes
from experiments.pipeline import open_pipeline
from experiments.prepare import build_model, build_tokenizer, data_module
from experiments.tiny import smoke
from odvla.config import apply_overrides
from odvla.token_memory import TokenMemory


def on_town(town_root, *changes):
    places = [f"data.root={town_root}", f"data.version={next(town_root.glob('v1.0-*')).name}"]
    sizes = ["data.image_size=[64,36]", "data.train_scenes=1", "pictures=0"]
    stages = ["perception.steps=1", "planning.steps=1", "planning.ablations=[]"]
    short = ["town=null", "log_model=false", "run=[perception,planning]"]
    stages = [f"stages.{change}" for change in stages]
    return apply_overrides(smoke(), [*places, *sizes, *short, *stages, *changes])


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
    config, looked = on_town(town_root, *changes), []
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
