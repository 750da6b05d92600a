"""Ego state and plans against closed forms, recorded labels and real cached trajectories."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.can_bus import CanBus
from datamodules.ego_state import (
    UNIAD_PLAN_POINT_M,
    command_of,
    ego_state,
    future_positions,
    past_positions,
)
from datamodules.poses import rigid
from datamodules.records import load_index
from odvla.types import COMMANDS


@pytest.fixture(scope="module")
def index(circle_root):
    return load_index(circle_root, "v1.0-mini")


def _in_lidar(circles, scene, t0, t):
    x0, y0, yaw = circles.lidar_pose(scene, t0)
    x, y, _ = circles.lidar_pose(scene, t)
    dx, dy = x - x0, y - y0
    return (
        dx * math.cos(yaw) + dy * math.sin(yaw),
        -dx * math.sin(yaw) + dy * math.cos(yaw),
    )


def test_plan_and_history_on_a_circle(index, circles):
    scene = "scene-0061"
    for k in range(9):
        frame = index.frames[k]
        waypoints, mask = future_positions(index, frame)
        assert mask.tolist() == [k + i <= 8 for i in range(1, 7)]
        for i in range(6):
            expected = _in_lidar(circles, scene, 0.5 * k, 0.5 * min(k + i + 1, 8))
            np.testing.assert_allclose(waypoints[i], expected, atol=1e-9)
        if k >= 4:
            expected = [_in_lidar(circles, scene, 0.5 * k, 0.5 * (k - i)) for i in (4, 3, 2, 1)]
            np.testing.assert_allclose(past_positions(index, frame), expected, atol=1e-9)


def test_missing_history_continues_the_oldest_step(index):
    first = index.frames[0]
    step = future_positions(index, first)[0][0]
    expected = [-4 * step, -3 * step, -2 * step, -step]
    np.testing.assert_allclose(past_positions(index, first), expected, atol=1e-9)
    third = past_positions(index, index.frames[2])  # two known points, two continued
    np.testing.assert_allclose(third[0] - third[1], third[1] - third[2], atol=1e-9)


def test_ego_fields_on_a_circle(index, circles):
    for number, scene, sign in ((4, "scene-0061", -1.0), (16, "scene-0103", 1.0)):
        frame = index.frames[number]
        k = frame.position
        _, _, speed, rate = circles.SCENES[scene]
        ego = ego_state(index, frame)
        chord = 2 * speed / abs(rate) * math.sin(abs(rate) * 0.25)
        np.testing.assert_allclose(ego.velocity[0], [0, chord / 0.5], atol=1e-5)
        assert ego.yaw_rate.item() == pytest.approx(rate, abs=1e-5)
        np.testing.assert_allclose(ego.can_accel[0], [0.1, speed * rate], atol=1e-6)
        assert ego.heading_speed.item() == pytest.approx(speed)
        assert ego.steering.item() == pytest.approx(sign * 2 * (0.25 + 0.5 * k) / 2.588, abs=1e-6)
        points = [_in_lidar(circles, scene, 0.5 * k, 0.5 * (k - i)) for i in (2, 1, 0)]
        acceleration = np.diff(np.diff(points, axis=0), axis=0)[0]
        np.testing.assert_allclose(ego.acceleration[0], acceleration, atol=1e-5)


def test_without_can_bus_speed_comes_from_poses(index):
    frame = next(f for f in index.frames if index.scenes[f.scene].name == "scene-0553")
    ego = ego_state(index, frame)
    assert ego.heading_speed.item() == pytest.approx(ego.velocity.norm().item(), abs=1e-5)
    assert ego.steering.item() == 0
    assert not ego.can_accel.any()


@pytest.mark.parametrize(("x", "command"), [(2.0, 0), (-2.0, 1), (1.99, 2), (-1.99, 2)])
def test_command(x, command):
    assert command_of(np.array([[0.0, 1.0], [x, 5.0]])) == command
    assert COMMANDS[0] == "turn right"


def _chain(poses, lidar_to_ego):
    """An index of bare poses: what the plan and history functions need of one."""
    ego_to_global = rigid([p["translation"] for p in poses], [p["rotation"] for p in poses])
    last = len(poses) - 1
    frames = tuple(
        SimpleNamespace(
            number=k,
            prev=k - 1,
            next=k + 1 if k < last else -1,
            ego_to_global=ego_to_global[k],
            lidar_to_global=ego_to_global[k] @ lidar_to_ego,
        )
        for k in range(len(poses))
    )
    zeros = np.zeros((len(poses), 3))
    can = CanBus(zeros, zeros, zeros, zeros[:, 0], zeros[:, 0] > 0)
    return SimpleNamespace(frames=frames, can_bus=can)


def test_plans_and_commands_equal_the_reference(shared):
    cases = json.loads((shared / "golden" / "m_sdc_labels.json").read_text())["cases"]
    for case in cases:
        sensor = case["lidar2ego"]
        index = _chain(case["poses"], rigid(sensor["translation"], sensor["rotation"]))
        frame = index.frames[case["index"]]
        waypoints, mask = future_positions(index, frame, height_m=UNIAD_PLAN_POINT_M)
        expected_mask = np.array(case["sdc_planning_mask"])[:, 0] > 0
        np.testing.assert_array_equal(mask, expected_mask)
        expected = np.array(case["sdc_planning"])[:, :2]
        np.testing.assert_allclose(waypoints[mask], expected[mask], atol=1e-3)
        assert command_of(waypoints) == case["command"]


def test_first_frames_of_real_scenes_continue_backwards_as_ours_do(shared):
    """In GPT-Driver's real records of first frames, history is the first step continued."""
    path = shared / "data" / "nuscenes-mini-trajectories.json"
    records = {r["sample_token"]: r for r in json.loads(path.read_text())}
    tables = shared / "data" / "nuscenes-mini-tables" / "v1.0-mini"
    scenes = json.loads((tables / "scene.json").read_text())
    compared = 0
    for scene in scenes:
        record = records.get(scene["first_sample_token"])
        if record is None:
            continue
        steps = [[0.0, 0.0], *record["future"]]
        # lidar at the origin, axes parallel to the global ones
        poses = [{"translation": [x, y, 0.0], "rotation": [1, 0, 0, 0]} for x, y in steps]
        index = _chain(poses, np.eye(4))
        np.testing.assert_allclose(
            past_positions(index, index.frames[0]), record["history"], atol=0.0251
        )
        compared += 1
    assert compared >= 8


def test_goal_rule_on_real_records(shared):
    path = shared / "data" / "nuscenes-mini-trajectories.json"
    goals = {"RIGHT": 0, "LEFT": 1, "FORWARD": 2}
    for record in json.loads(path.read_text()):
        assert command_of(np.array(record["future"])) == goals[record["goal"]]
