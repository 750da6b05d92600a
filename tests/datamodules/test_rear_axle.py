"""The rear axle's way and the lidar's, against circles that are known in closed form."""

import math

import numpy as np
import pytest

from datamodules.ego_state import future_positions
from datamodules.index_file import load_index
from datamodules.rear_axle import lidar_plan, rear_axle_future


@pytest.fixture(scope="module")
def index(circle_root):
    return load_index(circle_root, "v1.0-mini")


def test_the_rear_axle_drives_the_circle(index, circles):
    """From the middle of the rear axle the car goes ahead R sin(wt) and left R (1 - cos(wt))."""
    for scene in index.scenes:
        _, frames, speed, rate = circles.SCENES[scene.name]
        radius = speed / rate
        for frame in index.frames[scene.first : scene.last]:
            points, mask = rear_axle_future(index, frame)
            assert mask.sum() == min(6, frames - 1 - frame.position)
            for step in range(6):
                t_s = 0.5 * min(step + 1, int(mask.sum()))
                expected = [radius * math.sin(rate * t_s), radius * (1 - math.cos(rate * t_s))]
                np.testing.assert_allclose(points[step], expected, atol=1e-9)


def test_the_lidar_takes_another_way(index, circles):
    """It starts 0.94 m further ahead and turns with the car: on a larger circle."""
    frame = index.frames[0]
    scene = index.scenes[frame.scene].name
    _, _, _, rate = circles.SCENES[scene]
    points, _ = rear_axle_future(index, frame)
    lidar = lidar_plan(index, frame, points)
    angle = rate * 0.5 * np.arange(1, 7)
    ahead_m = 0.943713
    forward = points[:, 0] + ahead_m * np.cos(angle) - ahead_m
    left = points[:, 1] + ahead_m * np.sin(angle)
    np.testing.assert_allclose(lidar, np.stack([-left, forward], axis=1), atol=1e-9)
    # Turning the plan by 90 degrees alone is wrong by up to 0.56 m here.
    turned = np.stack([-points[:, 1], points[:, 0]], axis=1)
    assert np.linalg.norm(lidar - turned, axis=1).max() == pytest.approx(
        2 * ahead_m * math.sin(rate * 3.0 / 2), abs=1e-6
    )


def test_driven_paths_and_distances_are_the_same_for_both(index):
    rng = np.random.default_rng(2)
    for frame in index.frames[::3]:
        driven, mask = rear_axle_future(index, frame)
        expected, known = future_positions(index, frame)
        np.testing.assert_array_equal(mask, known)
        np.testing.assert_allclose(lidar_plan(index, frame, driven), expected, atol=1e-9)
        error = rng.normal(0, 3, driven.shape)
        plan = lidar_plan(index, frame, driven + error)
        np.testing.assert_allclose(
            np.linalg.norm(plan - expected, axis=1), np.linalg.norm(error, axis=1), atol=1e-9
        )
