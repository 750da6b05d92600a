"""NuScenes-QA: short questions with one-word answers (NuScenes_{train,val}_questions.json).

A file is {"info": ..., "questions": [{sample_token, question, answer, template_type, num_hop}]}.
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
from datamodules.language_files import is_unicode, list_items, read_json, text_field
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import Conversation, EgoState

TEMPLATE_TYPES = ("exist", "count", "object", "status", "comparison")
Asked = tuple[str, str, str, int]  # question, answer, template type, hops


def read_nuscenes_qa(join: Join) -> list[tuple[int, Asked]]:
    """Key-frame number and question of every joined record, in the order of the file.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, record and field.
    """
    path = join.file
    content = read_json(path)
    if not isinstance(content, dict) or "questions" not in content:
        raise UserError(f"{path} must hold an object with a list 'questions'")
    pairs: list[tuple[int, Asked]] = []
    for name, record in list_items(content["questions"], path):
        told = join.fitting(name, _asked, record, path, name)
        if told is None:
            continue
        sample, asked = told
        frame = join.frame(sample, name)
        if frame is not None:
            pairs.append((frame, asked))
    return pairs


def _asked(record: Any, path: Path, name: str) -> tuple[str, Asked]:
    """Sample token and question."""
    sample = text_field(record, "sample_token", path, name)
    question = text_field(record, "question", path, name)
    template = text_field(record, "template_type", path, name)
    if template not in TEMPLATE_TYPES:
        raise UserError(f"{path}, {name}: unknown template_type {template!r}")
    answer = record.get("answer")
    # Not bool, which is an int to Python: the file says "yes" and "no".
    if type(answer) not in (str, int) or not str(answer).strip():
        raise UserError(f"{path}, {name}: field 'answer' must be a word or number, not {answer!r}")
    if not is_unicode(str(answer)):
        raise UserError(f"{path}, {name}: field 'answer' has half a character: {answer!r}")
    hops = record.get("num_hop")
    if type(hops) is not int or hops not in (0, 1):
        raise UserError(f"{path}, {name}: field 'num_hop' must be 0 or 1, not {hops!r}")
    return sample, (question, str(answer), template, hops)


class ShortQuestions(FrameRecords[Asked]):
    """One conversation a question."""

    def conversation(
        self, frame: FrameRecord, number: int, record: Asked, ego: EgoState
    ) -> Conversation:
        """Word one question."""
        question, answer, template, hops = record
        return Conversation(
            id=f"{frame.token}_qa_{number}",
            sample_token=frame.token,
            kind="qa",
            turns=self.dialect.turns("qa", answer, ego, question),
            reference=answer,
            meta={
                "dataset": "nuscenes_qa",
                "question": question,
                "template_type": template,
                "num_hop": str(hops),
            },
        )


@dataclass(frozen=True)
class NuScenesQAConfig(LanguageDataConfig):
    """Settings of NuScenesQADataModule."""

    qa_files: tuple[str, str] = (
        "nuscenes_qa/NuScenes_train_questions.json",
        "nuscenes_qa/NuScenes_val_questions.json",
    )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return NuScenesQADataModule(self, tokenizer, dialect)


class NuScenesQADataModule(LanguageDataModule):
    """NuScenes-QA on nuScenes key-frames."""

    config: NuScenesQAConfig

    def make_source(self, split: str) -> ShortQuestions:
        """Questions of one split's file."""
        path = self.config.language_folder / self.config.qa_files[split != "train"]
        join = self.join(path, split)
        pairs = read_nuscenes_qa(join)
        return ShortQuestions(self.index, self.dialect, *self.part(pairs, split, join.report()))
