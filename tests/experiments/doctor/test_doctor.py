"""Every kind of damage done to a town is found and named; whole roots are green."""

import json
import shutil

import cv2
import numpy as np
import pytest

from datamodules.index_file import ensure_index
from experiments.cli import main
from experiments.doctor.data_root import check_data
from experiments.doctor.environment import check_environment
from experiments.doctor.experiment import check_language, check_models, data_place
from experiments.tiny import smoke, tiny
from experiments.verbs.parser import EXIT_FAILED, EXIT_OK
from odvla.config import apply_overrides
from odvla.types import CAMERAS

VERSION = "v1.0-trainval"


def _levels(findings):
    return {finding.check: finding.level for finding in findings}


def test_a_whole_town_is_green(town_root):
    ensure_index(town_root, VERSION)
    found = list(check_data(town_root, VERSION))
    # (Whether the disk is full is not the town's doing.)
    rest = {f.check: f for f in found if not f.check.startswith("disk")}
    assert [f for f in rest.values() if f.level != "green"] == []
    assert len(rest) >= 18


def test_the_real_sample_lacks_what_it_lacks(shared):
    levels = _levels(check_data(shared / "data" / "nuscenes-one-sample", "v1.0-mini"))
    assert [name for name, level in levels.items() if level == "red"] == []
    assert levels["map places"] == levels["splits"] == "yellow"
    assert levels["images"] == levels["image content"] == levels["links"] == "green"


