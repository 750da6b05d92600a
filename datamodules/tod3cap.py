"""TOD3Cap: a caption for every annotated object (final_caption_bbox_token.json).

The file is an object keyed by sample_annotation token. OpenDriveVLA asks for the caption and the
object's position, so the answer ends with the centre of the box in the lidar frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.agents import boxes_in_lidar, learnable_mask
from datamodules.caption_table import CaptionTable, ensure_table, open_table
from datamodules.collate import Tokenises
from datamodules.conversations import LanguageDataConfig, LanguageDataModule
from datamodules.joining import ELSEWHERE, Join, JoinReport
from datamodules.picking import ConversationSource
from datamodules.records import Index
from datamodules.subset import chosen
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import DETECTION_CLASSES, Conversation, EgoState

NO_ANNOTATION = "its annotation is not in this root"
NO_TARGET = "its object is no target: another class, without points, or outside the extent"


@dataclass(frozen=True)
class ObjectCaptions(ConversationSource):
    """One conversation an object: its caption and BEV coordinate.

    Shape legend: K captions of the table, F key-frames of the root.
    """

    index: Index
    dialect: Dialect
    table: CaptionTable
    kept: NDArray[np.bool_]  # [K]
    counts: NDArray[np.int64]  # [F] of those kept
    reports: tuple[JoinReport, ...] = ()

    def count(self, frame: int) -> int:
        """Captions of a key-frame."""
        return int(self.counts[frame])

    def make(self, frame: int, number: int, *, ego: EgoState) -> Conversation:
        """Word one caption."""
        first, last = self.table.first[frame : frame + 2].tolist()
        caption = first + int(np.flatnonzero(self.kept[first:last])[number])
        row, text = int(self.table.row[caption]), self.table.text(caption)
        data, record = self.index.annotations, self.index.frames[frame]
        box = boxes_in_lidar(self.index, np.array([row]), record)[0]
        answer = self.dialect.object_caption_answer(text, float(box[0]), float(box[1]))
        return Conversation(
            id=f"{data.token[row].decode()}_caption",
            sample_token=record.token,
            kind="caption_object",
            turns=self.dialect.turns("caption_object", answer, ego),
            reference=answer,
            object_box=tuple(float(value) for value in box),
            meta={
                "caption": text,
                "class": DETECTION_CLASSES[data.label[row]],
                "annotation_token": data.token[row].decode(),
            },
        )


@dataclass(frozen=True)
class TOD3CapConfig(LanguageDataConfig):
    """Settings of TOD3CapDataModule."""

    caption_file: str = "final_caption_bbox_token.json"
    # So many records of that file may not fit (of others: broken_records).
    broken_captions: int = 0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        super().__post_init__()
        if self.broken_captions < 0:
            raise UserError(f"broken_captions must be 0 or more, not {self.broken_captions}")

    def ensure_table(self, index: Index) -> Path:
        """The table of captions of a root, made if there is none that fits; see there."""
        path = self.language_folder / self.caption_file
        return ensure_table(path, index, broken=self.broken_captions)

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return TOD3CapDataModule(self, tokenizer, dialect)


class TOD3CapDataModule(LanguageDataModule):
    """Object captions on nuScenes key-frames; one file serves both splits."""

    config: TOD3CapConfig

    def prepare_data(self) -> None:
        """Make the index and the table of captions, where there are none."""
        super().prepare_data()
        self.config.ensure_table(self.index)

    def make_source(self, split: str) -> ObjectCaptions:
        """Captions of the objects near the car."""
        return object_captions(self, split)


def object_captions(data: LanguageDataModule, split: str) -> ObjectCaptions:
    """Captions of the objects a detector is asked for (see agents.learnable_rows).

    Args:
        data: a data module whose config is a TOD3CapConfig.
        split: train or val.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, token and field.
    """
    config, index = data.config, data.index
    assert isinstance(config, TOD3CapConfig)
    path = config.language_folder / config.caption_file
    table = open_table(config.ensure_table(index))
    join = data.join(path, split, all_splits=True)
    kept = _joined(table, join)
    near = kept.copy()
    near[kept] = learnable_mask(index, table.row[kept], config.agent_extent_m)
    far = np.flatnonzero(kept & ~near)
    if len(far):
        join.leave_out(NO_TARGET, _token(table, index, _earliest(table, far)), len(far))
    report = join.report()
    if split == "train" and config.sampling != "all":
        numbers = np.flatnonzero(near)
        in_file = numbers[np.argsort(table.place[numbers])]
        part = in_file[chosen(config.sampling, len(in_file), config.seed)]
        near[:] = False
        near[part] = True
        report = replace(report, sampling=config.sampling, kept=len(part))
    counts = np.add.reduceat(np.append(near, False), table.first[:-1], dtype=np.int64)
    counts[np.diff(table.first) == 0] = 0  # reduceat gives these the element they begin at
    return ObjectCaptions(index, data.dialect, table, near, counts, (report,))


def _joined(table: CaptionTable, join: Join) -> NDArray[np.bool_]:
    """[K] captions in key-frames that are wanted; the others are counted."""
    elsewhere, first = table.elsewhere
    broken = table.broken
    join.records = len(table.row) + len(table.missing_frame) + elsewhere + len(broken)
    # What they are about is not to be relied on: they count as left out of every split.
    for _, token, problem in broken:
        join.leave_out(f"it does not fit ({problem})", token)
    join.leave_out(ELSEWHERE, first, elsewhere)
    verdicts = join.verdicts[table.frame]
    missing = join.verdicts[table.missing_frame]
    for number, reason in enumerate(join.reasons):
        captions = np.flatnonzero(verdicts == number)
        without = table.missing_token[missing == number]
        if not reason:
            join.found = len(captions)
            join.leave_out(NO_ANNOTATION, without[0].decode() if len(without) else "", len(without))
            continue
        if len(captions):
            example = _token(table, join.index, _earliest(table, captions))
            join.leave_out(reason, example, len(captions))
        if len(without):
            join.leave_out(reason, without[0].decode(), len(without))
    return verdicts == 0


def _earliest(table: CaptionTable, captions: NDArray[np.int64]) -> int:
    """The first of some captions in the published file."""
    return int(captions[table.place[captions].argmin()])


def _token(table: CaptionTable, index: Index, caption: int) -> str:
    return index.annotations.token[int(table.row[caption])].decode()
