"""One stage of one experiment: train it, hand it over, let it predict.

<run>/<stage>/started.json       what the files beside it belong to
<run>/<stage>/last.ckpt          only while the stage is being trained
<run>/<stage>/predictions.jsonl  see handoff.py for the rest
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from callbacks.feature_cache import CacheSettings, FeatureCache, LearnFromCache
from callbacks.freeze import FreezeByName
from callbacks.guards import NonFiniteLossGuard
from callbacks.predictions import WritePredictions
from callbacks.progress import StageProgress
from callbacks.remember import KeepSeen, RememberTokens
from callbacks.resume import LAST, ResumeCheckpoint, remove_checkpoint
from datamodules.nuscenes import NuScenesDataModule
from experiments.handoff import (
    CARD,
    TOKENIZER,
    WEIGHTS,
    Card,
    card_sha256,
    check_files,
    git_commit,
    learned_dialect,
    load_checked,
    load_handoff,
    read_card,
)
from experiments.initial_weights import Initial, identity, load_initial
from experiments.prepare import data_module
from experiments.schema import ExperimentConfig
from experiments.strategies import evaluation_strategy, is_sharded, strategy_of
from experiments.tracking import Tracker
from odvla.config import dump, flat, to_tree
from odvla.language.tokenizer import ChatTokenizer
from odvla.ops.backends import describe_backend
from odvla.token_memory import TokenMemory
from odvla.vla import DrivingVLA
from odvla.weights import file_sha256, save_weights, write_atomically
from stages.base import StageModule
from stages.optimisation import trained_counts
from stages.sharding import gather_into

log = logging.getLogger(__name__)
PREDICTIONS = "predictions.jsonl"
STARTED = "started.json"
CONFIG = "config.yaml"  # in the experiment's folder
FEATURES = "feature_cache"  # folder of the caches, in that of all runs
_T = TypeVar("_T")


@dataclass(frozen=True)
class Workshop:
    """What all stages of an experiment share."""

    config: ExperimentConfig
    folder: Path  # of the experiment
    runs: Path  # of all experiments
    fingerprint: str  # of the data
    tokenizer: ChatTokenizer
    vla: DrivingVLA
    tracker: Tracker
    progress: bool
    memories: dict[str, TokenMemory] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()  # more of them, in training

    def write_config(self) -> None:
        """Leave what was asked for in the experiment's folder."""
        write_atomically(self.folder / CONFIG, dump(self.config).encode())


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


