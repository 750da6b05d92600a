"""What the language data sets have in common: settings, sources of conversations, data module.

A data set is one file: a reader that checks its records, a source that turns the records of a
key-frame into conversations, a config and a data module. The text around a record (system prompt,
scene slots, ego state, question) is the dialect's, see odvla/language/prompts.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar, get_args

from datamodules.collate import Tokenises
from datamodules.ego_state import ego_state
from datamodules.joining import Join, JoinReport, Leaks
from datamodules.nuscenes import NuScenesDataConfig, NuScenesDataModule
from datamodules.packed_records import PackedRecords
from datamodules.picking import ConversationSource, Picker
from datamodules.records import FrameRecord, Index
from datamodules.subset import check_sampling, chosen
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
    # The part of the conversations that is trained on: all, first:N, end:N, random:N; N may be a
    # percentage (first:10%). Evaluation always has all.
    sampling: str = "all"
    # Records of a training file about an evaluation scene are refused, or left out and counted.
    leaks: Leaks = "refuse"
    # So many records of a file may not fit (of TOD3Cap's: broken_captions). Each is named in the
    # log, left out and counted.
    broken_records: int = 0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        super().__post_init__()
        if self.eval_frames_stride < 1:
            raise UserError(f"eval_frames_stride must be at least 1, not {self.eval_frames_stride}")
        if self.broken_records < 0:
            raise UserError(f"broken_records must be 0 or more, not {self.broken_records}")
        for name in ("conversations_per_frame", "eval_conversations_per_frame"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 (all) or more, not {getattr(self, name)}")
        check_sampling(self.sampling, "sampling")
        if self.leaks not in get_args(Leaks):
            raise UserError(f"leaks must be refuse or leave_out, not {self.leaks!r}")

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module; every data set's config has its own."""
        raise NotImplementedError

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

    def join(self, file: Path, split: str, *, all_splits: bool = False) -> Join:
        """Finds the key-frames of a file's records.

        Args:
            file: the language file.
            split: "train" or "val" (on v1.0-test: its test scenes).
            all_splits: the file serves all splits; otherwise it is of this one.
        """
        # On v1.0-test, and nowhere else, evaluation scenes are those of the test split.
        scenes = self.scenes("train" if split == "train" else "test")
        return Join(
            file,
            self.index,
            scenes[0].split,
            scenes,
            limit="data.train_scenes" if split == "train" else "data.eval_scenes",
            leaks=None if all_splits else self.config.leaks,
            unfit=self.config.broken_records,
        )

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

    def part(
        self, pairs: Sequence[tuple[int, _R]], split: str, report: JoinReport
    ) -> tuple[dict[int, tuple[_R, ...]], tuple[JoinReport]]:
        """Records by key-frame, in training only those of the configured part.

        Args:
            pairs: (key-frame number, record) in the order of the file.
            split: train or val.
            report: of the join; the part is added to it.
        """
        if split != "train" or self.config.sampling == "all":
            return group_by_frame(pairs), (report,)
        keep = chosen(self.config.sampling, len(pairs), self.config.seed)
        kept = [pair for pair, wanted in zip(pairs, keep, strict=True) if wanted]
        told = replace(report, sampling=self.config.sampling, kept=len(kept))
        return group_by_frame(kept), (told,)

    def join_reports(self, split: str) -> tuple[JoinReport, ...]:
        """What became of the records of a split's files, file by file."""
        source = self.source(split)
        return source.reports if source is not None else ()

    def conversations(self, split: str, every: int = 1) -> Iterator[Conversation]:
        """Every conversation of a split's every n-th key-frame that has any, scene by scene."""
        source = self.source(split)
        assert source is not None
        talked_about = (frame for frame in self.frame_numbers(split) if source.count(frame))
        for frame in islice(talked_about, 0, None, every):
            ego = ego_state(self.index, self.index.frames[frame])
            for number in range(source.count(frame)):
                yield source.make(frame, number, ego=ego)

    def texts(self, split: str = "train", at_most: int | None = None) -> Iterator[str]:
        """Text of a split's conversations, turn by turn (to train a tokenizer on).

        Args:
            split: train or val.
            at_most: so many conversations, give or take a key-frame's, of key-frames that are
                spread evenly over the split; None: all.
        """
        every = 1
        if at_most is not None:
            source = self.source(split)
            assert source is not None
            count = sum(map(source.count, self.frame_numbers(split)))
            every = max(math.ceil(count / at_most), 1)
        for conversation in self.conversations(split, every):
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
        turns, more = self.dialect.turns("plan", None, ego), {}
        whose = getattr(self.config, "thinking", None)
        if whose is not None:
            turns, more = self.dialect.thinking_turns(("", ""), ego), {"thoughts": whose}
        return Conversation(
            id=f"{sample_token}_trajectory",
            sample_token=sample_token,
            kind="plan",
            turns=turns,
            reference="",
            meta={
                "command": COMMANDS[int(ego.command[0])],
                **self.dialect.plan_form.as_meta(),
                **more,
            },
        )


@dataclass(frozen=True)
class FrameRecords(ConversationSource, Generic[_R]):
    """A source that holds, for each key-frame number, the records of one data set: packed."""

    index: Index
    dialect: Dialect
    records: Mapping[int, tuple[_R, ...]]
    reports: tuple[JoinReport, ...] = ()

    def __post_init__(self) -> None:
        """Pack the records."""
        object.__setattr__(self, "records", PackedRecords.of(self.records))

    @property
    def packed(self) -> PackedRecords[_R]:
        """The records."""
        assert isinstance(self.records, PackedRecords)
        return self.records

    def count(self, frame: int) -> int:
        """Records of a key-frame."""
        return self.packed.count(frame)

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """The conversation about one record."""
        record = self.packed.record(frame, number)
        return self.conversation(self.index.frames[frame], number, record, ego)

    def conversation(
        self, frame: FrameRecord, number: int, record: _R, ego: EgoState
    ) -> Conversation:
        """Word one record."""
        raise NotImplementedError


def group_by_frame(pairs: Sequence[tuple[int, _R]]) -> dict[int, tuple[_R, ...]]:
    """Records by key-frame number, in the order they come."""
    groups: dict[int, list[_R]] = {}
    for frame, record in pairs:
        groups.setdefault(frame, []).append(record)
    return {frame: tuple(records) for frame, records in groups.items()}
