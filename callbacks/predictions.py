"""What a stage says about every sample, in one file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from odvla.weights import write_atomically

Record = dict[str, Any]


class WritePredictions(Callback):
    """Writes the records of a test or a validation, sorted, the same at any number of processes.

    Args:
        path: predictions.jsonl; it appears when all are there.
        during: whose steps return them, as Lightning calls it.
    """

    def __init__(self, path: Path, during: Literal["test", "validate"] = "test") -> None:
        self.path = path
        self.during = during
        self.records: list[Record] = []

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Forget what an earlier one returned."""
        self.records = []

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's records."""
        self.records += outputs["records"]

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Collect all processes' records and write them."""
        if trainer.state.fn != self.during:
            return
        parts: list[Any] = [self.records]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.records)
        if trainer.is_global_zero:
            records = sorted((record for part in parts for record in part), key=_order)
            write_atomically(self.path, "".join(map(_line, records)).encode())
        self.records = []

    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end


def _order(record: Record) -> tuple[str, str, str]:
    return record["sample_token"], record.get("id", ""), record["kind"]


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