class Tables:
    """Tables of a root, to be changed and written back."""

    def __init__(self, root):
        self.folder = root / VERSION
        self.content = {}

    def __getitem__(self, name):
        if name not in self.content:
            self.content[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self.content[name]

    def write(self):
        for name, records in self.content.items():
            (self.folder / f"{name}.json").write_text(json.dumps(records))


def _copy(town_root, out):
    return shutil.copytree(town_root, out, ignore=shutil.ignore_patterns("language"))


@pytest.fixture(scope="module")
def damaged(town_root, tmp_path_factory):
    """A town with one of each kind of damage; what must be said of it, by check."""
    ensure_index(town_root, VERSION)
    root = _copy(town_root, tmp_path_factory.mktemp("damaged") / "root")
    tables = Tables(root)
    sensor = {s["token"]: s["channel"] for s in tables["sensor"]}
    channel = {c["token"]: sensor[c["sensor_token"]] for c in tables["calibrated_sensor"]}
    named = [(channel[d["calibrated_sensor_token"]], d) for d in tables["sample_data"]]
    cameras = [data for name, data in named if name in CAMERAS]
    sweep = next(data for name, data in named if name == "LIDAR_TOP")
    scenes = [scene["name"] for scene in tables["scene"]]
    places = sorted({log["location"] for log in tables["log"]})
    said = {}

    # Files. The first image is among those that are decoded, whatever the stride; so is the 30th.
    cut, resized, gone, tiny_file = cameras[0], cameras[30], cameras[-1], cameras[-2]
    content = (root / cut["filename"]).read_bytes()
    (root / cut["filename"]).write_bytes(content[: len(content) // 2])
    said["image content"] = ("red", f"{cut['filename']} is cut short")
    image = np.zeros((20, 30, 3), np.uint8) + np.arange(30, dtype=np.uint8)[None, :, None]
    cv2.imwrite(str(root / resized["filename"]), cv2.resize(image, (300, 200)))
    said["image size"] = ("red", "is not of the size the tables give: 300x200, not 96x54")
    (root / gone["filename"]).unlink()
    said["images"] = ("red", f"{gone['filename']} is missing")
    (root / tiny_file["filename"]).write_bytes(b"")
    said["image files"] = ("red", f"{tiny_file['filename']} has only 0 bytes")
    (root / sweep["filename"]).unlink()
    said["lidar"] = ("yellow", sweep["filename"])
    base_map = tables["map"][0]["filename"]
    (root / base_map).unlink()
    said["base maps"] = ("red", base_map)
    (root / "maps" / "expansion" / f"{places[0]}.json").unlink()
    said["map places"] = ("yellow", f"{places[0]}.json is missing")
    expansion = root / "maps" / "expansion" / f"{places[1]}.json"
    expansion.write_text(expansion.read_text()[:-100])
    said["map expansion"] = ("red", f"{places[1]}.json cannot be read")
    (root / "can_bus" / f"{scenes[0]}_pose.json").unlink()
    said["CAN bus"] = ("yellow", f"{scenes[0]}_pose.json is missing")
    (root / "can_bus" / f"{scenes[1]}_pose.json").write_text("[{")
    said["CAN bus files"] = ("red", f"{scenes[1]}_pose.json cannot be read")
    path = root / "can_bus" / f"{scenes[2]}_pose.json"
    messages = json.loads(path.read_text())
    path.write_text(json.dumps([{**m, "utime": m["utime"] + 10**9} for m in messages]))
    said["CAN bus time"] = ("red", f"{scenes[2]}_pose.json is of another time")

    # Tables.
    boxes = tables["sample_annotation"]
    boxes[3]["instance_token"] = "nobody"
    said["links"] = ("red", f"{boxes[3]['token']} of")
    boxes[5]["size"] = [1.0, 0.0, 1.0]
    said["boxes"] = ("red", f"record {boxes[5]['token']} of")
    sample = tables["sample"][4]
    sample["timestamp"] = 5
    said["chains"] = ("red", f"sample {sample['token']}")
    tables["sample_data"].remove(cameras[7])
    said["sensors"] = ("red", f"sample {cameras[7]['sample_token']} has 0 key-frames of")
    tables["ego_pose"][11]["rotation"] = [0, 0, 0, 0]
    said["calibration"] = ("red", f"record {tables['ego_pose'][11]['token']} of")
    tables["attribute"].append(tables["attribute"][0])
    said["tokens twice"] = ("red", "attribute.json has 2 records with the token")
    # A camera file of a val scene is one of a train scene as well (the third scene is val).
    cameras[-10]["filename"] = cameras[300]["filename"]
    cameras[-11]["filename"] = cameras[600]["filename"]
    said["leaks"] = ("red", "of different splits")
    tables.write()
    said["index"] = ("yellow", "stale")
    return root, said


def test_every_damage_is_found_and_named(damaged):
    root, said = damaged
    found = {finding.check: finding for finding in check_data(root, VERSION)}
    for check, (level, text) in said.items():
        assert found[check].level == level, found[check]
        assert text in found[check].found, found[check]
        assert found[check].advice
    others = {f.check for f in found.values() if f.level == "red"} - set(said)
    assert not others
    assert len(said) >= 12


def test_the_verb_prints_json_and_exits_with_1(damaged, capsys, tmp_path):
    root, said = damaged
    arguments = ["doctor", "--data", str(root), "--runs", str(tmp_path)]
    assert main([*arguments, "--json"]) == EXIT_FAILED
    listed = {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {name: listed[name]["level"] for name in said} == {n: v[0] for n, v in said.items()}
    assert set(listed["links"]) == {"check", "level", "found", "advice"}
    assert main(arguments) == EXIT_FAILED
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("red", "yellow", "green")) for line in lines) == len(listed)


def _only_tables(town_root, out):
    shutil.copytree(town_root / VERSION, out / "root" / VERSION)
    return out / "root"


def _missing_table(root):
    (root / VERSION / "instance.json").unlink()
    return "instance.json is missing"


def _cut_table(root):
    path = root / VERSION / "ego_pose.json"
    path.write_text(path.read_text()[:-9])
    return "ego_pose.json is not JSON"


def _other_content(root):
    (root / VERSION / "log.json").write_text('{"a": 1}')
    return "log.json is not a list of records"


@pytest.mark.parametrize("damage", [_missing_table, _cut_table, _other_content])
def test_unreadable_tables_are_named(town_root, tmp_path, damage):
    root = _only_tables(town_root, tmp_path)
    text = damage(root)
    found = {finding.check: finding for finding in check_data(root, VERSION)}
    assert found["tables"].level == "red"
    assert text in found["tables"].found
    assert "links" not in found


def test_missing_roots_versions_and_splits(town_root, tmp_path):
    assert _levels(check_data(tmp_path / "nowhere", VERSION)) == {"data root": "red"}
    root = _only_tables(town_root, tmp_path)
    (wrong,) = check_data(root, "v1.0-mini")
    assert f"versions found: {VERSION}" in wrong.found
    path = root / VERSION / "scene.json"
    scenes = json.loads(path.read_text())
    scenes[0]["name"] = "scene-9999"
    scenes[1]["name"] = scenes[2]["name"]
    path.write_text(json.dumps(scenes))
    found = {finding.check: finding for finding in check_data(root, VERSION)}
    assert found["splits"].level == "yellow"
    assert "1 of 3 scenes are in no split" in found["splits"].found
    assert f"2 scenes are called {scenes[2]['name']}" in found["leaks"].found
    # Nothing but tables is there.
    assert found["images"].level == "red"
    assert "(and 719 more)" in found["images"].found


def test_lines_that_do_not_join_are_told(town_root, tmp_path):
    language = shutil.copytree(town_root / "language", tmp_path / "language")
    lines = (language / "gpt_driver" / "train.json").read_text().split("\n")
    changes = [
        f"data.root={town_root}",
        f"data.version={VERSION}",
        f"data.language_root={language}",
        "run=[planning]",
        "dialect.name=reasoning",
        "data.planning.conversations_file=gpt_driver/train.json",
    ]

    def found(text):
        (language / "gpt_driver" / "train.json").write_text("\n".join(text))
        return {f.check: f for f in check_language(apply_overrides(smoke(), changes))}

    whole = found(lines)
    assert [f.level for f in whole.values()] == ["green"]
    assert f"{len(lines)} train" in whole["texts of planning"].found
    twice = found([*lines, lines[0]])
    assert twice["texts of planning"].level == "green"
    assert twice["lines for planning"].level == "yellow"
    assert "1 left out: an earlier line is about the same key-frame" in (
        twice["lines for planning"].found
    )
    broken = found([*lines[:4], lines[4][:-1]])
    assert broken["texts of planning"].level == "red"
    assert "train.json, line 5 is not JSON" in broken["texts of planning"].found


def test_an_experiments_texts_and_models(town_root, tmp_path, capsys):
    changes = [f"data.root={town_root}", f"data.version={VERSION}"]
    config = apply_overrides(smoke(), changes)
    assert data_place(config) == (town_root, None)
    found = list(check_language(config))
    assert [f.level for f in found] == ["green"] * 4
    assert all("train" in f.found for f in found)
    language = shutil.copytree(town_root / "language", tmp_path / "language")
    broken = apply_overrides(config, [f"data.language_root={language}"])
    (language / broken.data.planning.split_file).unlink()
    (language / broken.data.planning.cache_file).unlink()
    levels = _levels(check_language(broken))
    assert levels["texts of planning"] == "red"
    assert levels["texts of alignment"] == "green"
    assert [f.level for f in check_models(config)] == ["green"]
    nowhere = apply_overrides(config, ["model.language.pretrained=/nowhere/qwen"])
    (finding,) = check_models(nowhere)
    assert finding.level == "red"
    assert "/nowhere/qwen does not exist" in finding.found
    empty = apply_overrides(config, [f"model.language.pretrained={tmp_path}"])
    assert [f.level for f in check_models(empty)] == ["red"]
    assert main(["doctor", "smoke", *changes, "--runs", str(tmp_path)]) == EXIT_OK
    assert "texts of planning" in capsys.readouterr().out


def test_a_town_that_will_be_made_is_no_failure(tmp_path):
    config = apply_overrides(tiny(), [f"data.root={tmp_path}"])
    _, finding = data_place(config)
    assert finding.level == "yellow"
    assert "will make" in finding.advice
    wrong = apply_overrides(tiny(), [f"data.root={tmp_path}", "data.version=v1.0-mini"])
    assert data_place(wrong)[1].level == "red"


def test_the_environment_is_looked_at(tmp_path):
    levels = _levels(check_environment(tmp_path))
    assert set(levels) == {"python", "packages", "gpu", "operations", "disk for runs"}
    assert levels["packages"] == "green"
