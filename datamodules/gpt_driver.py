"""Stage 3's data: GPT-Driver's cached nuScenes info (cached_nuscenes_info.pkl, split.json).

The cache is a pickled dict, sample token -> fields of the car and of the agents; only the car's are
kept. The file is read by array_pickles.py, which runs no code of it. Its fine-tuning lines are read
by gpt_driver_lines.py.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.array_pickles import load_arrays
from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
    group_by_frame,
)
from datamodules.gpt_driver_thoughts import Fingerprint, join_lines
from datamodules.joining import Join, JoinReport
from datamodules.language_files import read_json
from datamodules.nucaption import read_nucaption, scene_summaries
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.action_bins import ActionBins
from odvla.language.decisions import Decisions, decision_of, meta_action_of
from odvla.language.prompts import Dialect, PlanDialect
from odvla.types import COMMANDS, HISTORY, STEP_S, WAYPOINTS, Conversation, EgoState

NO_SUMMARY = "nuCaption describes no scene for it, which its plan is to be thought over with"
NO_LINE = "no line of GPT-Driver's tells what to think of it"
NO_WHOLE_FUTURE = "split.json does not list it for training"
COMMAND = "gt_ego_fut_cmd"  # right, left, straight on
FLAGS = ("gt_ego_fut_masks", COMMAND)
FIELDS = {
    "gt_ego_his_trajs": (HISTORY + 1, 2),
    "gt_ego_his_diff": (HISTORY, 2),
    "gt_ego_fut_trajs": (WAYPOINTS + 1, 2),
    "gt_ego_fut_masks": (WAYPOINTS,),
    COMMAND: (len(COMMANDS),),
    "gt_ego_lcf_feat": (9,),
}


@dataclass(frozen=True)
class Driven:
    """The car's fields of one cached key-frame, in the lidar frame of t0."""

    waypoints: NDArray[np.float32]  # [6, 2] the next 3 s
    mask: NDArray[np.bool_]  # [6] False: the scene ended, the last point is repeated
    fields: dict[str, NDArray[np.float32]]  # FIELDS

    def ego(self) -> EgoState:
        """The state as the cache has it, one row."""
        lcf, steps = self.fields["gt_ego_lcf_feat"], self.fields["gt_ego_his_diff"]

        def row(values: Any) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values, dtype=np.float32))[None]

        return EgoState(
            velocity=row(lcf[:2]),
            yaw_rate=row(lcf[4]),
            acceleration=row(steps[-1] - steps[-2]),
            can_accel=row(lcf[2:4]),
            heading_speed=row(lcf[7]),
            steering=row(lcf[8]),
            history=row(self.fields["gt_ego_his_trajs"][:HISTORY]),
            command=torch.tensor([int(self.fields[COMMAND].argmax())]),
        )

    def fingerprint(self) -> Fingerprint:
        """What a fine-tuning line tells of it; speeds in metres in 0.5 s."""
        lcf, steps = self.fields["gt_ego_lcf_feat"], self.fields["gt_ego_his_diff"]
        told = (
            lcf[:2] * STEP_S,
            lcf[4:5],
            steps[-1] - steps[-2],
            lcf[2:4],
            lcf[7:8] * STEP_S,
            lcf[8:9],
            self.fields["gt_ego_his_trajs"][:HISTORY].reshape(-1),
            self.waypoints.reshape(-1),
        )
        numbers = np.concatenate(told).astype(np.float64)
        return Fingerprint(numbers, int(self.fields[COMMAND].argmax()))


def joined(join: Join, infos: Mapping[str, Driven]) -> list[tuple[int, Driven]]:
    """Key-frame number and fields of those that are joined."""
    frames = ((join.frame(token, token), driven) for token, driven in infos.items())
    return [(frame, driven) for frame, driven in frames if frame is not None]


