"""All files of the seven data sets, written from tables on disk."""

import json
import pickle

import pytest

from datamodules.town.language import write_language
from datamodules.town.planning_cache import scene_infos
from odvla.errors import UserError

FILES = {
    "final_caption_bbox_token.json",
    "nucaption/train.json",
    "nucaption/val.json",
    "nuscenes_qa/NuScenes_train_questions.json",
    "nuscenes_qa/NuScenes_val_questions.json",
    "nux/Nu_X_train.json",
    "nux/Nu_X_val.json",
    "gpt_driver/cached_nuscenes_info.pkl",
    "gpt_driver/split.json",
    "gpt_driver/train.json",
    "drivelm/v1_1_train_nus.json",
    "drivelm/v1_1_val_nus_q_only.json",
    "drivelm/test_eval.json",
}


def write_tables(folder, recorded):
    """The columns that texts are made from, as nuScenes has them."""
    tables = {name: [] for name in ("sensor", "calibrated_sensor", "ego_pose", "sample_data")}
    for token, sample in recorded.samples.items():
        for channel, sensor in sample.sensors.items():
            name = f"{token}/{channel}"
            tables["ego_pose"].append({"token": name, **sensor.ego_pose})
            tables["sample_data"].append(
                {"token": name, "sample_token": token, "ego_pose_token": name,
                 "calibrated_sensor_token": channel, "timestamp": sensor.timestamp_us,
                 "filename": sensor.filename, "is_key_frame": True,
                 "width": sensor.size[0] or None, "height": sensor.size[1] or None}
            )  # fmt: skip
    for channel, sensor in sample.sensors.items():
        tables["sensor"].append({"token": channel, "channel": channel})
        tables["calibrated_sensor"].append(
            {"token": channel, "sensor_token": channel, **sensor.calibration}
        )
    tables["sample"] = [{"token": token, **row} for token, row in recorded.sample_rows.items()]
    tables["sample_annotation"] = [
        {"token": token, "num_lidar_pts": lidar, "num_radar_pts": radar}
        for token, (lidar, radar) in recorded.points.items()
    ]
    tables["category"] = [{"name": name} for name in recorded.categories]
    folder.mkdir(parents=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def content(root):
    folder = root / "language"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_files_are_complete_and_the_same_each_time(told, tmp_path):
    logs = [told.logs["scene-0061"], told.logs["scene-0103"]]
    tokens = told.PlainTokens(logs)
    recorded = told.make_recorded(logs, tokens)
    write_tables(tmp_path / "a" / "v1.0-mini", recorded)
    write_tables(tmp_path / "b" / "v1.0-mini", recorded)
    for root in (tmp_path / "a", tmp_path / "b"):
        write_language(root, "v1.0-mini", logs, tokens, 0)
    files = content(tmp_path / "a")
    omnidrive = {name for name in files if name.startswith("omnidrive/")}
    assert set(files) - omnidrive == FILES
    assert omnidrive == {
        f"omnidrive/{part}/{split}/{name}/{k}.json"
        for part in ("desc", "vqa", "conv", "keywords")
        for split, name in (("train", "scene-0061"), ("val", "scene-0103"))
        for k in range(0, 40, 4)
    }
    assert files == content(tmp_path / "b")
    samples = {split: {f"{name}/{k}" for k in range(40)}
               for split, name in (("train", "scene-0061"), ("val", "scene-0103"))}  # fmt: skip
    for split, expected in samples.items():
        assert set(json.loads(files[f"nux/Nu_X_{split}.json"])) == expected
        captions = json.loads(files[f"nucaption/{split}.json"])
        assert {row["sample_token"] for row in captions} == expected
        questions = json.loads(files[f"nuscenes_qa/NuScenes_{split}_questions.json"])
        assert {row["sample_token"] for row in questions["questions"]} == expected
    split = json.loads(files["gpt_driver/split.json"])
    # GPT-Driver leaves out the train samples without a whole future, and none of val.
    assert split["train"] == [f"scene-0061/{k}" for k in range(34)]
    assert set(split["val"]) == samples["val"]
    cache = pickle.loads(files["gpt_driver/cached_nuscenes_info.pkl"])
    expected = scene_infos(logs[0], tokens, recorded) | scene_infos(logs[1], tokens, recorded)
    assert pickle.dumps(list(cache)) == pickle.dumps(list(expected))
    for token in ("scene-0061/7", "scene-0103/39"):
        for name, value in expected[token].items():
            if name.startswith("gt_ego"):
                assert cache[token][name].tobytes() == value.tobytes()
    assert all(text.isascii() for name, text in files.items() if name.endswith(".json"))


def test_tables_must_come_first(told, tmp_path):
    with pytest.raises(UserError, match=r"sensor\.json"):
        write_language(tmp_path, "v1.0-mini", list(told.logs.values()), told.tokens, 0)
