"""Score captions of detected objects as TOD3Cap does: m@kIoU.

TOD3Cap publishes no format of its predictions. Read are: a nuScenes detection submission whose
boxes carry a `caption`, and records of sample_token, size (width, length, height in metres, as
nuScenes has it) and caption.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.caption_table import CaptionTable, ensure_table, open_table
from datamodules.tod3cap import TOD3CapConfig
from experiments.report import Report, ResultTable
from experiments.submissions import Submission, coverage
from odvla.errors import UserError
from odvla.metrics.object_captions import METRICS, THRESHOLDS, ObjectCaption, score_object_captions

if TYPE_CHECKING:
    from datamodules.nuscenes import NuScenesDataModule
    from experiments.score import Found, ScoreRequest


def score_captioned_objects(request: ScoreRequest, submission: Submission) -> Found:
    """Captions of boxes against the captions of the annotated boxes of the split.

    Raises:
        UserError: a box is malformed, no sample belongs to the split, or the captions are missing.
    """
    from experiments.score import Found, open_data

    data = open_data(request.data, request.version)
    path = request.references or Path(request.data) / "language" / TOD3CapConfig().caption_file
    frames = data.frame_numbers(request.split)
    wanted = [data.index.frames[number].token for number in frames]
    counts, said = coverage(submission, wanted)
    captions = open_table(ensure_table(path, data.index, broken=request.broken_captions))
    said += [f"{path}, {token}: {problem}; it is left out" for _, token, problem in captions.broken]
    annotated = _annotated(data, captions, set(frames))
    if not annotated:
        raise UserError(f"{path} holds no caption of the {request.split} split of {request.data}")
    known = set(wanted)
    predicted = [
        _object(box, token, number, submission.path)
        for token, boxes in submission.results.items()
        if token in known
        for number, box in enumerate(boxes)
    ]
    if not predicted:
        raise UserError(
            f"{submission.path} holds no box in any key-frame of the {request.split} split of "
            f"{request.data}"
        )
    found = {k: score_object_captions(predicted, annotated, k) for k in THRESHOLDS}
    table = ResultTable(
        title="object captions",
        columns=(*METRICS, "kept", "of"),
        rows=tuple(
            (
                f"@{threshold}",
                (*(scores.scores[name] for name in METRICS), str(scores.kept), str(scores.total)),
            )
            for threshold, scores in found.items()
        ),
        note=f"TOD3Cap's m@kIoU, x 100: IoU of sizes, scores times kept / all of {len(predicted)} "
        "predictions; objects that nobody described cost nothing.",
        digits=1,
    )
    numbers: dict[str, Any] = {
        "name": request.planner,
        "predictions": str(submission.path),
        "data": str(request.data),
        "version": data.config.version,
        "split": request.split,
        "object_captions": {
            str(threshold): {
                "kept": scores.kept,
                "predictions": scores.total,
                "scores": dict(scores.scores),
            }
            for threshold, scores in found.items()
        },
        "counts": counts,
    }
    return Found(Report(request.planner, (table,), numbers), tuple(said))


def _annotated(
    data: NuScenesDataModule, table: CaptionTable, frames: set[int]
) -> list[ObjectCaption]:
    """Captioned boxes of some key-frames."""
    index = data.index
    boxes = []
    for number in sorted(frames):
        token = index.frames[number].token
        for caption in range(*table.first[number : number + 2].tolist()):
            width, length, height = index.annotations.size[int(table.row[caption])].tolist()
            boxes.append(ObjectCaption(token, (width, length, height), table.text(caption)))
    return boxes


def _object(box: Any, token: str, number: int, path: Path) -> ObjectCaption:
    where = f"{path}, sample {token}, box {number}"
    if not isinstance(box, dict) or not isinstance(box.get("caption"), str):
        raise UserError(f"{where}: field 'caption' must be a text")
    size = box.get("size")
    if not (
        isinstance(size, list)
        and len(size) == 3
        and all(
            isinstance(value, int | float) and 0 < value <= sys.float_info.max for value in size
        )
    ):
        raise UserError(f"{where}: size must be width, length and height in metres, all above 0")
    width, length, height = map(float, size)
    return ObjectCaption(token, (width, length, height), box["caption"])
