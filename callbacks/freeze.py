"""Freezing by name, and the proof that it held."""

from __future__ import annotations

import logging
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import nn

from odvla.freezing import FreezePlan, frozen_tensors, set_modes
from odvla.weights import tensor_sha256

log = logging.getLogger(__name__)


class FreezeByName(Callback):
    """Applies a FreezePlan for the whole of a fit.

    It acts in setup("fit"): before the optimiser is made, before distributed training wraps the
    model, and before a checkpoint is restored. The trainable set is then fixed.

    Args:
        model: the module that the plan's names belong to.
        plan: which of its parameters train.
    """

    def __init__(self, model: nn.Module, plan: FreezePlan) -> None:
        self.model = model
        self.plan = plan
        self.before: dict[str, str] = {}  # hashes of frozen parameters and buffers
        self.after: dict[str, str] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Set requires_grad and modes, take the first hashes."""
        if stage != "fit":
            return
        chosen = self.plan.apply(self.model)
        self.before = self._hashes(self.model)
        counts: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            if name in chosen:
                part = name.split(".")[0]
                counts[part] = counts.get(part, 0) + parameter.numel()
        said = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        log.info("parameters that train: %s", said)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Frozen modules stay in eval mode."""
        set_modes(self.model)

    def compare(self, model: nn.Module | None = None) -> None:
        """Take the hashes again; called when the fit is over (also one that had nothing to do).

        Args:
            model: holds what the fit made of the model; None: that is the model itself.

        Raises:
            RuntimeError: something frozen has changed; it names the tensor.
        """
        self.after = self._hashes(model or self.model)
        changed = [name for name in self.before if self.after[name] != self.before[name]]
        if changed:
            raise RuntimeError(f"{changed[0]!r} is frozen but has changed ({len(changed)} in all)")

    def _hashes(self, model: nn.Module) -> dict[str, str]:
        tensors = model.state_dict()
        return {name: tensor_sha256(tensors[name]) for name in frozen_tensors(self.model)}
