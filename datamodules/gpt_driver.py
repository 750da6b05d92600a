"""Stage 3's data: GPT-Driver's cached nuScenes info (cached_nuscenes_info.pkl, split.json).

The cache is a pickled dict, sample token -> fields of the car and of the agents; only the car's are
kept. The file is read by array_pickles.py, which runs no code of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
from datamodules.joining import Join, JoinReport
from datamodules.language_files import read_json
from datamodules.nucaption import read_nucaption, scene_summaries
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.action_bins import ActionBins
from odvla.language.decisions import decision_of
from odvla.language.prompts import Dialect, PlanDialect
from odvla.types import COMMANDS, HISTORY, WAYPOINTS, Conversation, EgoState

NO_SUMMARY = "nuCaption describes no scene for it, which its plan is to be thought over with"
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


def read_cache(join: Join) -> list[tuple[int, Driven]]:
    """Key-frame number and cached fields of every joined record, in the order of the file.

    Raises:
        UserError: the file is missing or refused, or a record does not fit; it names file, token
            and field.
    """
    path = join.file
    content = load_arrays(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dict keyed by sample token")
    pairs = []
    for token, info in content.items():
        if not isinstance(token, str):
            raise UserError(f"{path}: its keys must be sample tokens, not {token!r}")
        driven = _driven(info, path, token)
        frame = join.frame(token, token)
        if frame is not None:
            pairs.append((frame, driven))
    return pairs


def _driven(info: Any, path: Path, token: str) -> Driven:
    fields = {}
    for name, shape in FIELDS.items():
        if not isinstance(info, dict) or name not in info:
            raise UserError(f"{path}, {token}: field {name!r} is missing")
        try:
            values = np.asarray(info[name], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, {token}: field {name!r} is not numeric") from error
        if values.shape != shape or not np.isfinite(values).all():
            raise UserError(
                f"{path}, {token}: field {name!r} must be finite numbers of shape {shape}, "
                f"its shape is {values.shape}"
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
    content = read_json(join.file)
    tokens = content.get(split) if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{join.file} must hold a list of sample tokens under {split!r}")
    frames = (join.frame(token, token) for token in tokens)
    return {frame for frame in frames if frame is not None}


@dataclass(frozen=True)
class Plans(FrameRecords[Driven]):
    """One conversation a key-frame: the plan.

    With `descriptions`, by key-frame number, a plan is thought over first: the scene is described,
    then comes the decision that the driven path carries out, then the plan.
    """

    ego_from_cache: bool = False
    descriptions: Mapping[int, str] | None = None

    def conversation(
        self, frame: FrameRecord, number: int, record: Driven, ego: EgoState
    ) -> Conversation:
        """Word one plan."""
        if self.ego_from_cache:
            ego = record.ego()
        form = self.dialect.plan_form
        answer = self.dialect.plan_answer(record.waypoints, ego.last_step[0])
        turns, more = self.dialect.turns("plan", answer, ego), {}
        if self.descriptions is not None:
            decision = decision_of(record.waypoints, ego.last_step[0])
            answers = (self.descriptions.get(frame.number, ""), decision, answer)
            turns = self.dialect.thinking_turns(answers, ego)
            more = {"thoughts": "yes", "decision": decision}
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
        pairs = read_cache(join)
        listing: tuple[JoinReport, ...] = ()
        if split == "train" and config.whole_futures_only:
            list_join = self.join(folder / config.split_file, split)
            listed = read_split(list_join, "train")
            listing = (list_join.report(),)
            for frame, _ in pairs:
                if frame not in listed:
                    join.leave_out(NO_WHOLE_FUTURE, self.index.frames[frame].token)
            pairs = [pair for pair in pairs if pair[0] in listed]
        descriptions = None
        if config.thoughts:
            described = self.join(folder / config.nucaption_files[split != "train"], split)
            texts = group_by_frame(read_nucaption(described))
            descriptions = scene_summaries(texts, config.summary_answers)
            listing += (described.report(),)
            if split == "train":
                for frame, _ in pairs:
                    if frame not in descriptions:
                        join.leave_out(NO_SUMMARY, self.index.frames[frame].token)
                pairs = [pair for pair in pairs if pair[0] in descriptions]
        records, reports = self.part(pairs, split, join.report())
        return Plans(
            self.index,
            self.dialect,
            records,
            reports + listing,
            config.ego_from_cache,
            descriptions,
        )

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

    def cached_egos(self, split: str) -> Iterator[tuple[str, EgoState]]:
        """Sample token and cached ego state of every key-frame of a split."""
        source = self.plans(split)
        for scene in self.scenes(split):
            for number in range(scene.first, scene.last):
                if number in source.records:
                    yield self.index.frames[number].token, source.records[number][0].ego()
