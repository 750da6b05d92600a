"""Look at every key-frame once, where the vision half is frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import track

from odvla.outputs import Perception
from odvla.token_memory import TokenMemory, check_frozen_vision, vision_sha256
from odvla.types import Batch
from odvla.vla import DrivingVLA

log = logging.getLogger(__name__)


@torch.no_grad()
def look_at_scenes(
    vla: DrivingVLA, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, Perception]]:
    """Streamed key-frames, on the device, and what the vision half makes of each."""
    state = None
    for batch in batches:
        moved: Batch = batch.to(device)
        seen, state = vla.perceive(moved.clip, state)
        yield moved, seen


class RememberTokens(Callback):
    """Gives a stage a TokenMemory of its train and val key-frames.

    They are streamed scene by scene, as in evaluation: training then sees tokens with their whole
    past instead of a clip's.

    Args:
        stage: name used in messages.
        memories: by hash of the vision half; what is missing is added, so that stages share it.
        progress: show a bar.
        whole: a model with the same weights that is not sharded over processes; None: the stage's
            own is not.
    """

    def __init__(
        self,
        stage: str,
        memories: dict[str, TokenMemory],
        *,
        progress: bool,
        whole: DrivingVLA | None = None,
    ) -> None:
        self.stage = stage
        self.memories = memories
        self.progress = progress
        self.whole = whole

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Fill the memory, or take the one that is there.

        Raises:
            UserError: a parameter of the vision half trains.
        """
        vla = pl_module.vla
        trained = (name for name, p in vla.named_parameters() if p.requires_grad)
        check_frozen_vision(trained, f"stages.{self.stage}.remember_tokens")
        if self.whole is not None:
            vla = self.whole.eval().to(pl_module.device)
        memory = memory_of(vla, self.memories)
        self._look(trainer, vla, pl_module.device, memory)
        if self.whole is not None:
            self.whole.to("cpu")
        pl_module.memory = memory
        # Nobody is to look at the training images any more. Where some may be broken they are read
        # all the same: only that tells which key-frames must be left out.
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.unseen = data.config.broken_images == 0

    def _look(
        self, trainer: lightning.Trainer, vla: DrivingVLA, device: torch.device, memory: TokenMemory
    ) -> None:
        """Look at the scenes with a key-frame that is not remembered yet."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        before = len(memory)
        for split in ("train", "val"):
            frames = set(data.frame_numbers(split))
            known = {n for n in frames if data.index.frames[n].token in memory} if memory else set()
            if known == frames:
                continue
            loader = data.stream(split, talk=False, known=known, place=(0, 1))
            title = f"looking at the {split} scenes"
            bar = track(loader, title, transient=True, disable=not self.progress)
            for batch, seen in look_at_scenes(vla, bar, device):
                memory.keep(batch.valid_rows(), seen)
        if len(memory) > before:
            found = len(memory) - before
            log.info("stage %s: the vision half saw %d key-frames", self.stage, found)


class KeepSeen(Callback):
    """Remembers what a validation saw of the val scenes, for the stages that learn after it.

    Args:
        memories: see RememberTokens.
    """

    def __init__(self, memories: dict[str, TokenMemory]) -> None:
        self.memories = memories

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start, or go on, with what these weights see."""
        self.memory = memory_of(pl_module.vla, self.memories)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's key-frames."""
        if outputs["seen"] is not None:
            self.memory.keep(batch.valid_rows(), outputs["seen"])


def memory_of(vla: DrivingVLA, memories: dict[str, TokenMemory]) -> TokenMemory:
    """The memory of a vision half; those of weights that are gone are let go."""
    key = vision_sha256(vla)
    memory = memories.get(key, TokenMemory())
    memories.clear()
    memories[key] = memory
    return memory
