"""Which key-frames a batch holds, and in which order.

Training draws clips of consecutive key-frames at random; evaluation streams whole scenes, several
side by side in lock-step, so that temporal state can be carried from batch to batch. Both are fixed
by (seed, epoch, rank), shard themselves over ranks (Trainer(use_distributed_sampler=False)), and
give every rank equally many batches.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Sampler

from odvla.errors import UserError


@dataclass(frozen=True)
class ClipRequest:
    """One row of a batch, as a sampler asks the data set for it."""

    frame: int  # number of the key-frame "now"
    steps: int = 1  # key-frames of the clip, "now" included
    carried: bool = False  # temporal state comes from the batch before: no scene start
    valid: bool = True  # False: the row only fills the batch
    conversations: tuple[int, ...] = ()


class ConversationPicker(Protocol):
    """Chooses the conversations of a key-frame."""

    def items(self) -> Sequence[tuple[int, int]]:
        """(frame number, part): what one epoch of training goes through."""

    def train(self, frame: int, part: int, epoch: int) -> tuple[int, ...]:
        """Conversations of one training item."""

    def evaluation(self, frame: int) -> tuple[int, ...]:
        """Conversations of a key-frame in evaluation, the same every time."""


class ClipSampler(Sampler[Any]):
    """Training clips: every item once an epoch, shuffled by (seed, epoch).

    Args:
        picker: what there is to draw from.
        steps: key-frames of a clip.
        seed: of the order.
        rank: this process.
        world_size: number of processes; up to world_size - 1 items are left out of an epoch, other
            ones each time, so that all ranks have equally many.
    """

    def __init__(
        self, picker: ConversationPicker, steps: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.picker = picker
        self.items = list(picker.items())
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._skip: dict[int, int] = {}  # epoch -> items seen before an interruption
        if len(self) == 0:
            raise UserError(
                f"{len(self.items)} training item(s) cannot be shared by {world_size} process(es)"
            )

    def __len__(self) -> int:
        return len(self.items) // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch (Lightning calls this)."""
        self.epoch = epoch

    def resume(self, epoch: int, skipped: int) -> None:
        """Start `epoch` after its first `skipped` items of this rank, once."""
        self.epoch = epoch
        self._skip = {epoch: skipped}

    def __iter__(self) -> Iterator[ClipRequest]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.items))
        own = order[self.rank :: self.world_size][: len(self)]
        for number in own[self._skip.pop(self.epoch, 0) :]:
            frame, part = self.items[number]
            chosen = self.picker.train(frame, part, self.epoch)
            yield ClipRequest(frame, self.steps, conversations=chosen)


class PlainLoader(DataLoader):
    """A DataLoader that passes on a worker's UserError as the one sentence it was."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            # torch puts the worker's traceback before the message; its last line is the message.
            sentence = str(error).strip().splitlines()[-1]
            raise UserError(sentence.split("UserError: ", 1)[-1]) from error


class ResumableLoader(PlainLoader):
    """A training DataLoader that continues inside an epoch.

    Its sampler must be a BatchSampler of a ClipSampler. Lightning stores and restores the state.
    """

    _given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self._clip_sampler()
        self._given = -(-sampler._skip.get(sampler.epoch, 0) // self._batch_rows())
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches given to the training loop in it."""
        return {"epoch": self._clip_sampler().epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches of `state`; a finished epoch starts the next one."""
        epoch, batches = state["epoch"], state["batches"]
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        self._clip_sampler().resume(epoch, batches * self._batch_rows())

    def _clip_sampler(self) -> ClipSampler:
        sampler = self.batch_sampler.sampler  # type: ignore[union-attr]
        assert isinstance(sampler, ClipSampler)
        return sampler

    def _batch_rows(self) -> int:
        return self.batch_sampler.batch_size  # type: ignore[union-attr]


class StreamBatchSampler(Sampler[list[ClipRequest]]):
    """Evaluation batches: groups of scenes side by side, from first to last key-frame.

    Groups are made from the scene order alone and then dealt out to the ranks, so that a batch
    holds the same rows whatever the number of processes. Rows of scenes that have ended, rows that
    fill the last group, and whole batches that give a rank as many as the others, are not valid.

    Args:
        scenes: (first, last) frame numbers of each scene, last excluded.
        rows: scenes side by side, at most; groups are made equally large.
        picker: chooses the conversations.
        rank: this process.
        world_size: number of processes.
        known: frames that need not be given: groups in which there is no other are left out before
            the rest is dealt, and a rank has no more batches than its own groups make. None: all
            are given.
    """

    def __init__(
        self,
        scenes: Sequence[tuple[int, int]],
        rows: int,
        picker: ConversationPicker,
        rank: int = 0,
        world_size: int = 1,
        known: Container[int] | None = None,
    ) -> None:
        groups = -(-len(scenes) // rows)
        self.rows = -(-len(scenes) // groups) if groups else rows
        self.picker = picker
        self.groups = [scenes[k : k + self.rows] for k in range(0, len(scenes), self.rows)]
        wanted = [group for group in self.groups if known is None or _has_others(group, known)]
        shares = [wanted[r::world_size] for r in range(world_size)]
        self.share = shares[rank]
        even = shares if known is None else [self.share]
        self._length = max(sum(_longest(group) for group in share) for share in even)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        given = 0
        for group in self.share:
            for step in range(_longest(group)):
                yield self._batch(group, step)
                given += 1
        filler = self.share[-1] if self.share else self.groups[0]
        for _ in range(self._length - given):
            yield [ClipRequest(filler[0][0], valid=False)] * self.rows

    def _batch(self, group: Sequence[tuple[int, int]], step: int) -> list[ClipRequest]:
        requests = []
        for row in range(self.rows):
            first, last = group[row] if row < len(group) else group[0]
            frame = min(first + step, last - 1)
            valid = row < len(group) and first + step < last
            chosen = self.picker.evaluation(frame) if valid else ()
            requests.append(ClipRequest(frame, 1, step > 0, valid, chosen))
        return requests


def _longest(scenes: Sequence[tuple[int, int]]) -> int:
    return max(last - first for first, last in scenes)


def _has_others(scenes: Sequence[tuple[int, int]], known: Container[int]) -> bool:
    return any(frame not in known for first, last in scenes for frame in range(first, last))
