"""What the language data sets have in common: settings, sources of conversations, data module.

A data set is one file: a reader that checks its records, a source that turns the records of a
key-frame into conversations, a config and a data module. The text around a record (system prompt,
scene slots, ego state, question) is the dialect's, see odvla/language/prompts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from datamodules.collate import Tokenises
from datamodules.ego_state import ego_state
from datamodules.nuscenes import NuScenesDataConfig, NuScenesDataModule
from datamodules.picking import ConversationSource, Picker
from datamodules.records import FrameRecord, Index
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import COMMANDS, Conversation, EgoState

_R = TypeVar("_R")


@dataclass(frozen=True)
class LanguageDataConfig(NuScenesDataConfig):
    """Settings all language data sets share."""

    language_root: str = ""  # "" means <root>/language
    conversations_per_frame: int = 1  # of a training row; 0: all
    every_conversation: bool = False  # an epoch goes through all conversations, not all key-frames
    eval_conversations_per_frame: int = 0  # 0: all
    eval_frames_stride: int = 1  # every so-many-th key-frame of a scene talks in evaluation

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        super().__post_init__()
        if self.eval_frames_stride < 1:
            raise UserError(
                f"data.eval_frames_stride must be at least 1, not {self.eval_frames_stride}"
            )
        for name in ("conversations_per_frame", "eval_conversations_per_frame"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} must be 0 (all) or more, not {getattr(self, name)}")

    @property
    def language_folder(self) -> Path:
        """Where the language files lie."""
        return (
            Path(self.language_root).expanduser()
            if self.language_root
            else self.folder / "language"
        )


class LanguageDataModule(NuScenesDataModule):
    """Key-frames with conversations; subclasses say which.

    Args:
        config: a LanguageDataConfig.
        tokenizer: turns conversations into tensors; `texts` works without.
        dialect: the wording of prompts.
    """

    config: LanguageDataConfig

    def __init__(
        self,
        config: LanguageDataConfig,
        tokenizer: Tokenises | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        super().__init__(config, tokenizer)
        self.dialect = dialect or Dialect()
        self.training = self.dialect.training

    def make_source(self, split: str) -> ConversationSource:
        """Read the conversations of "train" or "val".

        Raises:
            UserError: a file is missing or a record does not fit.
        """
        raise NotImplementedError

    def picker(self, split: str) -> Picker:
        """Chooses frames and conversations of a split."""
        config = self.config
        return Picker(
            self.index,
            self.frame_numbers(split),
            self.source(split),
            per_frame=config.conversations_per_frame,
            every=config.every_conversation,
            evaluation_per_frame=config.eval_conversations_per_frame,
            evaluation_stride=config.eval_frames_stride,
            seed=config.seed,
        )

    def conversations(self, split: str) -> Iterator[Conversation]:
        """Every conversation of a split, scene by scene."""
        source = self.source(split)
        assert source is not None
        for scene in self.scenes(split):
            for frame in range(scene.first, scene.last):
                count = source.count(frame)
                ego = ego_state(self.index, self.index.frames[frame]) if count else None
                for number in range(count):
                    assert ego is not None
                    yield source.make(frame, number, ego=ego)

    def texts(self, split: str = "train") -> Iterator[str]:
        """All text of a split's conversations, turn by turn (to train a tokenizer on)."""
        for conversation in self.conversations(split):
            for turn in conversation.turns:
                yield turn.text

    def question(self, sample_token: str, text: str) -> Conversation:
        """A question of the user's own about any sample of the root, still to be answered."""
        frame = self.index.frame(sample_token)
        return Conversation(
            id=f"{sample_token}_question",
            sample_token=sample_token,
            kind="qa",
            turns=self.dialect.turns("qa", None, ego_state(self.index, frame), text),
            reference="",
        )

    def plan_request(self, sample_token: str) -> Conversation:
        """The request for a plan at any sample of the root, still to be answered."""
        frame = self.index.frame(sample_token)
        ego = ego_state(self.index, frame)
        return Conversation(
            id=f"{sample_token}_trajectory",
            sample_token=sample_token,
            kind="plan",
            turns=self.dialect.turns("plan", None, ego),
            reference="",
            meta={
                "command": COMMANDS[int(ego.command[0])],
                **self.dialect.plan_form.as_meta(),
            },
        )


@dataclass(frozen=True)
class FrameRecords(ConversationSource, Generic[_R]):
    """A source that holds, for each key-frame number, the records of one data set."""

    index: Index
    dialect: Dialect
    records: Mapping[int, tuple[_R, ...]]

    def count(self, frame: int) -> int:
        """Records of a key-frame."""
        return len(self.records.get(frame, ()))

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """The conversation about one record."""
        return self.conversation(self.index.frames[frame], number, self.records[frame][number], ego)

    def conversation(
        self, frame: FrameRecord, number: int, record: _R, ego: EgoState
    ) -> Conversation:
        """Word one record."""
        raise NotImplementedError


def group_by_frame(pairs: Iterator[tuple[int, _R]]) -> dict[int, tuple[_R, ...]]:
    """Records by key-frame number, in the order they come."""
    groups: dict[int, list[_R]] = {}
    for frame, record in pairs:
        groups.setdefault(frame, []).append(record)
    return {frame: tuple(records) for frame, records in groups.items()}
