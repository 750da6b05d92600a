"""Stage 2.5's data: where each agent goes in the next 3 s, told in the agent's own frame.

Made from the tables alone. Agents without any future position are left out; a position that is not
annotated is written UN (a public fork does so; whether the authors did is not known).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datamodules.agents import boxes_in_lidar, futures, learnable_rows
from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
    group_by_frame,
)
from datamodules.records import FrameRecord, Index
from datamodules.subset import chosen
from odvla.language.prompts import Dialect
from odvla.language.waypoints import format_future, future_as_json
from odvla.types import DETECTION_CLASSES, Conversation, EgoState


def agents_with_future(
    index: Index, frames: range, extent_m: tuple[float, float, float, float]
) -> Mapping[int, tuple[int, ...]]:
    """Annotation rows near the car that have a future, by key-frame number."""
    found = {}
    for number in frames:
        rows = learnable_rows(index, index.frames[number], extent_m)
        _, mask = futures(index, rows)
        found[number] = tuple(rows[mask.any(1)].tolist())
    return found


class AgentFutures(FrameRecords[int]):
    """One conversation an agent; a record is (annotation row)."""

    def conversation(
        self, frame: FrameRecord, number: int, record: int, ego: EgoState
    ) -> Conversation:
        """Word one agent's future."""
        data = self.index.annotations
        row = np.array([record])
        positions, mask = futures(self.index, row)
        box = boxes_in_lidar(self.index, row, frame)[0]
        decimals = self.dialect.plan_form.decimals
        answer = format_future(positions[0], mask[0], decimals)
        token = data.token[record].decode()
        return Conversation(
            id=f"{token}_future",
            sample_token=frame.token,
            kind="agent",
            turns=self.dialect.turns("agent", answer, ego),
            reference=answer,
            object_box=tuple(float(value) for value in box),
            meta={
                "class": DETECTION_CLASSES[data.label[record]],
                "annotation_token": token,
                "decimals": str(decimals),
                "driven": future_as_json(positions[0], mask[0]),
            },
        )


@dataclass(frozen=True)
class AgentTrajectoriesConfig(LanguageDataConfig):
    """Settings of AgentTrajectoriesDataModule."""

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return AgentTrajectoriesDataModule(self, tokenizer, dialect)


class AgentTrajectoriesDataModule(LanguageDataModule):
    """Futures of the agents near the car."""

    def make_source(self, split: str) -> AgentFutures:
        """Agents of one split."""
        records: dict[int, tuple[int, ...]] = {}
        for scene in self.scenes(split):
            frames = range(scene.first, scene.last)
            records.update(agents_with_future(self.index, frames, self.config.agent_extent_m))
        if split == "train" and self.config.sampling != "all":
            pairs = [(frame, row) for frame, rows in records.items() for row in rows]
            keep = chosen(self.config.sampling, len(pairs), self.config.seed)
            records = group_by_frame([p for p, kept in zip(pairs, keep, strict=True) if kept])
        return AgentFutures(self.index, self.dialect, records)
