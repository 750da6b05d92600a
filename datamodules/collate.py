"""Samples of one row become Batches of many.

A sample keeps what the car can know at t0 and what is to be learned in two objects, so that no part
of the model can be handed an answer by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from odvla.language.dialect_file import PLAIN, TrainingStream
from odvla.rows import join_rows
from odvla.types import (
    AgentTargets,
    Batch,
    Conversation,
    EgoState,
    Frames,
    MapTargets,
    PlanTargets,
    Talk,
    TrafficTargets,
)

_T = TypeVar("_T")


class Tokenises(Protocol):
    """The part of odvla.language's ChatTokenizer that batches need."""

    def tokenise(
        self,
        conversations: Sequence[Conversation],
        frame_index: Sequence[int],
        stream: TrainingStream = PLAIN,
    ) -> Talk:
        """Pad conversations to one tensor; frame_index says which row each one is about."""


@dataclass(frozen=True)
class Observation:
    """What the car knows at t0: one row each, the clip oldest first."""

    clip: tuple[Frames, ...]
    ego: EgoState


@dataclass(frozen=True)
class Targets:
    """What is to be learned; agents one item a step of the clip."""

    plan: PlanTargets
    agents: tuple[AgentTargets, ...] = ()
    map: MapTargets | None = None
    traffic: TrafficTargets | None = None


@dataclass(frozen=True)
class Sample:
    """One row of a batch before collation."""

    observation: Observation
    targets: Targets
    conversations: tuple[Conversation, ...] = ()
    valid: bool = True


@dataclass(frozen=True)
class Collate:
    """Callable for a DataLoader; without a tokenizer the batch has no talk.

    `stream` is how conversations are cut up: what is not trained on is PLAIN.
    """

    tokenizer: Tokenises | None = None
    stream: TrainingStream = PLAIN

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Join samples; all must have clips of one length and the same kinds of targets."""
        observations = [sample.observation for sample in samples]
        targets = [sample.targets for sample in samples]
        maps = [target.map for target in targets if target.map is not None]
        traffic = [target.traffic for target in targets if target.traffic is not None]
        return Batch(
            clip=_join_steps([o.clip for o in observations]),
            valid=torch.tensor([sample.valid for sample in samples]),
            ego=join_rows([o.ego for o in observations]),
            agents=_join_steps([t.agents for t in targets]),
            map=join_rows(maps) if maps else None,
            plan=join_rows([t.plan for t in targets]),
            talk=self._talk(samples),
            traffic=join_rows(traffic) if traffic else None,
        )

    def _talk(self, samples: Sequence[Sample]) -> Talk | None:
        rows = [row for row, sample in enumerate(samples) for _ in sample.conversations]
        if self.tokenizer is None or not rows:
            return None
        conversations = [c for sample in samples for c in sample.conversations]
        return self.tokenizer.tokenise(conversations, rows, self.stream)


def _join_steps(rows: Sequence[tuple[_T, ...]]) -> tuple[_T, ...]:
    return tuple(join_rows(step) for step in zip(*rows, strict=True))
