"""Score a nuScenes detection or tracking submission with the devkit's own evaluators."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES

from experiments.detection import MAX_BOXES, evaluate_detections, samples_of_split
from experiments.evaluation import detection_table, tracking_table
from experiments.report import Report
from experiments.submissions import Submission, coverage
from experiments.tracking_scores import TRACKED, evaluate_tracks
from odvla.errors import UserError
from odvla.types import DETECTION_CLASSES

if TYPE_CHECKING:
    from experiments.score import Found, ScoreRequest

FIELDS = {
    "detection": ("detection_name", "detection_score", "attribute_name"),
    "tracking": ("tracking_name", "tracking_score", "tracking_id"),
}
SHARED = {"sample_token": None, "translation": 3, "size": 3, "rotation": 4, "velocity": 2}
# What the devkit knows by name; a box may have no attribute.
NAMES = {
    "detection_name": DETECTION_CLASSES,
    "attribute_name": (*ATTRIBUTE_NAMES, ""),
    "tracking_name": TRACKED,
}


def score_boxes(request: ScoreRequest, submission: Submission) -> Found:
    """Detections or tracks of a submission.

    Raises:
        UserError: a box is malformed, no sample belongs to the split, or the devkit refuses.
    """
    from nuscenes.nuscenes import NuScenes

    from datamodules.records import SPLITS
    from experiments.score import Found, open_data

    data = open_data(request.data, request.version)
    version = data.config.version
    nuscenes = NuScenes(version, dataroot=str(request.data), verbose=False)
    split = SPLITS[version][request.split]
    wanted = samples_of_split(nuscenes, split)
    counts, said = coverage(submission, wanted)
    if not counts["used"]:
        raise UserError(
            f"{submission.path}: none of its {len(submission.results)} samples is a key-frame of "
            f"the {request.split} split of {request.data}, e.g. {counts['extra'][0]}"
        )
    results = {token: submission.results[token] for token in wanted if token in submission.results}
    for token, boxes in results.items():
        _check(boxes, token, submission)
    with tempfile.TemporaryDirectory() as folder:
        if submission.kind == "detection":
            summary = evaluate_detections(nuscenes, split, results, Path(folder))
            table = detection_table(summary, len(results), request.planner)
        else:
            summary = evaluate_tracks(nuscenes, split, results, Path(folder))
            table = tracking_table(summary, len(results), request.planner)
    numbers: dict[str, Any] = {
        "name": request.planner,
        "predictions": str(submission.path),
        "data": str(request.data),
        "version": version,
        "split": request.split,
        submission.kind: summary,
        "counts": counts,
    }
    return Found(Report(request.planner, (table,), numbers), tuple(said))


def _check(boxes: Any, token: str, submission: Submission) -> None:
    where = f"{submission.path}, sample {token}"
    if not isinstance(boxes, list):
        raise UserError(f"{where}: expected a list of boxes")
    if len(boxes) > MAX_BOXES:
        raise UserError(f"{where}: {len(boxes)} boxes, and the devkit takes {MAX_BOXES} at most")
    for number, box in enumerate(boxes):
        for name in (*SHARED, *FIELDS[submission.kind]):
            if not isinstance(box, dict) or name not in box:
                raise UserError(f"{where}, box {number}: field {name!r} is missing")
        if box["sample_token"] != token:
            raise UserError(f"{where}, box {number}: it names sample {box['sample_token']!r}")
        for name, size in SHARED.items():
            if size is None:
                continue
            values = box[name]
            numeric = isinstance(values, list) and all(map(_finite, values))
            if not numeric or len(values) != size:
                raise UserError(f"{where}, box {number}: {name} must be {size} numbers")
        if min(box["size"]) <= 0:
            raise UserError(f"{where}, box {number}: size must be above 0, not {box['size']}")
        if not any(box["rotation"]):
            raise UserError(f"{where}, box {number}: rotation is 0, no quaternion of a turn")
        score = box[f"{submission.kind}_score"]
        if not _finite(score):
            raise UserError(
                f"{where}, box {number}: {submission.kind}_score must be a number, not {score!r}"
            )
        for name in FIELDS[submission.kind]:
            if name in NAMES and box[name] not in NAMES[name]:
                raise UserError(
                    f"{where}, box {number}: {name} must be one of "
                    f"{', '.join(filter(None, NAMES[name]))}, not {box[name]!r}"
                )
        if not isinstance(box.get("tracking_id", ""), str | int):
            raise UserError(
                f"{where}, box {number}: tracking_id must be a text, not {box['tracking_id']!r}"
            )


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can be, and not NaN."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
