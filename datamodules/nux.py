"""nuX: what the car is doing and why, one record a key-frame (Nu_X_{train,val}.json).

A file is {sample_token: {"narration": text, "reasoning": text}}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
)
from datamodules.joining import Join
from datamodules.language_files import dict_items, read_json, text_field
from datamodules.records import FrameRecord
from odvla.language.prompts import Dialect
from odvla.types import Conversation, EgoState

# The data set has no question of its own.
QUESTION = "What is the car doing now, and for what reason?"
Explained = tuple[str, str]  # narration, reasoning


def read_nux(join: Join) -> list[tuple[int, Explained]]:
    """Key-frame number, narration and reasoning of every joined record, in the order of the file.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, token and field.
    """
    path = join.file
    pairs: list[tuple[int, Explained]] = []
    for sample, record in dict_items(read_json(path), path):
        explained = join.fitting(sample, _explained, record, path, sample)
        if explained is None:
            continue
        frame = join.frame(sample, sample)
        if frame is not None:
            pairs.append((frame, explained))
    return pairs


def _explained(record: Any, path: Path, sample: str) -> Explained:
    narration = text_field(record, "narration", path, sample)
    return narration, text_field(record, "reasoning", path, sample)


def narration_answer(narration: str, reasoning: str) -> str:
    """The target text: scorers split it again at the first full stop, as Hint-AD's does."""
    return f"Narration: {narration.rstrip('.')}. Reasoning: {reasoning.rstrip('.')}."


class Narrations(FrameRecords[Explained]):
    """One conversation a key-frame."""

    def conversation(
        self, frame: FrameRecord, number: int, record: Explained, ego: EgoState
    ) -> Conversation:
        """Word one record."""
        narration, reasoning = record
        answer = narration_answer(narration, reasoning)
        return Conversation(
            id=f"{frame.token}_nux",
            sample_token=frame.token,
            kind="narration",
            turns=self.dialect.turns("narration", answer, ego, QUESTION),
            reference=answer,
            meta={"dataset": "nux", "narration": narration, "reasoning": reasoning},
        )


@dataclass(frozen=True)
class NuXConfig(LanguageDataConfig):
    """Settings of NuXDataModule."""

    nux_files: tuple[str, str] = ("nux/Nu_X_train.json", "nux/Nu_X_val.json")

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return NuXDataModule(self, tokenizer, dialect)


class NuXDataModule(LanguageDataModule):
    """nuX on nuScenes key-frames."""

    config: NuXConfig

    def make_source(self, split: str) -> Narrations:
        """Records of one split's file."""
        path = self.config.language_folder / self.config.nux_files[split != "train"]
        join = self.join(path, split)
        pairs = read_nux(join)
        return Narrations(self.index, self.dialect, *self.part(pairs, split, join.report()))
