"""What a frozen vision half makes of key-frames, kept on disk: made once, checked at every start.

Two kinds of past are cached. "scene": scenes are streamed as in evaluation, train and val, as
RememberTokens does. "clip": every training clip starts anew, as in a step without a memory; the val
split is then looked at as it is streamed.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from callbacks.remember import look_at_scenes
from callbacks.shared_work import SharedWork
from odvla.config import config_hash, to_tree
from odvla.errors import UserError
from odvla.outputs import Perception
from odvla.token_memory import TokenMemory, check_frozen_vision, vision_sha256
from odvla.token_shards import FeatureKey, TokenShards
from odvla.types import Batch, TokenSet
from odvla.vla import DrivingVLA

log = logging.getLogger(__name__)
Past = Literal["scene", "clip"]
VERIFIED_BATCHES = 2  # encoded again at every start
# Farther off than what another device's order of summation does to tokens.
TOLERANCE = 1e-3
# A network disk may show another machine's files late.
SHOWN_WITHIN_S = 120.0


@dataclass(frozen=True)
class CacheSettings:
    """Where a stage's cache lies and how it is made."""

    root: Path  # of the caches of all keys
    stage: str  # named in messages
    past: Past
    fingerprint: str  # of the data root
    precision: str = "32-true"  # of the stage's training
    progress: bool = False

    def key(self, vla: DrivingVLA, data: Any) -> FeatureKey:
        """What the tokens depend on."""
        config = data.config
        clip = self.past == "clip"
        return FeatureKey(
            vision_sha256=vision_sha256(vla),
            model=config_hash([to_tree(vla.config.encoder), to_tree(vla.config.queries)]),
            images=config_hash(to_tree(config.image_geometry)),
            data=self.fingerprint,
            past=f"clip of {config.clip_length}" if clip else "scene",
            rows=config.batch_size if clip else config.eval_batch_size,
            precision=self.precision,
        )

    def check(self, vla: DrivingVLA, stage_config: Any, data: Any) -> None:
        """Refuse what a cache cannot stand for.

        Raises:
            UserError: the vision half trains, images change from step to step, or key-frames with
                broken images would have to be left out.
        """
        switch = f"stages.{self.stage}.feature_cache"
        trained = (name for name, p in vla.named_parameters() if p.requires_grad)
        check_frozen_vision(trained, switch)
        if getattr(stage_config, "augmentation", None) is not None:
            raise UserError(
                f"{switch} needs images that stay as they are, but stages.{self.stage}.augmentation"
                " is on"
            )
        if data.config.broken_images:
            raise UserError(
                f"{switch} needs every image, but data.broken_images allows "
                f"{data.config.broken_images} to be broken; set it to 0"
            )


