"""nuScenes detection scores of our boxes, by the devkit's own evaluator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyquaternion import Quaternion

from odvla.errors import UserError
from odvla.types import DETECTION_CLASSES

# The devkit's limit on boxes a sample.
MAX_BOXES = 500
# Faster than this a vehicle, cycle or pedestrian gets the "moving" attribute.
MOVING_MPS = 0.5


def attribute_name(detection_name: str, speed_mps: float) -> str:
    """The attribute most likely for a class at a speed; the devkit wants one a box."""
    moving = speed_mps > MOVING_MPS
    if detection_name in ("car", "truck", "bus", "trailer", "construction_vehicle"):
        return "vehicle.moving" if moving else "vehicle.parked"
    if detection_name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if detection_name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    return ""


def global_detections(
    sample_token: str,
    boxes: NDArray[np.float64],
    labels: Sequence[int],
    scores: Sequence[float],
    lidar_to_global: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """Boxes [Q, 9] of the LIDAR_TOP frame in the devkit's result format, global frame."""
    rotation, translation = lidar_to_global[:3, :3], lidar_to_global[:3, 3]
    turn = Quaternion(matrix=rotation, rtol=1e-5, atol=1e-5)
    order = np.argsort(-np.asarray(scores), kind="stable")[:MAX_BOXES]
    detections = []
    for index in order:
        x, y, z, width, length, height, yaw, vx, vy = boxes[index]
        name = DETECTION_CLASSES[labels[index]]
        detections.append(
            {
                "sample_token": sample_token,
                "translation": (rotation @ [x, y, z] + translation).tolist(),
                "size": [float(width), float(length), float(height)],
                "rotation": (turn * Quaternion(axis=[0, 0, 1], radians=yaw)).elements.tolist(),
                "velocity": (rotation @ [vx, vy, 0.0])[:2].tolist(),
                "detection_name": name,
                "detection_score": float(scores[index]),
                "attribute_name": attribute_name(name, float(np.hypot(vx, vy))),
            }
        )
    return detections


# A box a thousand kilometres away, see `write_submission`.
FAR: dict[str, Any] = {
    "translation": [1e6, 1e6, 0.0],
    "size": [1.0, 1.0, 1.0],
    "rotation": [1.0, 0.0, 0.0, 0.0],
    "velocity": [0.0, 0.0],
}
FAR_DETECTION = {"detection_name": "car", "detection_score": 0.0, "attribute_name": ""}


def evaluate_detections(
    nuscenes: Any,  # nuscenes.nuscenes.NuScenes
    split: str,
    results: Mapping[str, list[dict[str, Any]]],
    folder: Path,
) -> dict[str, Any]:
    """Run nuscenes-devkit's DetectionEval and return its summary.

    Args:
        nuscenes: a loaded NuScenes object.
        split: name of the devkit's split that the key-frames belong to.
        results: sample token -> boxes in the devkit's format; what is scored is these key-frames,
            all of the split or a part of it.
        folder: results_nusc.json and the evaluator's files are written here.

    Raises:
        UserError: the devkit does not accept the boxes.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    every = samples_of_split(nuscenes, split)
    path = write_submission(folder / "results_nusc.json", every, results, FAR_DETECTION)
    try:
        evaluation = DetectionEval(
            nuscenes,
            config=config_factory("detection_cvpr_2019"),
            result_path=str(path),
            eval_set=split,
            output_dir=str(folder),
            verbose=False,
        )
    except AssertionError as error:
        raise UserError(f"the devkit does not accept the detections: {error}") from error
    for boxes in (evaluation.pred_boxes.boxes, evaluation.gt_boxes.boxes):
        for token in set(every) - results.keys():
            boxes.pop(token, None)
    evaluation.sample_tokens = evaluation.gt_boxes.sample_tokens
    metrics, _ = evaluation.evaluate()
    # How long it took would make equal runs look different.
    return {key: value for key, value in metrics.serialize().items() if key != "eval_time"}


def write_submission(
    path: Path,
    every: Sequence[str],
    results: Mapping[str, list[dict[str, Any]]],
    far: Mapping[str, Any],
) -> Path:
    """Write boxes as the devkit reads them.

    The devkit wants the whole split (`every`): key-frames without an entry get no boxes. It also
    wants a box to tell detections from tracks by: where there is none at all it gets `far`, which
    is out of every class's range and so dropped by the devkit itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = dict.fromkeys(("use_lidar", "use_radar", "use_map", "use_external"), False)
    boxes: dict[str, list[dict[str, Any]]] = {token: [] for token in every}
    boxes |= results
    if not any(boxes.values()):
        boxes[every[0]] = [{"sample_token": every[0], **FAR, **far}]
    content = {"meta": {"use_camera": True, **meta}, "results": boxes}
    path.write_text(json.dumps(content))
    return path


def samples_of_split(nuscenes: Any, split: str) -> list[str]:
    """Every key-frame of one of the devkit's splits."""
    from nuscenes.utils.splits import create_splits_scenes

    names = set(create_splits_scenes()[split])
    return [
        sample["token"]
        for sample in nuscenes.sample
        if nuscenes.get("scene", sample["scene_token"])["name"] in names
    ]
