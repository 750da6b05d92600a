"""Both conventions of the car's trajectory against recorded labels and real records."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from datamodules.ego_state import command_of, future_positions, past_positions
from datamodules.ego_trajectories import cached_trajectories, mixed_up_yaw, planning_label
from datamodules.gpt_driver import cached_infos, joined
from datamodules.index_file import load_index
from datamodules.joining import Join
from datamodules.poses import rigid
from datamodules.records import index_of_poses
from odvla.types import COMMANDS

GOALS = {"RIGHT": 0, "LEFT": 1, "FORWARD": 2}
# Mount of LIDAR_TOP on the car that drove scene-0103.
BOSTON_LIDAR = rigid(
    [0.985793, 0.0, 1.84019],
    [0.706749235646644, -0.015300993788500868, 0.01739745181256607, -0.7070846669051719],
)
# Real futures and those of the CAN bus's poses, which are those of another localisation at 50 Hz:
# the worst of 39 key-frames differs by 0.181 m, half of them by less than 0.029 m.
CAN_WORST_M, CAN_MEDIAN_M = 0.19, 0.03


def _drive(poses, lidar_to_ego, step_us=500_000):
    """An index of bare poses."""
    quaternions = np.array([p["rotation"] for p in poses], dtype=float)
    times = [p.get("timestamp_us", k * step_us) for k, p in enumerate(poses)]
    ego = rigid([p["translation"] for p in poses], quaternions)
    return index_of_poses(ego, lidar_to_ego, quaternions, np.array(times))


@pytest.fixture(scope="module")
def records(shared):
    """364 real key-frames in GPT-Driver's form."""
    return json.loads((shared / "data" / "nuscenes-mini-trajectories.json").read_text())


@pytest.fixture(scope="module")
def mini(shared):
    """The real v1.0-mini tables there are."""
    folder = shared / "data" / "nuscenes-mini-tables"
    tables = {p.stem: json.loads(p.read_text()) for p in (folder / "v1.0-mini").glob("*.json")}
    return folder, tables


def test_planning_labels_equal_the_reference(shared):
    cases = json.loads((shared / "golden" / "m_sdc_labels.json").read_text())["cases"]
    masked = 0
    for case in cases:
        sensor = case["lidar2ego"]
        index = _drive(case["poses"], rigid(sensor["translation"], sensor["rotation"]))
        label = planning_label(index, index.frames[case["index"]])
        expected_mask = np.array(case["sdc_planning_mask"])[:, 0] > 0
        np.testing.assert_array_equal(label.mask, expected_mask)
        expected = np.array(case["sdc_planning"])
        np.testing.assert_allclose(label.path[:, :2], expected[:, :2], atol=2e-4)
        np.testing.assert_allclose(label.path[:, 2], expected[:, 2], atol=2e-6)
        assert not label.path[~label.mask].any()
        masked += (~label.mask).sum()
        assert label.command == case["command"]
        np.testing.assert_allclose(label.velocity, case["sdc_velocity_lidar"], atol=5e-4)
    assert len(cases) == 20
    assert masked > 20


def test_first_frames_of_all_ten_real_scenes_continue_backwards(records, mini):
    """In the real records of first key-frames, history is the first step continued."""
    by_token = {r["sample_token"]: r for r in records}
    _, tables = mini
    assert len(tables["scene"]) == 10
    for scene in tables["scene"]:
        record = by_token[scene["first_sample_token"]]
        # Lidar at the origin, axes parallel to the global ones.
        steps = [[0.0, 0.0], *record["future"]]
        poses = [{"translation": [x, y, 0.0], "rotation": [1, 0, 0, 0]} for x, y in steps]
        index = _drive(poses, np.eye(4))
        cached = cached_trajectories(index, index.frames[0])
        # Four rounded steps of the rounded first one.
        np.testing.assert_allclose(cached.history[:4], record["history"], atol=0.0251)
        np.testing.assert_allclose(cached.future[1:], record["future"], atol=1e-9)


def test_goal_rule_on_all_real_records(records):
    assert len(records) == 364
    counts = dict.fromkeys(GOALS, 0)
    for record in records:
        assert command_of(np.array(record["future"])) == GOALS[record["goal"]]
        counts[record["goal"]] += 1
    assert counts == {"FORWARD": 309, "LEFT": 33, "RIGHT": 22}


