"""Anybody's boxes and tracks, by the devkit's own evaluators."""

import json
import math

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name

from datamodules.nuscenes import NuScenesDataConfig
from experiments.detection import evaluate_detections
from experiments.report_tables import other_tables
from experiments.result_files import read_results
from experiments.score import ScoreRequest, score
from experiments.tracking_scores import evaluate_tracks
from odvla.errors import UserError

# What the tracking evaluation looks at.
TRACKED = ("bicycle", "bus", "car", "motorcycle", "pedestrian", "trailer", "truck")


@pytest.fixture(scope="module")
def annotated_boxes(town_root):
    """The val annotations as a submission has them: token -> boxes in the global frame."""
    nuscenes = NuScenes("v1.0-trainval", dataroot=str(town_root), verbose=False)
    index = NuScenesDataConfig(root=str(town_root), version="v1.0-trainval").build().index
    found = {}
    for scene in index.scenes:
        for frame in index.frames[scene.first : scene.last] if scene.split == "val" else ():
            found[frame.token] = boxes = []
            for token in nuscenes.get("sample", frame.token)["anns"]:
                box = nuscenes.get("sample_annotation", token)
                name = category_to_detection_name(box["category_name"])
                if name is None:
                    continue
                velocity = np.nan_to_num(nuscenes.box_velocity(token)[:2]).tolist()
                attributes = [
                    nuscenes.get("attribute", token)["name"] for token in box["attribute_tokens"]
                ]
                boxes.append(
                    {
                        "sample_token": frame.token,
                        "translation": box["translation"],
                        "size": box["size"],
                        "rotation": box["rotation"],
                        "velocity": velocity,
                        "detection_name": name,
                        "detection_score": 0.5,
                        "attribute_name": next(iter(attributes), ""),
                        "tracking_name": name,
                        "tracking_score": 0.5,
                        "tracking_id": box["instance_token"],
                    }
                )
    return found


def test_a_detection_submission_is_scored_by_the_devkit(annotated_boxes, town_root, tmp_path):
    fields = ("tracking_name", "tracking_score", "tracking_id")
    results = {
        token: [{k: v for k, v in box.items() if k not in fields} for box in boxes]
        for token, boxes in annotated_boxes.items()
    }
    first = next(iter(results))
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"meta": {"use_camera": True}, "results": results | {"x": []}}))
    found = score(ScoreRequest(path, town_root))
    assert found.report.numbers["detection"]["mean_dist_aps"]["car"] > 0.99
    assert found.report.numbers["counts"]["extra"] == ["x"]
    assert "1 entries belong to no key-frame of the split: x" in found.said

    path.write_text(json.dumps({"meta": {}, "results": {**results, first: [{"size": [1, 2]}]}}))
    with pytest.raises(UserError, match=rf"sample {first}, box 0: field 'sample_token' is missing"):
        score(ScoreRequest(path, town_root))
    token, (box, *_) = next((t, boxes) for t, boxes in results.items() if boxes)
    for change, message in (
        ({"translation": [0.0, math.inf, 0.0]}, "translation must be 3 numbers"),
        ({"size": [0.0, 1.0, 1.0]}, "size must be above 0"),
        ({"rotation": [0.0, 0.0, 0.0, 0.0]}, "rotation is 0"),
        ({"detection_score": "high"}, "detection_score must be a number, not 'high'"),
        ({"detection_score": math.nan}, "detection_score must be a number, not nan"),
        ({"detection_score": 10**400}, "detection_score must be a number, not 10"),
        ({"translation": [10**400, 0, 0]}, "translation must be 3 numbers"),
        ({"detection_name": "Car"}, "detection_name must be one of car, .*, not 'Car'"),
        ({"attribute_name": "x"}, "attribute_name must be one of .*, not 'x'"),
    ):
        path.write_text(json.dumps({"meta": {}, "results": {**results, token: [box | change]}}))
        with pytest.raises(UserError, match=rf"sample {token}, box 0: {message}"):
            score(ScoreRequest(path, town_root))
    path.write_text(json.dumps({"meta": {}, "results": {**results, token: [box] * 501}}))
    with pytest.raises(UserError, match=rf"sample {token}: 501 boxes, and the devkit takes 500"):
        score(ScoreRequest(path, town_root))
    path.write_text(json.dumps({"meta": {}, "results": {"x": []}}))
    with pytest.raises(UserError, match="none of its 1 samples is a key-frame of the val split"):
        score(ScoreRequest(path, town_root))


def test_a_tracking_submission_is_scored_by_the_devkit(annotated_boxes, town_root, tmp_path):
    fields = ("detection_name", "detection_score", "attribute_name")
    results = {
        token: [
            {k: v for k, v in box.items() if k not in fields}
            for box in boxes
            if box["tracking_name"] in TRACKED
        ]
        for token, boxes in annotated_boxes.items()
    }
    path = tmp_path / "tracks.json"
    path.write_text(json.dumps({"meta": {"use_camera": True}, "results": results}))
    scored = score(ScoreRequest(path, town_root, name="mine"))
    found = scored.report.numbers["tracking"]
    assert found["label_metrics"]["amota"]["car"] > 0.9
    assert found["ids"] == 0
    token, (box, *_) = next((t, boxes) for t, boxes in results.items() if boxes)
    odd = tmp_path / "odd.json"
    for change, message in (
        ({"tracking_id": [1]}, r"tracking_id must be a text, not \[1\]"),
        ({"tracking_name": "barrier"}, "tracking_name must be one of .*, not 'barrier'"),
    ):
        odd.write_text(json.dumps({"meta": {}, "results": {**results, token: [box | change]}}))
        with pytest.raises(UserError, match=rf"sample {token}, box 0: {message}"):
            score(ScoreRequest(odd, town_root))
    scored.write(tmp_path / "out")
    (table,) = other_tables(read_results([tmp_path / "out"]))
    assert table.title == "Tracking"
    cells = tuple(found[name] for name in ("amota", "amotp", "ids", "recall"))
    assert table.rows == (("mine", cells),)


@pytest.mark.parametrize(
    ("evaluate", "fields", "names"),
    [
        (
            evaluate_detections,
            {"detection_name": "car", "detection_score": 0.1, "attribute_name": ""},
            ("mean_ap", "nd_score"),
        ),
        (
            evaluate_tracks,
            {"tracking_name": "car", "tracking_score": 0.1, "tracking_id": "1"},
            ("amota", "amotp", "recall", "mota"),
        ),
    ],
)
def test_who_finds_nothing_scores_as_one_who_finds_nothing_right(
    evaluate, fields, names, annotated_boxes, town_root, tmp_path
):
    nuscenes = NuScenes("v1.0-trainval", dataroot=str(town_root), verbose=False)
    token, (box, *_) = next((t, boxes) for t, boxes in annotated_boxes.items() if boxes)
    # In range of the car, and in a field where nothing stands.
    x, y, z = box["translation"]
    place = next(
        [x + away, y + away, z]
        for away in range(40)
        if all(
            math.dist((x + away, y + away), b["translation"][:2]) > 6
            for b in annotated_boxes[token]
        )
    )
    where = {key: box[key] for key in ("sample_token", "size", "rotation", "velocity")}
    nothing = {t: [] for t in annotated_boxes}
    wrong = evaluate(
        nuscenes, "val", nothing | {token: [{**where, "translation": place, **fields}]}, tmp_path
    )
    none = evaluate(nuscenes, "val", nothing, tmp_path)
    assert [none[name] for name in names] == [wrong[name] for name in names]
    assert none[names[0]] == 0.0
