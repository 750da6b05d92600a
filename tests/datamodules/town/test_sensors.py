"""Cameras and lidar against closed forms."""

import numpy as np
import pytest

from datamodules.town.lidar import ray_box_distance, scan
from datamodules.town.rig import MOUNTS, Rig, ego_to_global
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenario import simulate_scene


@pytest.fixture(scope="module")
def log():
    return simulate_scene(build_road_map(LOCATIONS[0], 0), "scene-0001", 0, 0)


def test_what_is_straight_ahead_of_a_camera_is_in_its_middle():
    rig = Rig.for_size(160, 90)
    for name, (translation, yaw_deg, _) in MOUNTS.items():
        yaw = np.deg2rad(yaw_deg)
        ahead = np.array(translation) + 20 * np.array([np.cos(yaw), np.sin(yaw), 0.0])
        camera = np.linalg.inv(rig.cameras[name].matrix) @ [*ahead, 1.0]
        pixel = rig.intrinsics[name] @ camera[:3]
        np.testing.assert_allclose(pixel[:2] / pixel[2], (80, 45), atol=1e-9)
        assert camera[2] == pytest.approx(20)


def test_lidar_axes_are_right_and_forward():
    lidar = Rig.for_size(160, 90).lidar
    np.testing.assert_allclose(lidar.matrix[:3, :3] @ [1, 0, 0], [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(lidar.matrix[:3, :3] @ [0, 1, 0], [1, 0, 0], atol=1e-12)


def test_ray_box_distance_equals_the_closed_form():
    size = np.array([2.0, 4.0, 1.5])
    origin = np.array([0.0, 0.0, 0.75])
    rays = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [np.cos(0.05), np.sin(0.05), 0]])
    hit = ray_box_distance(origin, rays, np.array([10.0, 0, 0.75]), 0.0, size)
    assert hit[0] == pytest.approx(8.0)
    assert np.isinf(hit[1])
    assert np.isinf(hit[2])
    assert hit[3] == pytest.approx(8.0 / np.cos(0.05))
    turned = ray_box_distance(origin, rays[:1], np.array([10.0, 0, 0.75]), np.pi / 2, size)
    assert turned[0] == pytest.approx(9.0)


def test_ground_points_lie_on_the_ground(log):
    rig = Rig.for_size(160, 90)
    sweep = scan(log, 0, rig)
    pose = ego_to_global(log.ego.track.xy[0], float(log.ego.track.yaw[0])) @ rig.lidar.matrix
    ground = sweep.points[sweep.points[:, 3] == 12.0][:, :3]
    height = (ground @ pose[:3, :3].T + pose[:3, 3])[:, 2]
    assert len(ground) > 1000
    assert np.abs(height).max() < 0.12  # range noise
    again = scan(log, 0, rig)
    np.testing.assert_array_equal(again.points, sweep.points)
