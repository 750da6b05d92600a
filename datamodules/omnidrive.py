"""OmniDrive-nuScenes: descriptions, questions, actions and plans, one small file a key-frame.

Folders {desc,vqa,conv,keywords}/{train,val} hold <sample_token>.json: desc {"description": text}
(whatever else is in it is not used), vqa and conv lists of {"question", "answer"}, keywords a text.
A key-frame may lack any of them. The plan is not in the files: it is told from the poses, as
OmniDrive's own loader does (transform_3d.py, LoadAnnoatationVQA). Its questions about boxes and
lanes, which that loader draws anew each time, are not made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from datamodules.collate import Tokenises
from datamodules.conversations import FrameRecords, LanguageDataConfig, LanguageDataModule
from datamodules.joining import Join, JoinReport
from datamodules.language_files import is_unicode, list_items, read_json, text_field
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


def read_part(part: str, join: Join) -> list[tuple[int, Asked]]:
    """Key-frame number and question of every joined file's questions, by token.

    Files of key-frames that are not joined are counted, not opened.

    Args:
        part: one of FOLDERS.
        join: with the folder of a part and split; its records are the files.

    Raises:
        UserError: the folder is missing or empty, or a record does not fit; it names file, record
            and field.
    """
    folder = join.file
    if not folder.is_dir():
        raise UserError(f"language folder {folder} does not exist")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"language folder {folder} holds no <sample token>.json")
    pairs: list[tuple[int, Asked]] = []
    for path in files:
        # Whole, or not at all; and a foreign one is counted without being opened.
        whole = join.fitting(path.name, _records, part, path) if join.wants(path.stem) else []
        if whole is None:
            continue
        frame = join.frame(path.stem, path.name)
        if frame is not None:
            pairs.extend((frame, asked) for asked in whole)
    return pairs


def planned(join: Join, frames: Iterable[int]) -> list[tuple[int, Asked]]:
    """The question for a plan about every key-frame whose next 3 s lie within its scene.

    The answer is told when it is asked for.

    Args:
        join: with the root's tables; its records are the key-frames.
        frames: numbers of the split's key-frames.
    """
    index = join.index
    assert index.ego is not None  # of an index that is ready
    pairs: list[tuple[int, Asked]] = []
    for number in frames:
        token = index.frames[number].token
        if join.frame(token, token) is None:
            continue
        if index.ego.future_mask[number].all():
            pairs.append((number, Asked("planning", 0, PLAN_QUESTION, "")))
        else:
            join.leave_out("less than 3 s of its scene follow", token)
    return pairs


def _records(part: str, path: Path) -> list[Asked]:
    """What a file says."""
    content = read_json(path)
    if part == "keywords":
        return [Asked(part, 0, ACTION_QUESTION, _text(content, path))]
    if part == "desc":
        question = DESCRIPTION_QUESTIONS[crc32(path.stem.encode()) % len(DESCRIPTION_QUESTIONS)]
        return [Asked(part, 0, question, text_field(content, "description", path, "the file"))]
    return [
        Asked(
            part,
            number,
            text_field(record, "question", path, name),
            text_field(record, "answer", path, name),
        )
        for number, (name, record) in enumerate(list_items(content, path))
    ]


def _text(content: Any, path: Path) -> str:
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{path} must hold a text, not {content!r}")
    if not is_unicode(content):
        raise UserError(f"{path} has half a character (a surrogate): {content!r}")
    return content.strip()


class OmniQuestions(FrameRecords[Asked]):
    """One conversation a question."""

    def conversation(
        self, frame: FrameRecord, number: int, record: Asked, ego: EgoState
    ) -> Conversation:
        """Word one question."""
        kind = "omnidrive_plan" if record.part == "planning" else "omnidrive"
        question = f"{place_told(self.index, frame)}{record.question}"
        answer = answer_to(record, self.index, frame)
        return Conversation(
            id=f"{frame.token}_omnidrive_{record.part}_{record.number}",
            sample_token=frame.token,
            kind=kind,
            turns=self.dialect.turns(kind, answer, ego, question),
            reference=answer,
            meta={"dataset": "omnidrive", "part": record.part, "question": record.question},
        )


class WholeKeyFrames(FrameRecords[tuple[Asked, ...]]):
    """One conversation a key-frame: the plan first, then everything else; the place told once."""

    def conversation(
        self, frame: FrameRecord, number: int, record: tuple[Asked, ...], ego: EgoState
    ) -> Conversation:
        """Word a key-frame."""
        answers = [answer_to(asked, self.index, frame) for asked in record]
        question = f"{place_told(self.index, frame)}{record[0].question}"
        turns = list(self.dialect.turns("omnidrive", answers[0], ego, question))
        for asked, answer in zip(record[1:], answers[1:], strict=True):
            turns.append(Turn("user", self.dialect.request("text", None, asked.question)))
            turns.append(Turn("assistant", answer))
        return Conversation(
            id=f"{frame.token}_omnidrive",
            sample_token=frame.token,
            kind="omnidrive",
            turns=tuple(turns),
            reference=answers[-1],
            meta={"dataset": "omnidrive", "part": " ".join(asked.part for asked in record)},
        )


def place_told(index: Index, frame: FrameRecord) -> str:
    """What OmniDrive tells before its first question: the city."""
    return f"You are driving in {index.location(frame).split('-')[0]}. "


def answer_to(asked: Asked, index: Index, frame: FrameRecord) -> str:
    """The answer of a record; a plan is told from the poses."""
    if asked.part != "planning":
        return asked.answer
    points, _ = rear_axle_future(index, frame)
    return PLAN_ANSWER.format(format_rear_axle_plan(points))


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
                f"omnidrive_parts must be some of {', '.join(PARTS)}, not {self.omnidrive_parts}"
            )

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return OmniDriveDataModule(self, tokenizer, dialect)


class OmniDriveDataModule(LanguageDataModule):
    """OmniDrive on nuScenes key-frames."""

    config: OmniDriveConfig

    def make_source(self, split: str) -> OmniQuestions | WholeKeyFrames:
        """Files of one split, and the plans."""
        config, train = self.config, split == "train"
        folder = config.language_folder / config.omnidrive_folder
        records: dict[int, tuple[Asked, ...]] = {}
        reports: tuple[JoinReport, ...] = ()
        for part in PARTS:
            if part not in config.omnidrive_parts:
                continue
            if part == "planning":
                join = self.join(config.folder / config.version, split)
                pairs = planned(join, self.frame_numbers("train" if train else "test"))
            else:
                join = self.join(folder / part / ("train" if train else "val"), split)
                pairs = read_part(part, join)
            found, told = self.part(pairs, split, join.report())
            reports += told
            for frame, asked in found.items():
                records[frame] = (*records.get(frame, ()), *asked)
        if train and config.omnidrive_multi_turn:
            whole = {frame: (asked,) for frame, asked in records.items()}
            return WholeKeyFrames(self.index, self.dialect, whole, reports)
        return OmniQuestions(self.index, self.dialect, records, reports)
