"""One stage of one experiment: train it, hand it over, let it predict.

<run>/<stage>/started.json       what the files beside it belong to
<run>/<stage>/last.ckpt          only while the stage is being trained
<run>/<stage>/predictions.jsonl  see handoff.py for the rest
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from callbacks.freeze import FreezeByName
from callbacks.guards import NonFiniteLossGuard
from callbacks.predictions import WritePredictions
from callbacks.progress import StageProgress
from callbacks.remember import RememberTokens
from callbacks.resume import LAST, ResumeCheckpoint
from datamodules.nuscenes import NuScenesDataModule
from experiments.handoff import (
    CARD,
    TOKENIZER,
    WEIGHTS,
    Card,
    card_sha256,
    check_files,
    git_commit,
    load_handoff,
    read_card,
)
from experiments.prepare import data_module
from experiments.schema import ExperimentConfig
from experiments.tracking import Tracker
from odvla.config import flat, to_tree
from odvla.language.tokenizer import ChatTokenizer
from odvla.token_memory import TokenMemory
from odvla.vla import DrivingVLA
from odvla.weights import file_sha256, load_weights, save_weights, write_atomically
from stages.base import StageModule
from stages.optimisation import trained_counts

log = logging.getLogger(__name__)
PREDICTIONS = "predictions.jsonl"
STARTED = "started.json"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Workshop:
    """What all stages of an experiment share."""

    config: ExperimentConfig
    folder: Path  # of the experiment
    fingerprint: str  # of the data
    tokenizer: ChatTokenizer
    vla: DrivingVLA
    tracker: Tracker
    progress: bool
    memories: dict[str, TokenMemory] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()  # more of them, in training


def is_first_process() -> bool:
    """Whether this process writes files."""
    return getattr(rank_zero_only, "rank", 0) == 0


def agreed(value: _T) -> _T:
    """What the first process says, where several run already."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class StageRun:
    """A stage, where it starts from, and where it writes.

    Args:
        shop: what it shares with the other stages.
        stage: its name.
        parent: folder of the stage it starts from; None: the model's first weights.
    """

    def __init__(self, shop: Workshop, stage: str, parent: Path | None) -> None:
        self.shop = shop
        self.stage = stage
        self.parent = parent
        self.folder = shop.folder / stage
        self.settings = shop.config.stages.of(stage)
        # A finished stage stands as long as these are the same.
        self.key: dict[str, Any] = {
            "stage_hash": shop.config.stage_hash(stage),
            "data_fingerprint": shop.fingerprint,
            "parent_card_sha256": card_sha256(parent) if parent is not None else None,
        }

    def is_finished(self) -> bool:
        """Whether the stage's card was written for the same settings, data and parent."""
        done = False
        if (self.folder / CARD).is_file() and (self.folder / WEIGHTS).is_file():
            card = read_card(self.folder)
            done = all(getattr(card, name) == value for name, value in self.key.items())
        return agreed(done)

    def run(self) -> None:
        """Train, hand over, predict.

        Raises:
            UserError: the parent's handoff, the data or a setting is not usable.
        """
        started = time.monotonic()
        shop, config = self.shop, self.shop.config
        resume = self._open()
        if self.parent is not None:  # otherwise the model has its first weights still
            load_handoff(self.parent, self.stage, shop.vla, to_tree(config.model))
        data = data_module(config, self.stage, shop.tokenizer)
        module = self._module(self._total_steps(data))
        logger = shop.tracker.stage(self.stage, resume, self._params(), self._tags())
        freeze = FreezeByName(shop.vla, self.settings.freeze)
        callbacks: list[Callback] = [
            freeze,
            NonFiniteLossGuard(self.stage),
            ResumeCheckpoint(self.folder, self.settings.checkpoint_every),
            *shop.callbacks,
        ]
        if getattr(self.settings, "remember_tokens", False):
            callbacks.append(RememberTokens(self.stage, shop.memories, progress=shop.progress))
        trainer = self._trainer(
            callbacks,
            logger=logger,
            max_steps=module.total_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.settings.accumulate,
            gradient_clip_val=self.settings.gradient_clip or None,
            check_val_every_n_epoch=None,
            val_check_interval=self.settings.val_every * self.settings.accumulate or None,
            limit_val_batches=None if self.settings.val_every else 0,
        )
        log.info("stage %s: %d steps", self.stage, module.total_steps)
        try:
            trainer.fit(module, data, ckpt_path=self.folder / LAST if resume else None)
            freeze.compare()
            weights = save_weights(shop.vla, self.folder / WEIGHTS) if is_first_process() else ""
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name == "train/loss"
            }
            metrics |= self.evaluate(module, data, logger)
        except BaseException as error:
            logger.flush()
            shop.tracker.close(self.stage, error)
            raise
        if is_first_process():
            shop.tokenizer.save(self.folder / TOKENIZER)
            card = Card(
                experiment=config.name,
                stage=self.stage,
                config=to_tree(config),
                **self.key,
                git_commit=git_commit(),
                weights_sha256=weights,
                tokenizer_sha256=file_sha256(self.folder / TOKENIZER / "tokenizer.json"),
                parent_stage=read_card(self.parent).stage if self.parent else None,
                seed=config.seed,
                steps=trainer.global_step,
                seconds=round(time.monotonic() - started, 1),
                trained=trained_counts(shop.vla.named_parameters()),
                frozen_before=freeze.before,
                frozen_after=freeze.after,
                metrics=metrics,
            )
            card.write(self.folder)
            (self.folder / LAST).unlink(missing_ok=True)
            shop.tracker.log_files(self.stage, self.folder / CARD)
        agreed(None)
        shop.tracker.close(self.stage)

    def test(self) -> None:
        """Predict again with the weights that the finished stage has left.

        Raises:
            UserError: the handoff is missing or damaged.
        """
        check_files(self.folder, read_card(self.folder))
        load_weights(self.shop.vla, self.folder / WEIGHTS)
        data = data_module(self.shop.config, self.stage, self.shop.tokenizer)
        self.evaluate(self._module(1), data, False)

    def evaluate(
        self, module: StageModule, data: NuScenesDataModule, logger: Any
    ) -> dict[str, float]:
        """Loss and predictions on the val split."""
        predictions = WritePredictions(self.folder / PREDICTIONS)
        trainer = self._trainer([predictions], logger=logger)
        metrics: dict[str, float] = {}
        for found in (
            *trainer.validate(module, data, verbose=False),
            *trainer.test(module, data, verbose=False),
        ):
            metrics |= {name: float(value) for name, value in found.items()}
        return metrics

    def _open(self) -> bool:
        """Make the folder ready; True: it holds a checkpoint to continue from."""
        started, text = self.folder / STARTED, json.dumps(self.key, sort_keys=True)
        resume = (
            started.is_file() and started.read_text() == text and (self.folder / LAST).is_file()
        )
        if is_first_process() and not resume:
            if self.folder.exists():
                shutil.rmtree(self.folder)  # of other settings, or without a checkpoint
            write_atomically(started, text.encode())
        return agreed(resume)

    def _total_steps(self, data: NuScenesDataModule) -> int:
        data.setup("fit")
        batches = len(data.train_dataloader())
        return self.settings.total_steps(math.ceil(batches / self.shop.config.trainer.devices))

    def _module(self, total_steps: int) -> StageModule:
        return self.settings.build(self.shop.vla, total_steps, self.shop.config.seed)

    def _params(self) -> dict[str, Any]:
        return flat(self.shop.config.stage_tree(self.stage))

    def _tags(self) -> dict[str, Any]:
        return {
            "experiment": self.shop.config.name,
            "seed": self.shop.config.seed,
            "git_commit": git_commit(),
            "parent_card": self.key["parent_card_sha256"],
            "stage_hash": self.key["stage_hash"],
        }

    def _trainer(self, callbacks: list[Callback], *, logger: Any, **more: Any) -> lightning.Trainer:
        settings = self.shop.config.trainer
        if self.shop.progress:
            callbacks = [*callbacks, StageProgress(self.stage)]
        strategy: Any = "auto"
        if settings.devices > 1:
            # Which parameters a batch uses depends on its texts: one without <MAP> leaves the map
            # projector without a gradient.
            strategy = DDPStrategy(find_unused_parameters=True)
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=strategy,
            precision=settings.precision,
            logger=logger,
            callbacks=callbacks,
            log_every_n_steps=settings.log_every,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=self.folder,
            **more,
        )
