"""Strategies by name; two processes that share a model hand over what one process does."""

import logging
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file

from experiments.cli import main
from experiments.find import find_experiment
from experiments.handoff import load_handoff, read_card
from experiments.prepare import build_model
from experiments.schema import TrainerConfig
from experiments.strategies import check_sharing, is_sharded, strategy_of
from odvla.config import apply_overrides
from odvla.errors import UserError
from odvla.language.tokenizer import ChatTokenizer
from odvla.types import Batch
from odvla.weights import save_weights

ROOT = Path(__file__).parents[2]
SHORT = (
    "run=[planning]",
    "trainer.accelerator=cpu",
    "town=null",
    "data.version=v1.0-trainval",
    "data.image_size=[96,54]",
    "data.eval_scenes=1",
    "stages.planning.steps=3",
    "stages.planning.samples=1",
    "stages.planning.ablations=[]",
    "stages.planning.remember_tokens=false",
    "stages.planning.freeze.but_not=[encoder.backbone.*]",
    "stages.planning.freeze.train=['*']",
    "pictures=0",
    "baseline.epochs=1",
)


@pytest.mark.parametrize(
    ("devices", "strategy", "expected"),
    [
        (1, "fsdp2", str),
        (2, "auto", DDPStrategy),
        (2, "ddp", DDPStrategy),
        (2, "fsdp2", ModelParallelStrategy),
    ],
)
def test_a_strategy_has_a_name(devices, strategy, expected):
    settings = TrainerConfig(devices=devices, strategy=strategy)
    assert isinstance(strategy_of(settings), expected)
    assert is_sharded(settings) == (expected is ModelParallelStrategy)


SHARED = ("trainer.devices=2", "trainer.strategy=deepspeed_2")


def test_deepspeed_that_cannot_run_is_refused_before_anything_starts(monkeypatch, tmp_path, capsys):
    config = apply_overrides(find_experiment("smoke"), SHARED)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    places = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    assert main(["fit", "smoke", *SHARED, *places]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "deepspeed_2 needs DeepSpeed: install the extra with pip install 'odvla[dee" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match="deepspeed_2 needs GPUs, and there is none"):
        check_sharing(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="deepspeed_2 needs GPUs, and there is none"):
        check_sharing(config)
    config = replace(config, trainer=replace(config.trainer, accelerator="gpu"))
    with pytest.raises(
        UserError, match=r"stages\.perception\.optimiser\.muon needs them as matrices"
    ):
        check_sharing(config)
    check_sharing(
        apply_overrides(config, ("run=[perception]", "stages.perception.optimiser.muon=0"))
    )
    check_sharing(find_experiment("smoke"))
    with pytest.raises(UserError, match="deepspeed_2"):
        apply_overrides(find_experiment("smoke"), ("trainer.strategy=deepspeed_3",))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deepspeed_keeps_weights_and_batches_in_fp32(monkeypatch, precision):
    # A stand-in for the package, which Lightning looks at when the strategy is made.
    package = types.SimpleNamespace(utils=types.SimpleNamespace(logging=logging))
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setattr(logging, "logger", logging.getLogger("deepspeed"), raising=False)
    for flag in ("_DEEPSPEED_AVAILABLE", "_DEEPSPEED_GREATER_EQUAL_0_16"):
        monkeypatch.setattr(f"lightning.pytorch.strategies.deepspeed.{flag}", True)
    strategy = strategy_of(TrainerConfig(devices=2, strategy="deepspeed_2", precision=precision))
    assert strategy.config["zero_optimization"]["stage"] == 2
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision=precision, logger=False
    )
    assert trainer.precision_plugin.precision == "32-true"
    batch = Batch(clip=(), valid=torch.ones(1, dtype=torch.bool))
    assert trainer.precision_plugin.convert_input(batch) is batch
    cast = strategy.config.get("torch_autocast")
    assert cast == ({"enabled": True, "dtype": "bfloat16"} if "bf16" in precision else None)
    assert not {"bf16", "fp16"} & set(strategy.config)


def test_two_processes_that_share_a_model_hand_over_a_whole_one(town_root, tmp_path):
    places = ("--data", str(town_root), "--runs", str(tmp_path))
    shared = ("trainer.devices=2", "trainer.strategy=fsdp2")
    done = subprocess.run(
        [sys.executable, "lightning_app.py", "fit", "smoke", *SHORT, *shared, *places],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "smoke" / "planning"
    config = apply_overrides(find_experiment("smoke"), SHORT)
    first = build_model(config, ChatTokenizer.load(folder / "tokenizer"))
    # What one process saves: every parameter and buffer, tied ones once.
    save_weights(first, tmp_path / "one.safetensors")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(folder / "vla.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
        n: (t.shape, t.dtype) for n, t in two.items()
    }
    trained = config.stages.planning.freeze.trainable(first)
    spoken = [n for n in two if n in trained and n.startswith("language.")]
    assert not any(torch.equal(one[n], two[n]) for n in spoken)
    assert all(torch.equal(one[n], two[n]) for n in two if n not in trained)
    card = read_card(folder)
    assert sum(card.trained.values()) == sum(
        p.numel() for n, p in first.named_parameters() if n in trained
    )
    assert card.frozen_before == card.frozen_after
    # A stage can start from it: files, hashes, keys, shapes and prompts are what they should be.
    replace(card, stage="interaction").write(folder)
    vla = build_model(config, ChatTokenizer.load(folder / "tokenizer"))
    load_handoff(folder, "planning", vla, config)
    assert all(torch.equal(vla.state_dict()[n], tensor) for n, tensor in two.items())
