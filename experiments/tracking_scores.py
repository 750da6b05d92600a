"""nuScenes tracking scores (AMOTA, AMOTP, identity switches) by the devkit's own evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.detection import samples_of_split, write_submission
from experiments.report import without_nan
from odvla.errors import UserError

# Barriers, cones and construction vehicles are not tracked.
TRACKED = ("bicycle", "bus", "car", "motorcycle", "pedestrian", "trailer", "truck")
FAR_TRACK = {"tracking_name": "car", "tracking_score": 0.0, "tracking_id": "far"}
SCORES = ("amota", "amotp", "ids", "recall", "mota", "motp", "frag")


def global_tracks(
    detections: Sequence[Mapping[str, Any]], track_ids: Sequence[int], scene: str
) -> list[dict[str, Any]]:
    """Boxes in the devkit's detection format as tracks.

    Args:
        detections: as `detection.global_detections` makes them, best first.
        track_ids: who each of them is, -1: not a track, left out.
        scene: name of the scene; ids are counted anew in every scene.
    """
    tracks = []
    for box, track in zip(detections, track_ids, strict=True):
        if track < 0 or box["detection_name"] not in TRACKED:
            continue
        tracks.append(
            {
                **{key: box[key] for key in ("sample_token", "translation", "size", "rotation")},
                "velocity": box["velocity"],
                "tracking_id": f"{scene}-{track}",
                "tracking_name": box["detection_name"],
                "tracking_score": box["detection_score"],
            }
        )
    return tracks


def evaluate_tracks(
    nuscenes: Any,  # nuscenes.nuscenes.NuScenes
    split: str,
    results: Mapping[str, list[dict[str, Any]]],
    folder: Path,
) -> dict[str, Any]:
    """Run nuscenes-devkit's TrackingEval and return its summary.

    Scenes without any result are left out; a key-frame without one in another scene has no tracks.

    Args:
        nuscenes: a loaded NuScenes object.
        split: name of the devkit's split that the key-frames belong to.
        results: sample token -> tracks in the devkit's format.
        folder: the evaluator's files are written here.

    Raises:
        UserError: the devkit does not accept the tracks.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.tracking.evaluate import TrackingEval

    every = samples_of_split(nuscenes, split)
    path = write_submission(folder / "tracks_nusc.json", every, results, FAR_TRACK)
    try:
        evaluation = TrackingEval(
            config=config_factory("tracking_nips_2019"),
            result_path=str(path),
            eval_set=split,
            output_dir=str(folder),
            nusc_version=nuscenes.version,
            nusc_dataroot=nuscenes.dataroot,
            verbose=False,
        )
    except AssertionError as error:
        raise UserError(f"the devkit does not accept the tracks: {error}") from error
    covered = {nuscenes.get("sample", token)["scene_token"] for token in results}
    for tracks in (evaluation.tracks_gt, evaluation.tracks_pred):
        for scene in set(tracks) - covered:
            del tracks[scene]
    metrics, _ = evaluation.evaluate()
    summary = metrics.serialize()
    kept = {key: value for key, value in summary.items() if key in SCORES or key == "label_metrics"}
    return without_nan(kept)
