"""nuCaption: questions about a scene and their descriptive answers (train.json, val.json).

A file is a list of {sample_token, question, answer, answer_lidar}; answer_lidar avoids colours.
BEV-LLM's variant of it (nuCaptionLidarView_{train,val}.json) has a field "view", too: which way the
question looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
)
from datamodules.joining import Join
from datamodules.language_files import list_items, read_json, text_field
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import Conversation, EgoState

ANSWER_FIELDS = ("answer", "answer_lidar")


class Described(NamedTuple):
    """One question about a scene."""

    question: str
    answer: str
    view: str = ""  # "": none is told


def read_nucaption(join: Join, answer_field: str = "answer") -> list[tuple[int, Described]]:
    """Key-frame number, question and answer of every joined record, in the order of the file.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, record and field.
    """
    path = join.file
    pairs: list[tuple[int, Described]] = []
    for name, record in list_items(read_json(path), path):
        told = join.fitting(name, _described, record, path, name, answer_field)
        if told is None:
            continue
        sample, described = told
        frame = join.frame(sample, name)
        if frame is not None:
            pairs.append((frame, described))
    return pairs


def _described(record: Any, path: Path, name: str, answer_field: str) -> tuple[str, Described]:
    """Sample token and what is said of it."""
    sample = text_field(record, "sample_token", path, name)
    question = text_field(record, "question", path, name)
    answer = text_field(record, answer_field, path, name)
    for other in ANSWER_FIELDS:
        if other in record:
            text_field(record, other, path, name)
    view = text_field(record, "view", path, name) if record.get("view") is not None else ""
    return sample, Described(question, answer, view)


def scene_summaries(described: Mapping[int, tuple[Described, ...]], most: int) -> dict[int, str]:
    """A scene in a few sentences, by key-frame number: the distinct answers, `most` at most."""
    return {
        frame: " ".join(list(dict.fromkeys(one.answer for one in records))[:most])
        for frame, records in described.items()
    }


class SceneQuestions(FrameRecords[Described]):
    """One conversation a question about the scene."""

    def conversation(
        self, frame: FrameRecord, number: int, record: Described, ego: EgoState
    ) -> Conversation:
        """Word one question."""
        question, answer, view = record
        return Conversation(
            id=f"{frame.token}_nucaption_{number}",
            sample_token=frame.token,
            kind="caption",
            turns=self.dialect.turns("caption", answer, ego, question),
            reference=answer,
            meta={"dataset": "nucaption", "question": question} | ({"view": view} if view else {}),
        )


@dataclass(frozen=True)
class NuCaptionConfig(LanguageDataConfig):
    """Settings of NuCaptionDataModule."""

    nucaption_files: tuple[str, str] = ("nucaption/train.json", "nucaption/val.json")
    nucaption_answer: str = "answer"  # one of ANSWER_FIELDS

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: an unknown answer field.
        """
        super().__post_init__()
        if self.nucaption_answer not in ANSWER_FIELDS:
            raise UserError(
                f"nucaption_answer must be one of {', '.join(ANSWER_FIELDS)}, "
                f"not {self.nucaption_answer!r}"
            )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return NuCaptionDataModule(self, tokenizer, dialect)


class NuCaptionDataModule(LanguageDataModule):
    """nuCaption on nuScenes key-frames."""

    config: NuCaptionConfig

    def make_source(self, split: str) -> SceneQuestions:
        """Questions of one split's file."""
        path = self.config.language_folder / self.config.nucaption_files[split != "train"]
        join = self.join(path, split)
        pairs = read_nucaption(join, self.config.nucaption_answer)
        return SceneQuestions(self.index, self.dialect, *self.part(pairs, split, join.report()))
