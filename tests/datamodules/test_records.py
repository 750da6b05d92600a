"""The index against the devkit, and what is said of broken roots."""

import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from scipy.spatial.transform import Rotation

from datamodules.index_file import load_index
from datamodules.poses import inverse, rigid, yaw_of
from datamodules.table_checks import broken_chains, broken_values
from datamodules.tables import Tables, stream_records
from odvla.errors import UserError


@pytest.fixture(scope="module")
def index(circle_root):
    return load_index(circle_root, "v1.0-mini")


def test_rigid_transforms_agree_with_scipy():
    rng = np.random.default_rng(0)
    quaternions, translations = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    matrices = rigid(translations, quaternions)
    expected = Rotation.from_quat(quaternions[:, [1, 2, 3, 0]])
    np.testing.assert_allclose(matrices[:, :3, :3], expected.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(inverse(matrices), np.linalg.inv(matrices), atol=1e-12)
    flat = rigid(np.zeros(3), [math.cos(0.4), 0, 0, math.sin(0.4)])
    assert yaw_of(flat[:3, :3]) == pytest.approx(0.8)


def test_chain_splits_and_poses(index, circles):
    assert [(s.name, s.split) for s in index.scenes] == [
        ("scene-0061", "train"),
        ("scene-0553", "train"),
        ("scene-0103", "val"),
        ("scene-0916", "val"),
    ]
    for scene in index.scenes:
        frames = index.frames[scene.first : scene.last]
        assert len(frames) == circles.SCENES[scene.name][1]
        assert [f.prev for f in frames] == [-1, *range(scene.first, scene.last - 1)]
        assert [f.next for f in frames] == [*range(scene.first + 1, scene.last), -1]
        for k, frame in enumerate(frames):
            x, y, yaw = circles.lidar_pose(scene.name, 0.5 * k)
            np.testing.assert_allclose(frame.lidar_to_global[:3, 3], [x, y, 1.84023], atol=1e-9)
            assert yaw_of(frame.lidar_to_global[:3, :3]) == pytest.approx(
                math.remainder(yaw, math.tau)
            )


def test_velocity_agrees_with_the_devkit(index, circle_root):
    devkit = NuScenes("v1.0-mini", str(circle_root), verbose=False)
    for row, token in enumerate(index.annotations.token):
        expected = np.nan_to_num(devkit.box_velocity(token.decode())[:2])
        np.testing.assert_allclose(index.annotations.velocity[row], expected, atol=1e-9)


def test_index_is_light_and_kept(index, circle_root):
    assert load_index(str(circle_root), "v1.0-mini") is index
    again = pickle.loads(pickle.dumps(index))
    assert again.frames[3].token == index.frames[3].token


def test_can_bus_values_and_missing_scene(index, circles):
    for scene in index.scenes:
        rows = slice(scene.first, scene.last)
        _, frames, speed, rate = circles.SCENES[scene.name]
        if scene.name == "scene-0553":
            assert not index.can_bus.available[rows].any()
            assert not index.can_bus.velocity[rows].any()
            continue
        np.testing.assert_allclose(index.can_bus.velocity[rows, 0], speed)
        np.testing.assert_allclose(index.can_bus.rotation_rate[rows, 2], rate)
        steering = 0.25 + 0.5 * np.arange(frames)
        np.testing.assert_allclose(index.can_bus.steering[rows], steering)


def test_real_sample_loads(shared):
    index = load_index(shared / "data" / "nuscenes-one-sample", "v1.0-mini")
    assert index.frames[0].token == "ca9a282c9e77460f8360f564131a8af5"
    assert len(index.annotations.token) == 68


def test_chains_of_the_real_mini_version_hold(shared):
    folder = shared / "data" / "nuscenes-mini-tables" / "v1.0-mini"
    tables = {name: list(stream_records(folder / f"{name}.json")) for name in ("scene", "sample")}
    assert len(tables["sample"]) == 404
    assert list(broken_chains(tables, folder)) == []


def test_a_chain_ends_at_what_is_no_token(tmp_path):
    sample = {"token": "a", "scene_token": "s", "prev": "", "next": [], "timestamp": 0}
    scene = {"token": "s", "name": "scene-0001", "first_sample_token": "a", "nbr_samples": 2}
    tables = {"sample": [sample], "scene": [scene | {"last_sample_token": "b"}]}
    ends, counts = broken_chains(tables, tmp_path)
    assert "ends with sample a" in ends
    assert "should have 2 key-frames, 1 are linked" in counts


def test_values_of_the_real_mini_version_fit(shared):
    folder = shared / "data" / "nuscenes-mini-tables" / "v1.0-mini"
    tables = {path.stem: list(stream_records(path)) for path in sorted(folder.glob("*.json"))}
    assert len(tables["calibrated_sensor"]) == 120
    assert list(broken_values(tables, folder)) == []


def test_real_can_bus_agrees_with_a_plain_search(shared):
    from datamodules.can_bus import CanBusReader

    root = shared / "data" / "nuscenes-mini-tables"
    samples = json.loads((root / "v1.0-mini" / "sample.json").read_text())
    scene = next(
        s["token"]
        for s in json.loads((root / "v1.0-mini" / "scene.json").read_text())
        if s["name"] == "scene-0103"
    )
    times = sorted(s["timestamp"] for s in samples if s["scene_token"] == scene)
    can = CanBusReader(root).at("scene-0103", np.array(times))
    poses = json.loads((root / "can_bus" / "scene-0103_pose.json").read_text())
    steers = json.loads((root / "can_bus" / "scene-0103_steeranglefeedback.json").read_text())
    for row, t in enumerate(times):
        pose = next((p for p in poses if p["utime"] > t), poses[-1])
        np.testing.assert_array_equal(can.velocity[row], pose["vel"])
        np.testing.assert_array_equal(can.acceleration[row], pose["accel"])
        closest = min(poses, key=lambda m: abs(m["utime"] - t))
        assert can.speed[row] == closest["vel"][0]
        nearest = min(steers, key=lambda m: abs(m["utime"] - t))
        assert can.steering[row] == nearest["value"]


def _broken_root(circles, tmp_path, table, change):
    root = circles.write_root(tmp_path)
    path = root / "v1.0-mini" / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    return root


def test_missing_root_and_version(tmp_path, circle_root):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_index(tmp_path / "nowhere", "v1.0-mini")
    with pytest.raises(UserError, match=r"no version 'v1.0-trainval'; versions found: v1.0-mini"):
        load_index(circle_root, "v1.0-trainval")
    with pytest.raises(UserError, match="'v2' is not one of"):
        load_index(circle_root, "v2")


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("sample_data", "ego_pose_token"),
        ("sample_data", "calibrated_sensor_token"),
        ("sample_annotation", "instance_token"),
        ("sample", "next"),
        ("scene", "log_token"),
    ],
)
def test_dangling_token_is_named(circles, tmp_path, table, field):
    root = _broken_root(
        circles, tmp_path, table, lambda records: records[3].update({field: "gone"})
    )
    record = json.loads((root / "v1.0-mini" / f"{table}.json").read_text())[3]["token"]
    with pytest.raises(UserError, match=rf"{record} of .*{table}\.json: {field} 'gone'"):
        load_index(root, "v1.0-mini")


