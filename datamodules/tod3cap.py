"""TOD3Cap: a caption for every annotated object (final_caption_bbox_token.json).

The file is an object keyed by sample_annotation token. OpenDriveVLA asks for the caption and the
object's position, so the answer ends with the centre of the box in the lidar frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.agents import boxes_in_lidar, learnable_rows
from datamodules.caption_table import caption_rows
from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
    group_by_frame,
)
from datamodules.language_files import warn_unused
from datamodules.records import FrameRecord, Index
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import DETECTION_CLASSES, Conversation, EgoState

Caption = tuple[int, str]  # annotation row, final caption


def read_tod3cap(path: Path, index: Index) -> dict[int, tuple[Caption, ...]]:
    """Captions by key-frame number.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, token and field.
    """
    pairs: list[tuple[int, Caption]] = []
    rows = index.annotation_rows
    total = 0
    for token, sample, caption in caption_rows(path):
        total += 1
        row = rows.get(token)
        if row is None:
            continue
        frame = int(index.annotations.frame[row])
        if index.frames[frame].token != sample:
            raise UserError(
                f"{path}, {token}: sample_token is {sample!r}, but the annotation belongs to "
                f"sample {index.frames[frame].token!r}"
            )
        pairs.append((frame, (row, caption)))
    warn_unused(path, len(pairs), total)
    return group_by_frame(iter(pairs))


def near_captions(
    captions: dict[int, tuple[Caption, ...]],
    index: Index,
    extent_m: tuple[float, float, float, float],
) -> dict[int, tuple[Caption, ...]]:
    """Only captions of objects that a detector is asked for (see agents.learnable_rows)."""
    kept = {}
    for frame, records in captions.items():
        near = set(learnable_rows(index, index.frames[frame], extent_m).tolist())
        kept[frame] = tuple(record for record in records if record[0] in near)
    return kept


class ObjectCaptions(FrameRecords[Caption]):
    """One conversation an object: its caption and BEV coordinate."""

    def conversation(
        self, frame: FrameRecord, number: int, record: Caption, ego: EgoState
    ) -> Conversation:
        """Word one caption."""
        row, caption = record
        data = self.index.annotations
        box = boxes_in_lidar(self.index, np.array([row]), frame)[0]
        answer = self.dialect.object_caption_answer(caption, float(box[0]), float(box[1]))
        return Conversation(
            id=f"{data.token[row].decode()}_caption",
            sample_token=frame.token,
            kind="caption_object",
            turns=self.dialect.turns("caption_object", answer, ego),
            reference=answer,
            object_box=tuple(float(value) for value in box),
            meta={
                "caption": caption,
                "class": DETECTION_CLASSES[data.label[row]],
                "annotation_token": data.token[row].decode(),
            },
        )


@dataclass(frozen=True)
class TOD3CapConfig(LanguageDataConfig):
    """Settings of TOD3CapDataModule."""

    caption_file: str = "final_caption_bbox_token.json"

    def build(
        self, tokenizer: Tokenises | None = None, dialect: Dialect | None = None
    ) -> LanguageDataModule:
        """The data module."""
        return TOD3CapDataModule(self, tokenizer, dialect)


class TOD3CapDataModule(LanguageDataModule):
    """Object captions on nuScenes key-frames; one file serves both splits."""

    config: TOD3CapConfig

    def make_source(self, split: str) -> ObjectCaptions:
        """Captions of the objects near the car."""
        captions = read_tod3cap(self.config.language_folder / self.config.caption_file, self.index)
        near = near_captions(captions, self.index, self.config.agent_extent_m)
        return ObjectCaptions(self.index, self.dialect, near)