def cached_infos(join: Join) -> dict[str, Driven]:
    """The cached fields by sample token, in the order of the file.

    Args:
        join: with the file; it counts records that do not fit, and nothing else yet.

    Raises:
        UserError: the file is missing or refused, or a record does not fit; it names file, token
            and field.
    """
    path = join.file
    content = load_arrays(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dict keyed by sample token")
    for token in content:
        if not isinstance(token, str):
            raise UserError(f"{path}: its keys must be sample tokens, not {token!r}")
    infos = (
        (token, join.fitting(token, _driven, info, path, token)) for token, info in content.items()
    )
    return {token: driven for token, driven in infos if driven is not None}


def _driven(info: Any, path: Path, token: str) -> Driven:
    fields = {}
    if isinstance(info, dict) and info.get("token", token) != token:
        raise UserError(f"{path}, {token}: its field 'token' is {info['token']!r}")
    for name, shape in FIELDS.items():
        if not isinstance(info, dict) or name not in info:
            raise UserError(f"{path}, {token}: field {name!r} is missing")
        try:
            values = np.asarray(info[name], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, {token}: field {name!r} is not numeric") from error
        if values.shape != shape:
            raise UserError(
                f"{path}, {token}: field {name!r} must be numbers of shape {shape}, its shape is "
                f"{values.shape}"
            )
        if not np.isfinite(values).all():
            raise UserError(
                f"{path}, {token}: field {name!r} must be finite numbers, not {values.tolist()}"
            )
        if name in FLAGS and not np.isin(values, (0, 1)).all():
            raise UserError(f"{path}, {token}: field {name!r} must be 0s and 1s, not {values}")
        fields[name] = values
    if fields[COMMAND].sum() != 1:
        raise UserError(
            f"{path}, {token}: field {COMMAND!r} must have a single 1, not {fields[COMMAND]}"
        )
    return Driven(fields["gt_ego_fut_trajs"][1:], fields["gt_ego_fut_masks"] > 0, fields)


def read_split(join: Join, split: str) -> set[int]:
    """Key-frame numbers of the joined tokens in split.json's "train" or "val" list.

    Raises:
        UserError: the file is missing or has no such list of texts.
    """
    frames = (join.frame(token, token) for token in listed_tokens(join.file, split))
    return {frame for frame in frames if frame is not None}


def listed_tokens(path: Path, split: str) -> list[str]:
    """The list itself, in its order.

    Raises:
        UserError: the file is missing or has no such list of texts.
    """
    content = read_json(path)
    tokens = content.get(split) if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path} must hold a list of sample tokens under {split!r}")
    return tokens


@dataclass(frozen=True)
class Thoughts:
    """What to think before a plan, by key-frame number.

    Args:
        whose: whose decisions they are.
        descriptions: of the scene, or of what matters in it; in evaluation some may be missing.
        decisions: as they are told; elsewhere they are read off the driven path.
    """

    whose: Decisions
    descriptions: Mapping[int, str]
    decisions: Mapping[int, str] = field(default_factory=dict)

    def of(self, frame: int, record: Driven, last_step: Any) -> tuple[str | None, str]:
        """Description (None: not known) and decision of a key-frame."""
        if frame in self.decisions:
            decision = self.decisions[frame]
        elif self.whose == "gpt_driver":
            decision = meta_action_of(record.waypoints, record.fields["gt_ego_his_diff"][-1])
        else:
            decision = decision_of(record.waypoints, last_step)
        return self.descriptions.get(frame), decision


@dataclass(frozen=True)
class Plans(FrameRecords[Driven]):
    """One conversation a key-frame: the plan.

    With `thoughts` a plan is thought over first: the scene is described, then comes the decision
    that the driven path carries out, then the plan.
    """

    ego_from_cache: bool = False
    thoughts: Thoughts | None = None

    def conversation(
        self, frame: FrameRecord, number: int, record: Driven, ego: EgoState
    ) -> Conversation:
        """Word one plan."""
        if self.ego_from_cache:
            ego = record.ego()
        form = self.dialect.plan_form
        answer = self.dialect.plan_answer(record.waypoints, ego.last_step[0])
        turns, more = self.dialect.turns("plan", answer, ego), {}
        if self.thoughts is not None:
            said = self.thoughts.of(frame.number, record, ego.last_step[0])
            turns = self.dialect.thinking_turns((*said, answer), ego)
            more = {"thoughts": self.thoughts.whose, "decision": said[1]}
        return Conversation(
            id=f"{frame.token}_trajectory",
            sample_token=frame.token,
            kind="plan",
            turns=turns,
            reference=answer,
            meta={
                "command": COMMANDS[int(ego.command[0])],
                "known_waypoints": str(int(record.mask.sum())),
                **form.as_meta(),
                **more,
            },
        )


@dataclass(frozen=True)
class GPTDriverConfig(LanguageDataConfig):
    """Settings of GPTDriverDataModule."""

    cache_file: str = "gpt_driver/cached_nuscenes_info.pkl"
    split_file: str = "gpt_driver/split.json"
    # GPT-Driver trains on the key-frames of split.json (whole futures: 23,388 of trainval),
    # OpenDriveVLA on all key-frames (28,130), where a missing future repeats its last point.
    whole_futures_only: bool = False
    # The prompt's ego state as the cache has it (yaw rate near 0), for the released checkpoints.
    ego_from_cache: bool = False
    # Think a plan over first: nuCaption's summary of the scene, a decision (odvla/language/
    # decisions.py), then the plan. Key-frames without a summary are not learned from.
    thoughts: bool = False
    summary_answers: int = 2  # nuCaption answers in a summary, at most
    nucaption_files: tuple[str, str] = ("nucaption/train.json", "nucaption/val.json")
    # Think it over as GPT-Driver's fine-tuning lines do instead (its train.json): notable objects
    # and what they may do, its meta-action, then the plan. Key-frames without a line are not
    # learned from; there are none for evaluation, which needs no reference thoughts. "": not so.
    conversations_file: str = ""

    @property
    def thinking(self) -> Decisions | None:
        """Whose decisions come before a plan; None: it is not thought over."""
        if self.conversations_file:
            return "gpt_driver"
        return "odvla" if self.thoughts else None

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> GPTDriverDataModule:
        """The data module."""
        return GPTDriverDataModule(self, tokenizer, dialect)


class GPTDriverDataModule(LanguageDataModule):
    """Plans on nuScenes key-frames."""

    config: GPTDriverConfig

    def make_source(self, split: str) -> Plans:
        """Plans of one split; evaluation always has all key-frames."""
        config, folder = self.config, self.config.language_folder
        join = self.join(folder / config.cache_file, split, all_splits=True)
        infos = cached_infos(join)
        pairs = joined(join, infos)
        listing: tuple[JoinReport, ...] = ()
        if split == "train" and config.whole_futures_only:
            list_join = self.join(folder / config.split_file, split)
            listed = read_split(list_join, "train")
            listing = (list_join.report(),)
            pairs = self._only(pairs, listed, join, NO_WHOLE_FUTURE)
        thoughts = None
        if config.thinking is not None:
            thoughts, reports = self._thoughts(split, infos)
            listing += reports
            if split == "train":
                reason = NO_LINE if config.conversations_file else NO_SUMMARY
                pairs = self._only(pairs, thoughts.descriptions, join, reason)
        records, reports = self.part(pairs, split, join.report())
        return Plans(
            self.index, self.dialect, records, reports + listing, config.ego_from_cache, thoughts
        )

    def _only(
        self, pairs: list[tuple[int, Driven]], wanted: Container[int], join: Join, reason: str
    ) -> list[tuple[int, Driven]]:
        """The plans of wanted key-frames; others are counted as left out."""
        for frame, _ in pairs:
            if frame not in wanted:
                join.leave_out(reason, self.index.frames[frame].token)
        return [pair for pair in pairs if pair[0] in wanted]

    def _thoughts(
        self, split: str, infos: Mapping[str, Driven]
    ) -> tuple[Thoughts, tuple[JoinReport, ...]]:
        """What to think before the plans of a split, and what became of its records."""
        config, folder = self.config, self.config.language_folder
        if not config.conversations_file:
            described = self.join(folder / config.nucaption_files[split != "train"], split)
            texts = group_by_frame(read_nucaption(described))
            summaries = scene_summaries(texts, config.summary_answers)
            return Thoughts("odvla", summaries), (described.report(),)
        if split != "train":
            return Thoughts("gpt_driver", {}), ()
        join = self.join(folder / config.conversations_file, split)
        known = {token: driven.fingerprint() for token, driven in infos.items()}
        lines = join_lines(join, listed_tokens(folder / config.split_file, "train"), known)
        told = Thoughts(
            "gpt_driver",
            {frame: line.thoughts for frame, line in lines},
            {frame: line.decision for frame, line in lines},
        )
        return told, (join.report(),)

    def plans(self, split: str) -> Plans:
        """The plans of a split; its cache is read once."""
        source = self.source(split)
        assert isinstance(source, Plans)
        return source

    def driven(self, split: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Waypoints [N, 6, 2] of a split's key-frames, and which are known [N, 6]."""
        records = self.plans(split).records
        found = [records[n][0] for n in self.frame_numbers(split) if n in records]
        shape = (len(found), WAYPOINTS)
        return (
            np.array([record.waypoints for record in found], np.float32).reshape(*shape, 2),
            np.array([record.mask for record in found], bool).reshape(shape),
        )

    def action_bins(self, count: int) -> ActionBins:
        """The action bins of the training data.

        Raises:
            UserError: it holds no whole future.
        """
        waypoints, mask = self.driven("train")
        return ActionBins.of(waypoints, count, mask)

    def use_bins(self, bins: ActionBins) -> None:
        """Word plans of action tokens by these bins from now on."""
        if not isinstance(self.dialect, PlanDialect):
            raise ValueError("only plans of action tokens have bins")
        self.dialect = replace(self.dialect, bins=bins)
        self._sources = {
            split: replace(self.plans(split), dialect=self.dialect) for split in self._sources
        }