@cache
def announce_ops(device: torch.device) -> None:
    """Say once in a process which implementation of the deformable ops runs.

    Raises:
        UserError: the chosen one is not usable on the device.
    """
    log.info(describe_backend(device))


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

    @cached_property
    def key(self) -> dict[str, Any]:
        """A finished stage stands as long as these are the same."""
        config, parent = self.shop.config, self.parent
        return {
            "stage_hash": config.stage_hash(self.stage),
            "data_fingerprint": self.shop.fingerprint,
            "parent_card_sha256": card_sha256(parent) if parent is not None else None,
            "init_identity": identity(config.init) if self._needs_initial() else None,
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
        parent, initial = self._load_start()
        data = data_module(config, self.stage, shop.tokenizer)
        sharded = is_sharded(config.trainer)
        vla = copy.deepcopy(shop.vla) if sharded else shop.vla
        if sharded:
            # All processes must call a sharded model equally often, whatever their texts' lengths.
            vla.language.length_groups = 1
        module = self._module(vla, self._total_steps(data))
        logger = shop.tracker.stage(self.stage, resume, self._params(), self._tags())
        freeze = FreezeByName(vla, self.settings.freeze)
        callbacks: list[Callback] = [
            freeze,
            NonFiniteLossGuard(self.stage),
            ResumeCheckpoint(self.folder, self.settings.checkpoint_every),
            *shop.callbacks,
        ]
        whole = shop.vla if sharded else None
        if getattr(self.settings, "feature_cache", False):
            callbacks.append(LearnFromCache(self.cache_settings(), whole))
        elif getattr(self.settings, "remember_tokens", False):
            callbacks.append(
                RememberTokens(self.stage, shop.memories, progress=shop.progress, whole=whole)
            )
        trainer = self._trainer(
            callbacks,
            strategy_of(config.trainer),
            logger=logger,
            max_steps=module.total_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.settings.accumulate,
            gradient_clip_val=self.settings.gradient_clip or None,
            check_val_every_n_epoch=None,
            val_check_interval=self.settings.val_every * self.settings.accumulate or None,
            limit_val_batches=None if self.settings.val_every else 0,
        )
        announce_ops(trainer.strategy.root_device)
        log.info("stage %s: %d steps", self.stage, module.total_steps)
        try:
            trainer.fit(module, data, ckpt_path=self.folder / LAST if resume else None)
            if sharded:
                gather_into(shop.vla, vla)
            freeze.compare(shop.vla)
            weights = save_weights(shop.vla, self.folder / WEIGHTS) if is_first_process() else ""
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name == "train/loss"
            }
            done = self._module(shop.vla, 1) if sharded else module
            metrics |= self.evaluate(done, data, logger)
        except BaseException as error:
            logger.flush()
            shop.tracker.close(self.stage, error)
            raise
        if is_first_process():
            shop.tokenizer.save(self.folder / TOKENIZER)
            trained = trained_counts(vla.named_parameters())
            card = Card(
                experiment=config.name,
                stage=self.stage,
                config=to_tree(config),
                **self.key,
                git_commit=git_commit(),
                weights_sha256=weights,
                tokenizer_sha256=file_sha256(self.folder / TOKENIZER / "tokenizer.json"),
                parent_stage=parent.stage if parent else None,
                seed=config.seed,
                steps=trainer.global_step,
                seconds=round(time.monotonic() - started, 1),
                trained=trained,
                dialect=learned_dialect(trained, config.dialect_of(self.stage), parent)
                or (initial.dialect if initial else None),
                init=initial.record if initial else None,
                frozen_before=freeze.before,
                frozen_after=freeze.after,
                metrics=metrics,
            )
            card.write(self.folder)
            remove_checkpoint(self.folder)
            shop.tracker.log_files(self.stage, self.folder / CARD)
            shop.tracker.tag(self.stage, "card", card_sha256(self.folder))
        agreed(None)
        shop.tracker.close(self.stage)

    def test(self) -> None:
        """Predict again with the weights that the finished stage has left.

        Raises:
            UserError: the handoff is missing or damaged.
        """
        card = read_card(self.folder)
        check_files(self.folder, card)
        load_checked(self.folder, card, self.shop.vla, self.shop.config)
        data = data_module(self.shop.config, self.stage, self.shop.tokenizer)
        self.evaluate(self._module(self.shop.vla, 1), data, False)

    def cache_settings(self) -> CacheSettings:
        """Of the stage's feature cache; experiments that share a folder share caches."""
        return CacheSettings(
            root=self.shop.runs / FEATURES,
            stage=self.stage,
            past="scene" if getattr(self.settings, "remember_tokens", False) else "clip",
            fingerprint=self.shop.fingerprint,
            precision=self.shop.config.trainer.precision,
            progress=self.shop.progress,
        )

    def cache(self, device: torch.device) -> FeatureCache:
        """Make the stage's feature cache before it is trained, and verify it.

        Raises:
            UserError: the stage cannot learn from a cache, the parent's handoff is not usable, or
                the cache that is there is stale or damaged.
        """
        shop = self.shop
        self._load_start()
        data = data_module(shop.config, self.stage, shop.tokenizer)
        settings = self.cache_settings()
        self.settings.freeze.apply(shop.vla)
        settings.check(shop.vla, self.settings, data)
        cache = FeatureCache.open(settings, shop.vla.eval().to(device), data, device)
        cache.fill()
        cache.verify()
        return cache

    def evaluate(
        self, module: StageModule, data: NuScenesDataModule, logger: Any
    ) -> dict[str, float]:
        """Loss and predictions on the val split, in one go where one look gives both."""
        once = module.predicts_in_validation and data.tests_on_val
        predictions = WritePredictions(self.folder / PREDICTIONS, "validate" if once else "test")
        callbacks: list[Callback] = [predictions]
        if self._next_remembers(data):
            callbacks.append(KeepSeen(self.shop.memories))
        strategy = evaluation_strategy(self.shop.config.trainer)
        trainer = self._trainer(callbacks, strategy, logger=logger)
        found = trainer.validate(module, data, verbose=False)
        if not once:
            found += trainer.test(module, data, verbose=False)
        return {name: float(value) for part in found for name, value in part.items()}

    def _next_remembers(self, data: NuScenesDataModule) -> bool:
        """Whether the next stage learns from tokens that a validation of this one sees as well.

        Only where its own look would give the same bits, so that a run that is killed in between
        ends the same: in as large batches, and in fp32, as it looks outside of autocast.
        """
        config = self.shop.config
        whole = config.trainer.precision == "32-true"
        if self.stage != "perception" or self.stage == config.run[-1] or not whole:
            return False
        after = config.run[config.run.index(self.stage) + 1]
        settings, rows = config.stages.of(after), data.config.eval_batch_size
        return (
            getattr(settings, "remember_tokens", False)
            and not getattr(settings, "feature_cache", False)
            and config.data.of_stage(after, config.seed, None).eval_batch_size == rows
        )

    def _needs_initial(self) -> bool:
        """Whether initial weights fill anything that the parent, if there is one, does not."""
        if self.parent is None:
            return True
        handed_over, wanted = read_card(self.parent).parts, self.shop.config.init.parts
        return bool(handed_over) and not (
            wanted and all(part.split(".")[0] in handed_over for part in wanted)
        )

    def _load_start(self) -> tuple[Card | None, Initial | None]:
        """Fill the model with what the stage starts from.

        Initial weights come first: whatever init names, trained ones are never overwritten.
        """
        vla, config = self.shop.vla, self.shop.config
        initial: Initial | None = None
        if self._needs_initial():
            handed_over = read_card(self.parent).parts if self.parent is not None else ()
            initial = load_initial(vla, config, leave=handed_over)
        if self.parent is None:
            return None, initial
        return load_handoff(self.parent, self.stage, vla, config), initial

    def _open(self) -> bool:
        """Make the folder ready; True: it holds a checkpoint to continue from."""
        started, text = self.folder / STARTED, json.dumps(self.key, sort_keys=True)
        resume = started.is_file() and started.read_text() == text and (self.folder / LAST).exists()
        if is_first_process() and not resume:
            if self.folder.exists():
                shutil.rmtree(self.folder)  # of other settings, or without a checkpoint
            write_atomically(started, text.encode())
        return agreed(resume)

    def _total_steps(self, data: NuScenesDataModule) -> int:
        data.setup("fit")
        batches = len(data.train_dataloader())
        return self.settings.total_steps(math.ceil(batches / self.shop.config.trainer.processes))

    def _module(self, vla: DrivingVLA, total_steps: int) -> StageModule:
        return self.settings.build(vla, total_steps, self.shop.config.seed)

    def _params(self) -> dict[str, Any]:
        return flat(self.shop.config.stage_tree(self.stage))

    def _tags(self) -> dict[str, Any]:
        return {
            "experiment": self.shop.config.name,
            "seed": self.shop.config.seed,
            "git_commit": git_commit(),
            "parent_card": self.key["parent_card_sha256"],
            "stage_hash": self.key["stage_hash"],
            "data_fingerprint": self.key["data_fingerprint"],
        }

    def _trainer(
        self, callbacks: list[Callback], strategy: Any, *, logger: Any, **more: Any
    ) -> lightning.Trainer:
        settings = self.shop.config.trainer
        if self.shop.progress:
            callbacks = [*callbacks, StageProgress(self.stage)]
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
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
