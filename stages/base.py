"""What every stage shares: the borrowed model, reproducible steps, and streaming in evaluation.

A stage is a LightningModule that owns its loss, its optimiser and its predictions, and borrows one
DrivingVLA that outlives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from odvla.errors import UserError
from odvla.freezing import FreezePlan
from odvla.outputs import Perception, VLAState
from odvla.token_memory import TokenMemory
from odvla.types import Batch
from odvla.vla import DrivingVLA
from stages.optimisation import (
    MuonWithAdamW,
    OptimiserConfig,
    adamw,
    muon_weights,
    parameter_groups,
)
from stages.sharding import shard

Record = dict[str, Any]  # one line of predictions.jsonl
EVERYTHING = FreezePlan()
OPTIMISER = OptimiserConfig()


@dataclass(frozen=True)
class StageConfig:
    """Settings all stages share."""

    freeze: FreezePlan = EVERYTHING
    optimiser: OptimiserConfig = OPTIMISER
    steps: int = 0  # optimiser steps; 0: as many as `epochs` take
    epochs: float = 1.0
    accumulate: int = 1  # batches an optimiser step
    gradient_clip: float = 1.0  # norm; 0: none
    val_every: int = 0  # steps between validations; 0: only after the last step
    checkpoint_every: int = 100  # steps between checkpoints for resuming

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise UserError(f"a stage needs steps or epochs, not {self.steps} and {self.epochs}")
        for name, least in (("accumulate", 1), ("checkpoint_every", 1), ("val_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def total_steps(self, batches: int) -> int:
        """Optimiser steps of the stage, given the batches of an epoch."""
        return self.steps or max(1, math.ceil(self.epochs * batches / self.accumulate))

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> StageModule:
        """The stage on a model."""
        raise NotImplementedError


@dataclass(frozen=True)
class StageLoss:
    """Loss of a batch.

    `weight` is what the loss is a mean over (labels, frames); 0 means that there was nothing to
    learn and the loss is to be ignored. `state` is the temporal state after the batch, and `seen`
    what was judged, where a prediction would be made of the same.
    """

    loss: Tensor
    weight: int
    parts: dict[str, Tensor] = field(default_factory=dict)
    state: VLAState | None = None
    seen: Perception | None = None


class WeightedMeans:
    """Means of named values over all batches of all processes, the same at any number of them.

    The values of a batch do not depend on the number of processes; their sum is rounded once, so
    it does not depend on the order either.
    """

    def __init__(self) -> None:
        self._values: list[tuple[str, float, int]] = []

    def add(self, values: dict[str, Tensor], weight: int) -> None:
        """Take in one batch."""
        self._values += [(name, float(value), weight) for name, value in values.items()]

    def compute(self) -> dict[str, float]:
        """Means by name, of all processes; names whose weight is 0 are left out."""
        means = {}
        values = [value for part in gather(self._values) for value in part]
        for name in sorted({name for name, _, weight in values if weight}):
            own = [(value, weight) for key, value, weight in values if key == name and weight]
            total = math.fsum(weight for _, weight in own)
            means[name] = math.fsum(value * weight for value, weight in own) / total
        return means


class StageModule(lightning.LightningModule):
    """Base of the stages.

    Subclasses write `loss_of` and, where they predict, `predict_rows`. In evaluation, batches are
    consecutive key-frames of the same scenes; the temporal state goes from one to the next.

    Args:
        vla: the model.
        config: settings.
        total_steps: optimiser steps of the whole stage, which the learning rate depends on.
        seed: of everything random inside a step.
    """

    name = ""

    def __init__(
        self, vla: DrivingVLA, config: StageConfig, total_steps: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.vla = vla
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.means = WeightedMeans()
        self.streams: dict[str, VLAState | None] = {}
        self.memory: TokenMemory | None = None  # of a vision half that stays as it is

    def recall(self, batch: Batch) -> Perception | None:
        """What the vision half makes of the batch's last frames, where that is remembered."""
        if self.memory is None or not batch.clip:
            return None
        return self.memory.recall(batch.clip[-1].sample_tokens, batch.valid.device)

    def loss_of(self, batch: Batch, state: VLAState | None) -> StageLoss:
        """What the stage minimises."""
        raise NotImplementedError

    def predict_rows(self, batch: Batch) -> list[Record]:
        """Records of the next key-frames of the streamed scenes."""
        raise NotImplementedError

    @property
    def predicts_in_validation(self) -> bool:
        """Whether a validation returns the records that a test of the same key-frames would."""
        return False

    def records_of(self, found: StageLoss, batch: Batch) -> list[Record]:
        """Records of the key-frames that a validation has just judged."""
        return []

    def configure_model(self) -> None:
        """Shard the model where a strategy wants that."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            # Gradients of several parameters are exchanged together, in the order they come in.
            self.vla.every_parameter_counts = True
        if self.device_mesh is not None:
            shard(self.vla, self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make what is random in a step depend on (seed, stage, step, rank) alone.

        A run that was interrupted then draws what the uninterrupted one would have drawn.
        """
        key = (self.seed, self.name, self.global_step, batch_idx, self.global_rank)
        torch.manual_seed(crc32(repr(key).encode()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch of random clips."""
        found = self.loss_of(batch, None)
        size = max(found.weight, 1)
        self.log("train/loss", found.loss.detach(), prog_bar=True, batch_size=size)
        parts = {f"train/{name}": value.detach() for name, value in found.parts.items()}
        self.log_dict(parts, batch_size=size)
        return found.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss on the next key-frames of the streamed scenes; its records and what was seen."""
        found = self.loss_of(batch, self.streams.get("val"))
        self.streams["val"] = found.state
        self.means.add({"loss": found.loss, **found.parts}, found.weight)
        return {"records": self.records_of(found, batch), "seen": found.seen}

    def on_validation_epoch_start(self) -> None:
        """Streams start anew."""
        self.streams, self.means = {}, WeightedMeans()

    def on_validation_epoch_end(self) -> None:
        """Log means over the split."""
        values = {f"val/{name}": value for name, value in self.means.compute().items()}
        # Every process has computed the same numbers.
        self.log_dict(values, rank_zero_only=False, sync_dist=False)
        self.streams = {}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Record]]:
        """Predictions for the next key-frames of the streamed scenes."""
        return {"records": self.predict_rows(batch)}

    def on_test_epoch_start(self) -> None:
        """Streams start anew."""
        self.streams = {}

    def on_test_epoch_end(self) -> None:
        """Let go of the last state."""
        self.streams = {}

    def configure_optimizers(self) -> Any:
        """One learning rate a component."""
        settings = self.config.optimiser
        muon = muon_weights(self.vla, settings)
        groups = parameter_groups(self.vla.named_parameters(), muon)
        # Muon's groups first, as MuonWithAdamW orders them: the curves below follow this order.
        groups.sort(key=lambda group: not group.muon)
        options: list[dict[str, Any]] = [
            {
                "params": list(group.parameters),
                "lr": getattr(settings.lr, group.component) * (settings.muon if group.muon else 1),
                "weight_decay": settings.weight_decay if group.decays else 0.0,
                "name": group.component
                + ("/muon" if group.muon else "" if group.decays else "/no decay"),
                "muon": group.muon,
            }
            for group in groups
        ]
        optimiser: torch.optim.Optimizer
        if settings.muon > 0:
            optimiser = MuonWithAdamW(options, settings.betas)
        else:
            optimiser = adamw(options, settings.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser, [self._curve(group.component) for group in groups]
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _curve(self, component: str) -> Any:
        settings, total = self.config.optimiser, self.total_steps
        start = getattr(settings.start, component)
        return lambda step: settings.factor(step, total, start)


def gather(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
