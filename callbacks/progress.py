"""One line of progress for each thing a stage does: training, validation, test."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StageProgress(Callback):
    """Progress bars over the steps of a stage (epochs do not matter to it).

    Args:
        stage: printed before the bar.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def _open(self, trainer: lightning.Trainer, what: str, total: float, done: int = 0) -> None:
        if not trainer.is_global_zero or self._progress is not None:
            return
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._task = self._progress.add_task(
            f"{self.stage}: {what}", total=total, completed=done, note=""
        )
        self._progress.start()

    def _move(self, done: int, note: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Open the bar of training."""
        self._open(trainer, "training", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch further."""
        loss = trainer.callback_metrics.get("train/loss")
        self._move(trainer.global_step, "" if loss is None else f"loss {float(loss):.3f}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Open the bar of a validation, unless one of training is there."""
        self._open(trainer, "validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch further."""
        if trainer.state.fn == "validate":
            self._move(batch_idx + 1)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Close the bar that on_validation_start has opened."""
        if trainer.state.fn == "validate":
            self._close()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Open the bar of the test."""
        self._open(trainer, "predictions", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch further."""
        self._move(batch_idx + 1)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        """Leave the terminal in order."""
        self._close()
