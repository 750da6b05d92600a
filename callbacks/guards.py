"""Stops that name their cause."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from odvla.errors import UserError
from odvla.types import Batch


class NonFiniteLossGuard(Callback):
    """Raises before a loss that is not finite reaches the optimiser.

    Args:
        stage: name used in the message.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._tokens: tuple[str, ...] = ()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Remember which samples are being learned from."""
        self._tokens = batch.clip[-1].sample_tokens if batch.clip else ()

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Look at the loss.

        Raises:
            UserError: it is infinite or not a number.
        """
        if not bool(torch.isfinite(loss).all()):
            samples = ", ".join(self._tokens) or "text only"
            raise UserError(
                f"the loss of stage {self.stage} is {float(loss)} at step {trainer.global_step} "
                f"(samples: {samples}); a lower learning rate or gradient_clip may help"
            )
