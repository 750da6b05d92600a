"""Steps of a stage with noise for data and random weights: how long they take, what they need."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.budget import SAMPLE_KINDS, looks_once
from experiments.schema import ExperimentConfig
from odvla.fake_batch import fake_batch, fake_tokenizer, sweep_points
from odvla.language.tokenizer import ChatTokenizer
from odvla.token_memory import TokenMemory
from odvla.types import Batch
from odvla.vla import DrivingVLA
from stages.base import StageModule

STEPS = 3


@dataclass(frozen=True)
class Trial:
    """A stage ready to take steps."""

    module: StageModule
    optimiser: Any
    batch: Batch
    precision: str

    def step(self) -> float:
        """One optimiser step; returns the loss."""
        place = next(self.module.vla.parameters()).device
        autocast: Any = nullcontext()
        if self.precision == "bf16-mixed":
            autocast = torch.autocast(place.type, torch.bfloat16)
        with autocast:
            loss = self.module.loss_of(self.batch, None).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())


def random_model(config: ExperimentConfig) -> tuple[DrivingVLA, ChatTokenizer]:
    """The experiment's model with random weights, and a tokenizer that stands in for its own."""
    size = max(config.tokenizer.vocab_size, 400)
    tokenizer = fake_tokenizer(config.dialect, size, config.tokenizer.action_tokens)
    language = replace(config.model.language, pretrained=None)
    if config.trainer.gradient_checkpointing:
        language = replace(language, gradient_checkpointing=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return replace(config.model, language=language).build(tokenizer), tokenizer


def trial(config: ExperimentConfig, stage: str, vla: DrivingVLA, tokenizer: ChatTokenizer) -> Trial:
    """A stage on a batch of noise of the experiment's sizes."""
    settings, data = config.stages.of(stage), getattr(config.data, stage)
    settings.freeze.apply(vla)
    # The model may lie on a GPU already; what the stage adds (its losses' constants) does not.
    module = settings.build(vla, 100, config.seed).to(next(vla.parameters()).device)
    kinds = SAMPLE_KINDS.get(stage, ())
    count = max(1, getattr(data, "conversations_per_frame", 1))
    chosen = tuple(kinds[n % len(kinds)] for n in range(count)) if kinds else ()
    batch = fake_batch(
        tokenizer if chosen else None,
        rows=data.batch_size,
        steps=data.clip_length if stage == "perception" else 1,
        image_size=config.data.image_size,
        lidar_points=sweep_points(config.model.encoder),
        grid=getattr(config.model.encoder, "grid", None),
        kinds=chosen,
        dialect=config.dialect_of(stage),
    )
    batch = batch.to(next(vla.parameters()).device)
    if looks_once(settings):
        module.memory = TokenMemory()
        with torch.no_grad():
            module.memory.keep(batch.valid_rows(), vla.perceive(batch.clip)[0])
    return Trial(
        module, module.configure_optimizers()["optimizer"], batch, config.trainer.precision
    )


def measured_throughput(config: ExperimentConfig, stage: str) -> float:
    """Samples a second of one process here, times the number of processes."""
    vla, tokenizer = random_model(config)
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        vla = vla.cuda()
    ready = trial(config, stage, vla, tokenizer)
    ready.step()  # the first one also makes the optimiser's state
    started = time.perf_counter()
    for _ in range(STEPS):
        ready.step()
    seconds = (time.perf_counter() - started) / STEPS
    talk = ready.batch.talk
    samples = len(ready.batch.valid) if talk is None else len(talk.conversations)
    return samples / seconds * config.trainer.processes
