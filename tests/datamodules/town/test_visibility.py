"""Shares that are visible, and bodies alongside, against a ray for every pixel."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from datamodules.town.cameras import SceneRenderer
from datamodules.town.lidar import ray_box_distance
from datamodules.town.rig import Rig, ego_to_global
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenario import simulate_scene
from datamodules.town.visibility import visibility

STEP = 2  # every other pixel of a 320 x 180 image


@pytest.fixture(scope="module")
def log():
    return simulate_scene(build_road_map(LOCATIONS[0], 0), "scene-0061", 0, 0)


def camera_rays(log, rig, name):
    """Origin [3] and unit directions [h, w, 3] through pixel centres, global frame, tick 0."""
    pose = (
        ego_to_global(log.ego.track.xy[0], float(log.ego.track.yaw[0])) @ rig.cameras[name].matrix
    )
    k = rig.intrinsics[name]
    u, v = np.meshgrid(np.arange(0, rig.width, STEP) + 0.5, np.arange(0, rig.height, STEP) + 0.5)
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], axis=-1)
    rays = rays @ pose[:3, :3].T
    return pose[:3, 3], rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def hit(origin, rays, actor):
    centre = np.array([*actor.track.xy[0], actor.size_wlh[2] / 2])
    flat = rays.reshape(-1, 3)
    distance = ray_box_distance(origin, flat, centre, float(actor.track.yaw[0]), actor.size_wlh)
    return distance.reshape(rays.shape[:2])


def crowd(log):
    """A truck alongside, a bus and cars ahead, some behind others, and a person."""
    yaw = float(log.ego.track.yaw[0])
    along = np.array([np.cos(yaw), np.sin(yaw)])
    left = np.array([-along[1], along[0]])
    model = log.actors[0]
    ticks = len(model.present)
    bodies = (
        ("vehicle.truck", (2.4, 7.2, 3.1), 1.5, -2.9, 0.0),
        ("vehicle.car", (1.9, 4.5, 1.6), 1.0, -8.0, 0.1),  # behind the truck
        ("vehicle.car", (1.9, 4.5, 1.6), 13.0, 0.0, 0.0),
        ("vehicle.bus.rigid", (2.7, 10.8, 3.3), 26.0, 0.8, 0.1),
        ("human.pedestrian.adult", (0.7, 0.7, 1.75), 17.0, 1.3, 0.0),
        ("vehicle.car", (1.9, 4.5, 1.6), -11.0, 2.0, 0.4),
        ("vehicle.car", (1.9, 4.5, 1.6), -17.0, 3.0, 0.0),
    )
    actors = []
    for number, (category, size, ahead_m, left_m, turn) in enumerate(bodies):
        xy = log.ego.track.xy[0] + ahead_m * along + left_m * left
        track = replace(model.track, xy=np.tile(xy, (ticks, 1)), yaw=np.full(ticks, yaw + turn))
        actors.append(
            replace(
                model,
                id=number,
                category=category,
                size_wlh=np.array(size),
                track=track,
                present=np.ones(ticks, bool),
            )
        )
    return replace(log, actors=tuple(actors), road=replace(log.road, blocks=()))


def test_visible_shares_equal_those_of_a_ray_for_every_pixel(log):
    scene, rig = crowd(log), Rig.for_size(320, 180)
    expected = dict.fromkeys(range(len(scene.actors)), 0.0)
    for name in rig.cameras:
        origin, rays = camera_rays(scene, rig, name)
        distances = np.stack([hit(origin, rays, actor) for actor in scene.actors])
        first = distances.min(0)
        for number, distance in enumerate(distances):
            alone = np.isfinite(distance)
            if alone.sum() > 4:
                share = float((distance[alone] <= first[alone]).mean())
                expected[number] = max(expected[number], share)
    assert expected[0] == 1.0  # the truck alongside
    assert expected[1] < 0.2  # hidden by it
    assert any(0.1 < share < 0.9 for share in expected.values())
    found = visibility(scene, 0, rig)
    assert found.keys() == expected.keys()
    for number, share in expected.items():
        assert abs(found[number] - share) < 0.08, scene.actors[number].category


def test_a_body_alongside_keeps_straight_edges_in_large_images(log):
    """What is painted of a bus beside the car lies where its box is, at the full size too."""
    crowded = crowd(log)
    bus = replace(crowded.actors[0], category="vehicle.bus.rigid")
    # Further out and ahead: its roof then leaves the image at a slope that clamping would bend.
    yaw = float(log.ego.track.yaw[0])
    right, ahead = np.array([[np.sin(yaw), -np.cos(yaw)], [np.cos(yaw), np.sin(yaw)]])
    bus = replace(bus, track=replace(bus.track, xy=bus.track.xy + 2 * right + 3.5 * ahead))
    scene = replace(crowded, actors=(bus,))
    renderer = SceneRenderer(scene.road, 1600, 900)
    painted = [
        renderer.render(replace(scene, actors=(replace(bus, colour=colour),)), 0)[
            "CAM_FRONT"
        ].astype(int)
        for colour in ((250, 20, 20), (20, 20, 250))
    ]
    body = np.abs(painted[0] - painted[1]).max(-1)[::STEP, ::STEP] > 12
    origin, rays = camera_rays(scene, renderer.rig, "CAM_FRONT")
    box = np.isfinite(hit(origin, rays, scene.actors[0]))
    assert body.sum() > 5000
    # A smoothed edge may touch a pixel beyond the box, which is half a step here.
    grown = cv2.dilate(box.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert not (body & ~grown).any()
