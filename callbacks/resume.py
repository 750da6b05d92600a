"""Checkpoints that an interrupted stage continues from: a file, or DeepSpeed's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

LAST = "last.ckpt"


class ResumeCheckpoint(Callback):
    """Writes <folder>/last.ckpt every so many optimiser steps and at the end, whole or not at all.

    Args:
        folder: the stage's run folder.
        every: optimiser steps between two checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every
        self._last = -1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after the right steps (several batches may make one step)."""
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if due and step != self._last and step > 0:
            self._last = step
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{LAST}.partial"
        trainer.save_checkpoint(partial, weights_only=False)  # all processes take part, one writes
        if trainer.is_global_zero:
            if partial.is_dir():  # a folder takes no other's place
                remove_checkpoint(self.folder)
            partial.replace(self.folder / LAST)


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a stage's folder, if there is one."""
    last = folder / LAST
    if last.is_dir():
        # Out of sight in one step: what is half removed is not to be continued from.
        old = folder / f"{LAST}.old"
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed just here
        shutil.rmtree(last.rename(old))
    last.unlink(missing_ok=True)