@dataclass(frozen=True)
class FeatureCache:
    """The tokens of one stage's key-frames."""

    settings: CacheSettings
    shards: TokenShards
    vla: DrivingVLA  # in evaluation mode where it sees
    data: Any
    device: torch.device

    @staticmethod
    def open(
        settings: CacheSettings, vla: DrivingVLA, data: Any, device: torch.device
    ) -> FeatureCache:
        """The cache of a vision half, with what was made before.

        Raises:
            UserError: a file of it is damaged, or the folder is another cache's.
        """
        key = settings.key(vla, data)
        folder = settings.root / key.folder_name
        shards = TokenShards(folder)
        key.claim(folder)
        return FeatureCache(settings, shards, vla, data, device)

    def frames(self) -> list[int]:
        """Key-frames that the cache is for."""
        splits = ("train",) if self.settings.past == "clip" else ("train", "val")
        return [frame for split in splits for frame in self.data.frame_numbers(split)]

    def known(self) -> set[int]:
        """Key-frames that it has."""
        return {frame for frame in self.frames() if self._token(frame) in self.shards}

    def fill(self) -> None:
        """Make what is missing, shared out over the processes; in the end each sees all of it.

        Raises:
            UserError: in all processes, if one of them cannot read an image, or does not see what
                another wrote.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with (
            Progress(
                *columns,
                TimeRemainingColumn(),
                transient=True,
                disable=not self.settings.progress,
            ) as bar,
            SharedWork() as work,
        ):
            # The first process's view decides, so that all deal out the same key-frames.
            known = work.first_says(self.known())
            missing = len(self.frames()) - len(known)
            if missing:
                task = bar.add_task("caching key-frames", total=missing)
                work.watch = lambda done: bar.update(task, completed=done)
                try:
                    self._fill_share(known, work)
                finally:
                    self.shards.flush()
        if missing:
            log.info(
                "stage %s: %d key-frames were cached in %s",
                self.settings.stage,
                missing,
                self.shards.folder,
            )
        with SharedWork():
            self._see_all()

    def _fill_share(self, known: set[int], work: SharedWork) -> None:
        """Make this process's part of what is missing."""
        place, last = (work.rank, work.world_size), work.world_size - 1
        if self.settings.past == "clip":
            passes = [self.data.train_clips(known, place=place)]
        else:
            # The last process has the least of train, so it is the first to get some of val.
            turned = (last - work.rank, work.world_size)
            passes = [
                self.data.stream("train", talk=False, known=known, place=place),
                self.data.stream("val", talk=False, known=known, place=turned),
            ]
        memory = TokenMemory(self.shards)
        for loader in passes:
            for batch, seen in self._look(loader):
                before = len(self.shards)
                memory.keep(batch.valid_rows(), seen)
                work.add(len(self.shards) - before)
                if work.failed:
                    return

    def _see_all(self) -> None:
        """Take in what the other processes wrote.

        Raises:
            UserError: something is still missing after a while.
        """
        started, frames = time.monotonic(), self.frames()
        while True:
            self.shards.refresh()
            missing = len(frames) - len(self.known())
            if not missing:
                return
            if time.monotonic() - started > SHOWN_WITHIN_S:
                raise UserError(
                    f"{missing} of {len(frames)} key-frames that were cached are not seen in "
                    f"{self.shards.folder}; do all machines share the folder of runs?"
                )
            time.sleep(1.0)

    def verify(self) -> int:
        """Encode some key-frames again, others at every start and in every process.

        Returns:
            How many, in this process.

        Raises:
            UserError: in all processes, if one of them looks different now.
        """
        with SharedWork():
            return self._verify()

    def _verify(self) -> int:
        frames = self.frames()
        chosen = random.SystemRandom().choice(frames)
        others = set(frames) - {chosen}
        loader: Any
        if self.settings.past == "clip":
            loader = self.data.train_clips(others)
        else:
            split = "train" if chosen in set(self.data.frame_numbers("train")) else "val"
            loader = self.data.stream(split, talk=False, known=others, place=(0, 1))
        compared, rounded = 0, False
        for number, (batch, seen) in enumerate(self._look(loader), start=1):
            fresh: dict[str, dict[str, TokenSet]] = {}
            TokenMemory(fresh).keep(batch.valid_rows(), seen)
            for token, row in fresh.items():
                rounded |= self._compare(token, row)
            compared += len(fresh)
            if number == VERIFIED_BATCHES:
                break
        if rounded:
            log.warning(
                "the feature cache %s was made on another kind of machine: losses agree to "
                "rounding only",
                self.shards.folder,
            )
        return compared

    def _compare(self, token: str, row: dict[str, TokenSet]) -> bool:
        """Whether a key-frame's tokens differ, but by rounding only."""
        rounded = False
        held = self.shards[token]
        for stream, fresh in row.items():
            old, new = held[stream], fresh.to("cpu")
            same = old.feats.shape == new.feats.shape and torch.equal(old.mask, new.mask)
            if not same or not torch.allclose(
                old.feats.float(), new.feats.float(), rtol=TOLERANCE, atol=TOLERANCE
            ):
                raise UserError(
                    f"the feature cache {self.shards.folder} is stale: the {stream} tokens of "
                    f"sample {token} are others today (have its images changed?); delete the folder"
                )
            rounded |= not torch.equal(old.feats, new.feats)
        return rounded

    def _look(self, loader: Any) -> Iterator[tuple[Batch, Perception]]:
        """Every batch and what the vision half makes of it."""
        if self.settings.past == "scene":
            return look_at_scenes(self.vla, loader, self.device)
        return self._look_at_clips(loader)

    @torch.no_grad()
    def _look_at_clips(self, loader: Any) -> Iterator[tuple[Batch, Perception]]:
        """Each clip anew and in two parts, as a step of training looks at it."""
        bf16 = self.settings.precision == "bf16-mixed"
        for batch in loader:
            moved: Batch = batch.to(self.device)
            state = None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                if len(moved.clip) > 1:
                    _, state = self.vla.perceive(moved.clip[:-1])
                seen, _ = self.vla.perceive(moved.clip[-1:], state)
            yield moved, seen

    def _token(self, frame: int) -> str:
        return self.data.index.frames[frame].token


class LearnFromCache(Callback):
    """Gives a stage the cached tokens of its key-frames; what is missing is made first.

    Args:
        settings: of the cache.
        whole: see RememberTokens.
    """

    def __init__(self, settings: CacheSettings, whole: DrivingVLA | None = None) -> None:
        self.settings = settings
        self.whole = whole

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Fill the cache, check it, and stop reading images for training.

        Raises:
            UserError: the stage cannot learn from a cache, or the cache is stale or damaged.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.settings.check(pl_module.vla, pl_module.config, data)
        vla = pl_module.vla
        if self.whole is not None:
            vla = self.whole.eval().to(pl_module.device)
        cache = FeatureCache.open(self.settings, vla, data, pl_module.device)
        cache.fill()
        compared = cache.verify()
        log.info("stage %s: %d cached key-frames verified", self.settings.stage, compared)
        if self.whole is not None:
            self.whole.to("cpu")
        pl_module.memory = TokenMemory(cache.shards)
        data.unseen = True
