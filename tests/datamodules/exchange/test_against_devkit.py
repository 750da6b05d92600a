"""Records against slow loops over nuScenes-devkit: tilted boxes and poses, sweeps between."""

import json
import math

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from nuscenes.prediction import PredictHelper
from nuscenes.utils.data_classes import Box
from pyquaternion import Quaternion

from datamodules.exchange.frames import cached_info, goals, uniad_info
from datamodules.exchange.source import Source
from datamodules.index_file import load_index
from odvla.types import CAMERAS

BETWEEN = 3  # sweeps from one key-frame to the next
# The record of the official file, in its order, with the types of numbers.
UNIAD_KEYS = [
    "lidar_path",
    "token",
    "prev",
    "next",
    "can_bus",
    "frame_idx",
    "sweeps",
    "cams",
    "scene_token",
    "lidar2ego_translation",
    "lidar2ego_rotation",
    "ego2global_translation",
    "ego2global_rotation",
    "timestamp",
    "gt_boxes",
    "gt_names",
    "gt_velocity",
    "num_lidar_pts",
    "num_radar_pts",
    "valid_flag",
    "gt_inds",
    "gt_ins_tokens",
    "fut_traj",
    "fut_traj_valid_mask",
    "visibility_tokens",
]
CAMERA_KEYS = [
    "data_path",
    "type",
    "sample_data_token",
    "sensor2ego_translation",
    "sensor2ego_rotation",
    "ego2global_translation",
    "ego2global_rotation",
    "timestamp",
    "sensor2lidar_rotation",
    "sensor2lidar_translation",
    "cam_intrinsic",
]
DTYPES = {
    "can_bus": "f8", "gt_boxes": "f8", "gt_velocity": "f8", "num_lidar_pts": "i8",
    "num_radar_pts": "i8", "valid_flag": "?", "gt_inds": "i8", "fut_traj": "f8",
    "fut_traj_valid_mask": "f8", "visibility_tokens": "i8",
}  # fmt: skip


def tilted(rotation, seed):
    random = np.random.default_rng(seed)
    tilt = Quaternion(axis=[1, 0, 0], angle=random.normal(0, 0.05)) * Quaternion(
        axis=[0, 1, 0], angle=random.normal(0, 0.05)
    )
    return list((Quaternion(rotation) * tilt).elements)


def add_sweeps(samples, files, poses):
    """Lidar files between the key-frames of every scene, chained through the key-frames."""
    by_sample = {f["sample_token"]: f for f in files if "LIDAR_TOP" in f["filename"]}
    pose_of = {pose["token"]: pose for pose in poses}
    for sample in samples:
        if not sample["next"]:
            continue
        here, there = by_sample[sample["token"]], by_sample[sample["next"]]
        before = here
        for k in range(1, BETWEEN + 1):
            token = f"{here['token']}-{k}"
            first, last = pose_of[here["ego_pose_token"]], pose_of[there["ego_pose_token"]]
            part = k / (BETWEEN + 1)
            at = np.array(first["translation"]) * (1 - part) + np.array(last["translation"]) * part
            time = here["timestamp"] + 125_000 * k
            poses.append({**first, "token": token, "timestamp": time, "translation": at.tolist()})
            name = f"sweeps/LIDAR_TOP/{token}.pcd.bin"
            sweep = {**here, "token": token, "ego_pose_token": token, "timestamp": time}
            sweep |= {"is_key_frame": False, "filename": name, "prev": before["token"], "next": ""}
            before["next"] = token
            before = sweep
            files.append(sweep)
        before["next"], there["prev"] = there["token"], before["token"]


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    root = circles.write_root(tmp_path_factory.mktemp("exchange"))
    folder = root / "v1.0-mini"
    names = ("sample", "sample_data", "ego_pose", "sample_annotation", "category")
    tables = {n: json.loads((folder / f"{n}.json").read_text()) for n in names}
    for number, record in enumerate(tables["sample_annotation"]):
        record["rotation"] = tilted(record["rotation"], number)
        record["num_radar_pts"] = number % 3
    # One annotation without neighbours: its velocity cannot be told.
    alone = next(r for r in tables["sample_annotation"] if r["prev"] and not r["next"])
    for record in tables["sample_annotation"]:
        if record["next"] == alone["token"]:
            record["next"] = ""
    alone["prev"] = ""
    for number, record in enumerate(tables["ego_pose"]):
        record["rotation"] = tilted(record["rotation"], number)
    for number, record in enumerate(tables["category"]):
        record["index"] = 10 + number
    add_sweeps(tables["sample"], tables["sample_data"], tables["ego_pose"])
    for name, records in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def devkit(root):
    return NuScenes("v1.0-mini", str(root), verbose=False)