def test_real_can_bus_poses_give_the_real_futures(records, mini):
    """Time stamps and 50 Hz poses of scene-0103 -> paths of its lidar -> the records."""
    folder, tables = mini
    scene = next(s for s in tables["scene"] if s["name"] == "scene-0103")
    samples = [s for s in tables["sample"] if s["scene_token"] == scene["token"]]
    samples.sort(key=lambda sample: sample["timestamp"])
    messages = json.loads((folder / "can_bus" / "scene-0103_pose.json").read_text())
    times = np.array([m["utime"] for m in messages])
    wanted = np.clip([s["timestamp"] for s in samples], times[0], times[-1])
    places = np.array([m["pos"] for m in messages])
    xyz = np.stack([np.interp(wanted, times, column) for column in places.T], axis=-1)
    turns = Rotation.from_quat(np.array([m["orientation"] for m in messages])[:, [1, 2, 3, 0]])
    xyzw = Slerp(times - times[0], turns)(wanted - times[0]).as_quat()
    wxyz = xyzw[:, [3, 0, 1, 2]]
    index = index_of_poses(rigid(xyz, wxyz), BOSTON_LIDAR, wxyz, wanted)
    by_token = {r["sample_token"]: r for r in records}
    errors = []
    for frame, sample in zip(index.frames, samples, strict=True):
        record = by_token.get(sample["token"])
        if record is None:
            continue
        future, mask = future_positions(index, frame)
        errors.append(np.abs(future - record["future"])[mask].max())
        if frame.position >= 4:
            past = past_positions(index, frame)
            assert np.abs(past - record["history"]).max() < 0.1
    assert len(errors) == 39
    assert np.max(errors) < CAN_WORST_M
    assert np.median(errors) < CAN_MEDIAN_M


def test_the_end_of_a_scene_in_both_conventions():
    poses = [{"translation": [4.0 * k, 0, 0], "rotation": [1, 0, 0, 0]} for k in range(4)]
    index = _drive(poses, np.eye(4))
    cached, label = (f(index, index.frames[2]) for f in (cached_trajectories, planning_label))
    assert cached.mask.tolist() == label.mask.tolist() == [True] + [False] * 5
    np.testing.assert_allclose(cached.future[1:], [[4.0, 0.0]] * 6)  # the last point repeated
    np.testing.assert_allclose(label.path[1:], 0)
    np.testing.assert_allclose(cached.future_steps[1:], 0)
    np.testing.assert_allclose(label.path[0], [4.0, 0.0, -np.pi])
    np.testing.assert_allclose(cached.history[:, 0], [-16, -12, -8, -4, 0])
    last = planning_label(index, index.frames[3])
    assert not last.mask.any()
    np.testing.assert_allclose(last.velocity, [8.0, 0.0])  # that of the key-frame before
    alone = _drive(poses[:1], np.eye(4))
    assert not planning_label(alone, alone.frames[0]).velocity.any()
    assert not cached_trajectories(alone, alone.frames[0]).velocity.any()


def test_velocity_quirk_of_the_cache():
    """The heading that the cache turns the speed by is the car's roll."""
    for yaw in (0.0, 1.0, -2.5):
        for roll in (0.0, 0.03):
            quaternion = Rotation.from_euler("ZYX", [yaw, 0.0, roll]).as_quat()[[3, 0, 1, 2]]
            assert mixed_up_yaw(quaternion) == pytest.approx(roll, abs=1e-9)
    turn = [Rotation.from_euler("z", 0.2 * k).as_quat()[[3, 0, 1, 2]] for k in range(3)]
    poses = [
        {"translation": [5.0 * k, k * k, 0], "rotation": q.tolist()} for k, q in enumerate(turn)
    ]
    index = _drive(poses, np.eye(4))
    cached = cached_trajectories(index, index.frames[2])
    np.testing.assert_allclose(cached.velocity, [0.0, 2 * np.hypot(5.0, 3.0)], atol=1e-9)
    assert cached.yaw_rate == pytest.approx(0.0, abs=1e-9)
    first = cached_trajectories(index, index.frames[0])
    np.testing.assert_allclose(first.velocity, [0.0, 2 * np.hypot(5.0, 1.0)], atol=1e-9)


def test_the_towns_cache_is_the_cached_form(town_root):
    """The generator writes the pickle from its own truth; the index knows only the tables."""
    version = next(p.name for p in town_root.glob("v1.0-*"))
    index = load_index(town_root, version)
    path = town_root / "language" / "gpt_driver" / "cached_nuscenes_info.pkl"
    join = Join.whole(path, index)
    records = dict(joined(join, cached_infos(join)))
    assert len(records) == len(index.frames)
    for frame in index.frames:
        fields = records[frame.number].fields
        ours = cached_trajectories(index, frame)
        for name, values in (
            ("gt_ego_his_trajs", ours.history),
            ("gt_ego_his_diff", ours.history_steps),
            ("gt_ego_fut_trajs", ours.future),
            ("gt_ego_lcf_feat", np.array([*ours.velocity, *fields["gt_ego_lcf_feat"][2:]])),
        ):
            # Poses of the tables are rounded to 0.01 mm.
            np.testing.assert_allclose(values, fields[name], atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(ours.mask, fields["gt_ego_fut_masks"] > 0)
        assert ours.command.argmax() == fields["gt_ego_fut_cmd"].argmax()
        assert fields["gt_ego_lcf_feat"][4] == pytest.approx(ours.yaw_rate, abs=1e-6)
        assert index.ego.command[frame.number] == ours.command.argmax()
        np.testing.assert_array_equal(index.ego.cached_velocity[frame.number], ours.velocity)
        label = planning_label(index, frame)
        np.testing.assert_array_equal(index.ego.uniad_path[frame.number], label.path)
    assert COMMANDS[0] == "turn right"
