"""Ego state and plans against closed forms."""

import math

import numpy as np
import pytest

from datamodules.ego_state import (
    command_of,
    ego_state,
    future_positions,
    past_positions,
)
from datamodules.index_file import load_index
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
