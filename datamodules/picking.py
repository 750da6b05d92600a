"""Which conversations go with a key-frame, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from datamodules.joining import JoinReport
from datamodules.records import Index
from odvla.types import Conversation, EgoState


class ConversationSource(Protocol):
    """Conversations of one or several data sets, made when they are asked for."""

    @property
    def reports(self) -> tuple[JoinReport, ...]:
        """What became of the records of the files they are made from."""
        return ()

    def count(self, frame: int) -> int:
        """How many conversations a key-frame (number in the index) has."""

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """One of them; `ego` is the car's state in that key-frame, one row."""

    def weights(self, frame: int) -> NDArray[np.float64] | None:
        """How often each conversation of a key-frame [count] is drawn; None: equally often."""
        return None


@dataclass(frozen=True)
class UnionSource:
    """All conversations of several sources: a plain union, or weighted.

    Args:
        sources: the data sets.
        weight: of each source; (): all alike.
    """

    sources: tuple[ConversationSource, ...]
    weight: tuple[float, ...] = ()

    @property
    def reports(self) -> tuple[JoinReport, ...]:
        """Of all sources."""
        return tuple(report for source in self.sources for report in source.reports)

    def count(self, frame: int) -> int:
        """Conversations of a key-frame in all sources."""
        return sum(source.count(frame) for source in self.sources)

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """Conversation `number`, counted through the sources in their order."""
        for source in self.sources:
            if number < source.count(frame):
                return source.make(frame, number, ego=ego)
            number -= source.count(frame)
        raise IndexError(f"frame {frame} has {self.count(frame)} conversations")

    def weights(self, frame: int) -> NDArray[np.float64] | None:
        """The weight of each conversation's source."""
        if not self.weight:
            return None
        return np.repeat(self.weight, [source.count(frame) for source in self.sources])


def weighted_draws(
    weights: NDArray[np.float64], first: int, count: int, seed: Sequence[int]
) -> tuple[int, ...]:
    """Draws [first, first + count) of an endless sequence in which each item has its share.

    Item k is drawn at times (n + phase_k) / weight_k, n = 0, 1, ...; the phases are random, so that
    the order is. After any number of draws an item has come as often as its share says, give or
    take one round. Any part of the sequence is found without those before it.

    Args:
        weights: [n] above 0.
        first: draws before.
        count: draws wanted.
        seed: of the phases.
    """
    phases = np.random.default_rng(list(seed)).uniform(size=len(weights))
    # At time t, t * sum(weights) draws were made, give or take one for each item.
    total, slack = weights.sum(), len(weights) + 1
    start = np.ceil(np.maximum(0.0, (first - slack) / total) * weights - phases).clip(0)
    start = start.astype(np.int64)  # draws of each item before the start time
    last = np.ceil((first + count + slack) / total * weights - phases).clip(0).astype(np.int64)
    items = np.repeat(np.arange(len(weights)), last - start)
    rank = np.concatenate([np.arange(a, b) for a, b in zip(start, last, strict=True)])
    order = np.argsort((rank + phases[items]) / weights[items], kind="stable")
    skipped = first - int(start.sum())
    return tuple(items[order[skipped : skipped + count]].tolist())


@dataclass(frozen=True)
class Picker:
    """Chooses key-frames and their conversations.

    Args:
        index: the root's index.
        frames: key-frames of the split.
        source: their conversations; None: key-frames alone are wanted.
        per_frame: conversations a training row takes; 0: all.
        every: an epoch visits every conversation once (a key-frame comes as often as that takes);
            otherwise it visits every key-frame once, and other conversations each epoch until all
            have been seen. Weights of the source decide which ones come how often, not how many.
        evaluation_per_frame: conversations of a key-frame in evaluation; 0: all.
        evaluation_stride: only every so-many-th key-frame of a scene has conversations in
            evaluation (all are streamed, for the temporal state).
        seed: of the choice in training; evaluation does not depend on it.
    """

    index: Index
    frames: Sequence[int]
    source: ConversationSource | None = None
    per_frame: int = 0
    every: bool = False
    evaluation_per_frame: int = 0
    evaluation_stride: int = 1
    seed: int = 0

    def items(self) -> list[tuple[int, int]]:
        """(frame, part) of one training epoch; key-frames without conversations are left out."""
        if self.source is None:
            return [(frame, 0) for frame in self.frames]
        items: list[tuple[int, int]] = []
        for frame in self.frames:
            count = self.source.count(frame)
            parts = 1 if count else 0
            if self.every and self.per_frame:
                parts = -(-count // self.per_frame)
            items.extend((frame, part) for part in range(parts))
        return items

    def train(self, frame: int, part: int, epoch: int) -> tuple[int, ...]:
        """Conversations of one training row."""
        count = self.source.count(frame) if self.source is not None else 0
        take = min(self.per_frame or count, count)
        weights = self.source.weights(frame) if self.source is not None else None
        if weights is not None:
            first = epoch * take
            if self.every:
                first, take = epoch * count + part * take, min(take, count - part * take)
            return weighted_draws(weights, first, take, [self.seed, frame])
        if self.every:
            order = np.random.default_rng([self.seed, frame, epoch]).permutation(count)
            return tuple(order[part * take : (part + 1) * take].tolist())
        order = np.random.default_rng([self.seed, frame]).permutation(count)
        return tuple(int(order[(epoch * take + k) % count]) for k in range(take))

    def evaluation(self, frame: int) -> tuple[int, ...]:
        """Conversations of a key-frame in evaluation: the same in every run and at any seed."""
        record = self.index.frames[frame]
        stride = self.evaluation_stride
        if self.source is None or record.position % stride != stride - 1:
            return ()
        count = self.source.count(frame)
        take = min(self.evaluation_per_frame or count, count)
        if take == count:
            return tuple(range(count))
        order = np.random.default_rng(crc32(record.token.encode())).permutation(count)
        return tuple(sorted(order[:take].tolist()))