@pytest.fixture(scope="module")
def source(root):
    return Source(load_index(root, "v1.0-mini"), "./data/nuscenes")


def matrix(devkit, file):
    """Sensor to global [4, 4] of a file."""
    mount = devkit.get("calibrated_sensor", file["calibrated_sensor_token"])
    pose = devkit.get("ego_pose", file["ego_pose_token"])
    both = np.eye(4)
    for record in (pose, mount):
        one = Quaternion(record["rotation"]).transformation_matrix
        one[:3, 3] = record["translation"]
        both = both @ one
    return both


def test_keys_and_types_are_those_of_the_official_file(source):
    info = uniad_info(source, source.index.frames[2])
    assert list(info) == UNIAD_KEYS
    assert list(info["cams"]) == list(CAMERAS)
    assert CAMERAS == (
        "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT",
        "CAM_BACK_RIGHT",
    )  # fmt: skip
    assert all(list(camera) == CAMERA_KEYS for camera in info["cams"].values())
    assert all(list(sweep) == CAMERA_KEYS[:-1] for sweep in info["sweeps"])
    for name, dtype in DTYPES.items():
        assert info[name].dtype == np.dtype(dtype), name
    count = len(info["gt_boxes"])
    assert info["fut_traj"].shape == info["fut_traj_valid_mask"].shape == (count, 16, 2)
    assert info["gt_names"].dtype.kind == info["gt_ins_tokens"].dtype.kind == "U"


