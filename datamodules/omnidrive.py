"""OmniDrive-nuScenes: descriptions, questions, actions and plans, one small file a key-frame.

Folders {desc,vqa,conv,keywords}/{train,val} hold <sample_token>.json: desc {"description": text}
(whatever else is in it is not used), vqa and conv lists of {"question", "answer"}, keywords a text.
A key-frame may lack any of them. The plan is not in the files: it is told from the poses, as
OmniDrive's own loader does (transform_3d.py, LoadAnnoatationVQA). Its questions about boxes and
lanes, which that loader draws anew each time, are not made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
    group_by_frame,
)
from datamodules.language_files import list_items, read_json, text_field, warn_unused
from datamodules.rear_axle import rear_axle_future
from datamodules.records import FrameRecord, Index
from odvla.errors import UserError
from odvla.language.omnidrive_plan import format_rear_axle_plan
from odvla.language.prompts import Dialect
from odvla.types import Conversation, EgoState, Turn

# In the order in which they make up a whole conversation; "planning" has no folder.
FOLDERS = ("keywords", "desc", "vqa", "conv")
PARTS = ("planning", *FOLDERS)
PLAN_QUESTION = "Please provide the planning trajectory for the ego car without reasons."
PLAN_ANSWER = "Here is the planning trajectory {}."
ACTION_QUESTION = "In a few words, what do you do now?"
# The files have descriptions without questions.
DESCRIPTION_QUESTIONS = (
    "Describe what the cameras show.",
    "What do the cameras show of the drive?",
    "How does the scene around you look?",
    "What are road, weather and traffic like around you?",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a key-frame."""

    part: str  # one of PARTS
    number: int  # place in its file
    question: str
    answer: str


def read_omnidrive(
    folder: Path, split: str, index: Index, parts: tuple[str, ...] = FOLDERS
) -> dict[int, tuple[Asked, ...]]:
    """Questions by key-frame number.

    Files of samples that the root does not have are counted, not opened.

    Args:
        folder: that the folders of the parts lie in.
        split: "train" or "val".
        index: the root's index.
        parts: some of FOLDERS.

    Raises:
        UserError: a folder is missing or empty, or a record does not fit; it names file, record and
            field.
    """
    pairs: list[tuple[int, Asked]] = []
    for part in FOLDERS:
        if part not in parts:
            continue
        files = _files(folder / part / split)
        used = 0
        for path in files:
            number = index.number_of_token.get(path.stem)
            if number is not None:
                used += 1
                pairs.extend((number, asked) for asked in _records(part, path))
        warn_unused(folder / part / split, used, len(files))
    return group_by_frame(iter(pairs))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"language folder {folder} does not exist")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"language folder {folder} holds no <sample token>.json")
    return files


def _records(part: str, path: Path) -> Iterator[Asked]:
    """What a file says."""
    content = read_json(path)
    if part == "keywords":
        yield Asked(part, 0, ACTION_QUESTION, _text(content, path))
    elif part == "desc":
        question = DESCRIPTION_QUESTIONS[crc32(path.stem.encode()) % len(DESCRIPTION_QUESTIONS)]
        yield Asked(part, 0, question, text_field(content, "description", path, "the file"))
    else:
        for number, (name, record) in enumerate(list_items(content, path)):
            question = text_field(record, "question", path, name)
            yield Asked(part, number, question, text_field(record, "answer", path, name))


def _text(content: Any, path: Path) -> str:
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{path} must hold a text, not {content!r}")
    return content.strip()


@dataclass(frozen=True)
class OmniQuestions(FrameRecords[Asked]):
    """One conversation a question.

    Args:
        planning: with the plan of every key-frame whose 3 s lie within its scene, as number 0.
        whole: all questions of a key-frame are one conversation, the plan first.
    """

    planning: bool = True
    whole: bool = False

    def count(self, frame: int) -> int:
        """Conversations of a key-frame."""
        asked = super().count(frame) + self._planned(frame)
        return min(asked, 1) if self.whole else asked

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """The conversation about one record, or about all of them."""
        records = self.records.get(frame, ())
        if self._planned(frame):
            records = (self._plan(self.index.frames[frame]), *records)
        if self.whole:
            return self._joined(self.index.frames[frame], records, ego)
        return self.conversation(self.index.frames[frame], number, records[number], ego)

    def conversation(
        self, frame: FrameRecord, number: int, record: Asked, ego: EgoState
    ) -> Conversation:
        """Word one question."""
        kind = "omnidrive_plan" if record.part == "planning" else "omnidrive"
        return Conversation(
            id=f"{frame.token}_omnidrive_{record.part}_{record.number}",
            sample_token=frame.token,
            kind=kind,
            turns=self.dialect.turns(
                kind, record.answer, ego, f"{self._place(frame)}{record.question}"
            ),
            reference=record.answer,
            meta={"dataset": "omnidrive", "part": record.part, "question": record.question},
        )

    def _joined(
        self, frame: FrameRecord, records: tuple[Asked, ...], ego: EgoState
    ) -> Conversation:
        """All questions of a key-frame, the place told once."""
        first = self.conversation(frame, 0, records[0], ego)
        turns = list(first.turns)
        for asked in records[1:]:
            turns.append(Turn("user", self.dialect.request("text", None, asked.question)))
            turns.append(Turn("assistant", asked.answer))
        return Conversation(
            id=f"{frame.token}_omnidrive",
            sample_token=frame.token,
            kind="omnidrive",
            turns=tuple(turns),
            reference=records[-1].answer,
            meta={"dataset": "omnidrive", "part": " ".join(asked.part for asked in records)},
        )

    def _planned(self, frame: int) -> bool:
        return self.planning and bool(self.index.ego.future_mask[frame].all())

    def _plan(self, frame: FrameRecord) -> Asked:
        points, _ = rear_axle_future(self.index, frame)
        answer = PLAN_ANSWER.format(format_rear_axle_plan(points))
        return Asked("planning", 0, PLAN_QUESTION, answer)

    def _place(self, frame: FrameRecord) -> str:
        """What OmniDrive tells before its first question: the city."""
        return f"You are driving in {self.index.location(frame).split('-')[0]}. "


@dataclass(frozen=True)
class OmniDriveConfig(LanguageDataConfig):
    """Settings of OmniDriveDataModule."""

    omnidrive_folder: str = "omnidrive"  # in the language folder
    omnidrive_parts: tuple[str, ...] = PARTS
    # Train on whole key-frames, all questions of one in turn; evaluation asks them one by one.
    omnidrive_multi_turn: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: no part, or an unknown one.
        """
        super().__post_init__()
        if not self.omnidrive_parts or set(self.omnidrive_parts) - set(PARTS):
            raise UserError(
                f"data.omnidrive_parts must be some of {', '.join(PARTS)}, not "
                f"{self.omnidrive_parts}"
            )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return OmniDriveDataModule(self, tokenizer, dialect)


class OmniDriveDataModule(LanguageDataModule):
    """OmniDrive on nuScenes key-frames."""

    config: OmniDriveConfig

    def make_source(self, split: str) -> OmniQuestions:
        """Files of one split, and the plans."""
        config, train = self.config, split == "train"
        folder = config.language_folder / config.omnidrive_folder
        return OmniQuestions(
            self.index,
            self.dialect,
            read_omnidrive(folder, "train" if train else "val", self.index, config.omnidrive_parts),
            planning="planning" in config.omnidrive_parts,
            whole=train and config.omnidrive_multi_turn,
        )
