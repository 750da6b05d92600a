"""TOD3Cap: a caption for every annotated object (final_caption_bbox_token.json).

The file is an object keyed by sample_annotation token. OpenDriveVLA asks for the caption and the
object's position, so the answer ends with the centre of the box in the lidar frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.agents import boxes_in_lidar, learnable_rows
from datamodules.caption_table import caption_rows
from datamodules.collate import Tokenises
from datamodules.conversations import (
    FrameRecords,
    LanguageDataConfig,
    LanguageDataModule,
)
from datamodules.joining import Join
from datamodules.records import FrameRecord
from odvla.errors import UserError
from odvla.language.prompts import Dialect
from odvla.types import DETECTION_CLASSES, Conversation, EgoState

NO_ANNOTATION = "its annotation is not in this root"
NO_TARGET = "its object is no target: another class, without points, or outside the extent"
Caption = tuple[int, str]  # annotation row, final caption


def read_tod3cap(join: Join) -> list[tuple[int, Caption]]:
    """Key-frame number and caption of every joined record, in the order of the file.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, token and field.
    """
    index = join.index
    pairs: list[tuple[int, Caption]] = []
    rows = index.annotation_rows
    for token, sample, caption in caption_rows(join.file):
        row = rows.get(token)
        if row is not None and index.frames[int(index.annotations.frame[row])].token != sample:
            belongs = index.frames[int(index.annotations.frame[row])].token
            raise UserError(
                f"{join.file}, {token}: sample_token is {sample!r}, but the annotation belongs to "
                f"sample {belongs!r}"
            )
        frame = join.frame(sample, token)
        if frame is not None and row is not None:
            pairs.append((frame, (row, caption)))
        elif frame is not None:
            join.leave_out(NO_ANNOTATION, token)
    return pairs


def near_captions(
    pairs: list[tuple[int, Caption]], join: Join, extent_m: tuple[float, float, float, float]
) -> list[tuple[int, Caption]]:
    """Only captions of objects that a detector is asked for (see agents.learnable_rows)."""
    index = join.index
    near = {
        frame: set(learnable_rows(index, index.frames[frame], extent_m).tolist())
        for frame in dict(pairs)
    }
    kept = []
    for frame, (row, caption) in pairs:
        if row in near[frame]:
            kept.append((frame, (row, caption)))
        else:
            join.leave_out(NO_TARGET, index.annotations.token[row].decode())
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
        return object_captions(self, split)


def object_captions(data: LanguageDataModule, split: str) -> ObjectCaptions:
    """The source of a data module whose config is a TOD3CapConfig."""
    config = data.config
    assert isinstance(config, TOD3CapConfig)
    join = data.join(config.language_folder / config.caption_file, split, all_splits=True)
    pairs = near_captions(read_tod3cap(join), join, config.agent_extent_m)
    return ObjectCaptions(data.index, data.dialect, *data.part(pairs, split, join.report()))