def test_cameras_and_sweeps(source, devkit):
    for frame in source.index.frames:
        info = uniad_info(source, frame)
        sample = devkit.get("sample", frame.token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        to_lidar = np.linalg.inv(matrix(devkit, lidar))
        expected = [devkit.get("sample_data", sample["data"][name]) for name in CAMERAS]
        earlier = lidar
        while earlier["prev"] and len(expected) < 16:
            earlier = devkit.get("sample_data", earlier["prev"])
            expected.append(earlier)
        found = [*info["cams"].values(), *info["sweeps"]]
        kinds = [*CAMERAS, *["lidar"] * len(info["sweeps"])]
        for one, file, kind in zip(found, expected, kinds, strict=True):
            assert one["sample_data_token"] == file["token"]
            assert one["data_path"] == "./data/nuscenes/" + file["filename"]
            assert (one["type"], one["timestamp"]) == (kind, file["timestamp"])
            wanted = to_lidar @ matrix(devkit, file)
            np.testing.assert_allclose(one["sensor2lidar_rotation"], wanted[:3, :3], atol=1e-9)
            np.testing.assert_allclose(one["sensor2lidar_translation"], wanted[:3, 3], atol=1e-9)
            pose = devkit.get("ego_pose", file["ego_pose_token"])
            assert one["ego2global_rotation"] == pose["rotation"]
        assert len(info["sweeps"]) == min(10, frame.position * (BETWEEN + 1))


def test_boxes_are_the_devkits(source, devkit):
    helper = PredictHelper(devkit)
    unknown = 0
    for frame in source.index.frames:
        info = uniad_info(source, frame)
        sample = devkit.get("sample", frame.token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        _, boxes, _ = devkit.get_sample_data(lidar["token"])
        to_lidar = np.linalg.inv(matrix(devkit, lidar))[:3, :3]
        assert len(boxes) == len(info["gt_boxes"])
        for row, box in enumerate(boxes):
            record = devkit.get("sample_annotation", box.token)
            yaw = -box.orientation.yaw_pitch_roll[0] - np.pi / 2
            expected = [*box.center, *box.wlh, yaw]
            np.testing.assert_allclose(info["gt_boxes"][row], expected, atol=1e-9)
            velocity = to_lidar @ [*devkit.box_velocity(box.token)[:2], 0.0]
            np.testing.assert_allclose(info["gt_velocity"][row], velocity[:2], atol=1e-9)
            unknown += bool(np.isnan(velocity[0]))
            assert info["gt_ins_tokens"][row] == record["instance_token"]
            assert info["gt_inds"][row] == devkit.getind("instance", record["instance_token"])
            assert info["num_radar_pts"][row] == record["num_radar_pts"]
            assert info["num_lidar_pts"][row] == record["num_lidar_pts"]
            assert info["valid_flag"][row] == (
                record["num_lidar_pts"] + record["num_radar_pts"] > 0
            )
            assert info["visibility_tokens"][row] == int(record["visibility_token"])
            future = helper.get_future_for_agent(
                record["instance_token"], frame.token, seconds=8, in_agent_frame=True
            )
            assert info["fut_traj_valid_mask"][row].sum() == 2 * len(future)
            if len(future):
                known = info["fut_traj"][row][: len(future)]
                np.testing.assert_allclose(known, future, atol=1e-9)
            assert not info["fut_traj"][row][len(future) :].any()
    assert unknown == 1
    names = set(uniad_info(source, source.index.frames[1])["gt_names"])
    assert names == {"car", "pedestrian", "truck", "animal", "bus"}


def test_cached_agents_step_from_annotation_to_annotation(source, devkit):
    numbers = {record["name"]: record["index"] for record in devkit.category}
    for frame in source.index.frames:
        info = cached_info(source, frame)
        sample = devkit.get("sample", frame.token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        back = np.linalg.inv(matrix(devkit, lidar))
        for row, token in enumerate(sample["anns"]):
            assert info["gt_tokens"][row] == token
            record = devkit.get("sample_annotation", token)
            assert info["gt_names"][row] == record["category_name"]
            places, yaws = [], []
            while len(places) < 7:
                box = Box(record["translation"], record["size"], Quaternion(record["rotation"]))
                ahead = back[:3, :3] @ box.rotation_matrix[:, 0]
                places.append((back @ [*box.center, 1.0])[:2])
                yaws.append(math.atan2(ahead[1], ahead[0]))
                if not record["next"]:
                    break
                record = devkit.get("sample_annotation", record["next"])
            known = len(places) - 1
            steps = info["gt_agent_fut_trajs"][row].reshape(6, 2)
            np.testing.assert_allclose(steps[:known], np.diff(places, axis=0), atol=1e-4)
            assert not steps[known:].any()
            assert info["gt_agent_fut_masks"][row].tolist() == [1.0] * known + [0.0] * (6 - known)
            np.testing.assert_allclose(
                info["gt_agent_fut_yaw"][row][:known], np.diff(yaws), atol=1e-5
            )
            state = info["gt_agent_lcf_feat"][row]
            box, velocity = info["gt_boxes"][row], info["gt_velocity"][row]
            kind = numbers[info["gt_names"][row]]
            wanted = [*box[:2], -(box[6] + np.pi / 2), *velocity, *box[3:6], kind]
            np.testing.assert_allclose(state, wanted, atol=1e-4)


def test_goals_are_eighths_of_a_circle():
    def steps(x, y):
        return np.tile([[x / 5, y / 5]], (1, 6, 1)) if x or y else np.zeros((1, 6, 2))

    # The first point is left out: five of the six steps count.
    for x, y, goal in (
        (4, 0.1, 4), (0.1, 4, 5), (-0.1, 4, 6), (3, 2, 4), (2, 3, 5), (4, -0.1, 3), (-3, 2, 7),
        (2, -3, 2), (0, 0, 9), (0.9, 0.9, 9), (-4, -3, 9), (0.9, -5, 9),
    ):  # fmt: skip
        assert goals(steps(x, y)) == [goal], (x, y)
    assert goals(np.zeros((0, 6, 2))).shape == (0,)


def test_a_scene_without_can_bus(source):
    frame = next(f for f in source.index.frames if source.scene(f).name == "scene-0553")
    info = cached_info(source, frame)
    assert not info["can_bus"].any()
    assert info["gt_ego_lcf_feat"][7:].tolist() == [0.0, 0.0]
    assert info["gt_ego_lcf_feat"][1] > 1


def test_a_real_key_frame(shared):
    """scene-0061's first key-frame: 68 boxes, real calibrations, CAN messages and categories."""
    root = shared / "data" / "nuscenes-one-sample"
    source = Source(load_index(root, "v1.0-mini"), "./data/nuscenes")
    (frame,) = source.index.frames
    info = uniad_info(source, frame)
    assert list(info) == UNIAD_KEYS
    assert frame.token == "ca9a282c9e77460f8360f564131a8af5"
    assert len(info["gt_boxes"]) == 68
    devkit = NuScenes("v1.0-mini", str(root), verbose=False)
    lidar = devkit.get("sample", frame.token)["data"]["LIDAR_TOP"]
    _, boxes, _ = devkit.get_sample_data(lidar)
    for row, box in enumerate(boxes):
        expected = [*box.center, *box.wlh, -box.orientation.yaw_pitch_roll[0] - np.pi / 2]
        np.testing.assert_allclose(info["gt_boxes"][row], expected, atol=1e-9)
    assert np.linalg.norm(info["can_bus"][3:7]) == pytest.approx(1, abs=1e-3)
    assert 8 < info["can_bus"][13] < 10  # m/s: it moves 4.5 m in half a second