@pytest.fixture
def changed(circle_root, tmp_path):
    """Makes a copy of the tables in which one of them is changed."""

    def make(table, change):
        folder = tmp_path / "tables"
        shutil.copytree(circle_root / "v1.0-mini", folder, dirs_exist_ok=True)
        path = folder / f"{table}.json"
        records = json.loads(path.read_text())
        changed = change(records)
        path.write_text(changed if isinstance(changed, str) else json.dumps(records))
        return folder, records

    return make


@pytest.mark.parametrize("table", ["ego_pose", "sample", "sample_annotation", "sample_data", "log"])
def test_a_token_twice_is_named(changed, table):
    folder, records = changed(table, lambda records: records.append(dict(records[2])))
    with pytest.raises(UserError) as caught:
        Tables(folder)
    token = records[2]["token"]
    assert str(caught.value) == f"table {folder / table}.json has 2 records with the token {token}"


def test_two_files_of_a_camera_in_one_key_frame_are_named(changed):
    folder, records = changed("sample_data", lambda r: r.append({**r[1], "token": "another"}))
    sample, token = records[1]["sample_token"], records[1]["token"]
    with pytest.raises(UserError, match=rf"{sample} has two key-frames of .*: {token} and another"):
        Tables(folder)


def test_a_chain_that_its_scene_contradicts_is_named(changed, circles):
    """Four key-frames of scene-0553 begin at row 9 of sample.json."""
    names = [circles.token("scene-0553", k) for k in range(4)]

    def said(table, change):
        folder, _ = changed(table, change)
        with pytest.raises(UserError) as caught:
            Tables(folder)
        return str(caught.value).replace(f"{folder}/", "")

    assert said("sample", lambda r: r[10].update(next="")) == (
        f"the chain of scene-0553 ends with sample {names[1]}, its last_sample_token is {names[3]}"
    )
    assert said("scene", lambda r: r[1].update(nbr_samples=5)) == (
        f"scene-0553 should have 5 key-frames, 4 are linked, the last of them {names[3]}"
    )
    assert said("sample", lambda r: r[11].update(prev=names[0])) == (
        f"sample {names[2]} of scene-0553 does not lead back to the one before it"
    )
    assert said("sample", lambda r: r[11].update(timestamp=r[10]["timestamp"])) == (
        f"sample {names[2]} of scene-0553 is not later than the one before it"
    )
    for wrong in (names[0], circles.token("scene-0061", 3)):
        assert said("sample", lambda r, wrong=wrong: r[11].update(next=wrong)) == (
            f"sample {wrong} does not belong where the chain of scene-0553 has it"
        )
    assert said("sample", lambda r: r.append({**r[9], "token": "alone"})) == (
        "sample alone of sample.json belongs to no scene's chain"
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("table", "field", "value", "kind"),
    [
        ("ego_pose", "translation", [NAN, 0.0, 0.0], "three finite numbers"),
        ("ego_pose", "translation", [1.0, 2.0], "three finite numbers"),
        ("ego_pose", "translation", ["1", "2", "3"], "three finite numbers"),
        ("ego_pose", "rotation", [0, 0, 0, 0], "a unit quaternion"),
        ("ego_pose", "rotation", [NAN, 0, 0, 1], "a unit quaternion"),
        ("calibrated_sensor", "translation", None, "three finite numbers"),
        ("calibrated_sensor", "rotation", {"w": 1}, "a unit quaternion"),
        ("calibrated_sensor", "camera_intrinsic", [[1, 2], [3, 4]], "a 3 x 3 matrix with focal"),
        ("calibrated_sensor", "camera_intrinsic", [], "a 3 x 3 matrix with focal lengths"),
        ("calibrated_sensor", "camera_intrinsic", [[NAN] * 3] * 3, "a 3 x 3 matrix with focal"),
        ("sample", "timestamp", NAN, "a whole number"),
        ("sample", "timestamp", "1", "a whole number"),
        ("sample", "timestamp", 10**30, "a whole number"),
        ("sample_data", "filename", 3, "a text"),
        ("sample_data", "height", None, "a whole number"),
        ("sample_annotation", "translation", [NAN] * 3, "three finite numbers"),
        ("sample_annotation", "size", [1.0, 0.0, 1.0], "three finite numbers above 0"),
        ("sample_annotation", "size", [1.0, -2.0, 1.0], "three finite numbers above 0"),
        ("sample_annotation", "size", [1.0, math.inf, 1.0], "three finite numbers above 0"),
        ("sample_annotation", "rotation", [0, 0, 0, 0], "a unit quaternion"),
        ("sample_annotation", "num_lidar_pts", "x", "a whole number"),
        ("scene", "name", None, "a text"),
        ("scene", "description", "\ud83d", "a text"),
        ("log", "location", ["here"], "a text"),
        ("sensor", "channel", 3, "a text"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changed, table, field, value, kind):
    folder, records = changed(table, lambda records: records[2].update({field: value}))
    token = records[2]["token"]
    with pytest.raises(UserError) as caught:
        Tables(folder)
    said = f"record {token} of {folder / table}.json: {field} {value!r} is not {kind}"
    assert str(caught.value).startswith(said)
    changed(table, lambda records: [records[2].pop(field)])
    with pytest.raises(UserError, match=rf"record {token} of .*{table}\.json has no '{field}'"):
        Tables(folder)


@pytest.mark.parametrize("field", ["calibrated_sensor_token", "ego_pose_token", "sample_token"])
@pytest.mark.parametrize("value", [None, 3, [], {"a": 1}])
def test_a_link_that_is_no_token_is_named(changed, field, value):
    folder, _ = changed("sample_data", lambda records: records[2].update({field: value}))
    with pytest.raises(UserError, match=re.escape(f"sample_data.json: {field} {value!r} is not")):
        Tables(folder)


def test_missing_table_camera_and_broken_json(circles, tmp_path):
    root = _broken_root(circles, tmp_path / "a", "sample_data", lambda records: records.pop(1))
    with pytest.raises(UserError, match="no key-frame of CAM_FRONT"):
        load_index(root, "v1.0-mini")
    path = root / "v1.0-mini" / "ego_pose.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"ego_pose\.json is not JSON"):
        load_index(root, "v1.0-mini")
    path.unlink()
    with pytest.raises(UserError, match=r"ego_pose\.json is missing"):
        load_index(root, "v1.0-mini")
