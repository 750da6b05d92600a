"""Lidar sweeps against a slow ray caster that shares nothing with the fast one."""

from dataclasses import replace

import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from datamodules.town.lidar import BEAMS, ELEVATION_DEG, NOISE_M, RANGE_M, scan
from datamodules.town.rig import Rig
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenario import simulate_scene

TICK = 200
LIDAR_IN_EGO = np.array([0.943713, 0.0, 1.84023])


@pytest.fixture(scope="module")
def log():
    return simulate_scene(build_road_map(LOCATIONS[0], 0), "scene-0061", 0, 0)


@pytest.fixture(scope="module")
def sweep(log):
    return scan(log, TICK, Rig.for_size(160, 90))


def face_distance(origin, ray, centre, yaw, wlh):
    """Distance to a box, by meeting the plane of each of its six faces in turn."""
    to_box = Quaternion(axis=[0, 0, 1], angle=yaw).inverse
    start, along = to_box.rotate(origin - centre), to_box.rotate(ray)
    half = np.array([wlh[1], wlh[0], wlh[2]]) / 2
    best = np.inf
    for axis in range(3):
        for side in (-1, 1):
            if abs(along[axis]) < 1e-12:
                continue
            t = (side * half[axis] - start[axis]) / along[axis]
            others = [i for i in range(3) if i != axis]
            at = (start + t * along)[others]
            if 0 < t < best and (np.abs(at) <= half[others]).all():
                best = t
    return best


def test_every_point_is_the_first_thing_on_its_ray(log, sweep):
    yaw = float(log.ego.track.yaw[TICK])
    turn = Quaternion(axis=[0, 0, 1], angle=yaw)
    origin = turn.rotate(LIDAR_IN_EGO) + np.append(log.ego.track.xy[TICK], 0.0)
    boxes = [
        (np.array([*a.track.xy[TICK], a.size_wlh[2] / 2]), float(a.track.yaw[TICK]), a.size_wlh)
        for a in log.actors
        if a.present[TICK]
    ] + [
        (np.array([*b.position, b.size[2] / 2]), b.yaw, b.size[[1, 0, 2]])
        for b in log.road.blocks
        if b.kind == "building"
    ]
    solid = sweep.points[sweep.points[:, 3] > 20][::41]
    checked = np.concatenate([solid, sweep.points[::101]])
    assert len(checked) > 80
    for x, y, z in checked[:, :3].astype(float):
        length = np.linalg.norm([x, y, z])
        ray = turn.rotate(np.array([y, -x, z]) / length)  # lidar x is right, y is forward
        ground = -origin[2] / ray[2] if ray[2] < 0 else np.inf
        first = min([ground, *(face_distance(origin, ray, *box) for box in boxes)])
        assert abs(first - length) < 6 * NOISE_M


def test_rings_are_beams_at_even_elevations(sweep):
    points = sweep.points.astype(float)
    assert sweep.points.dtype == np.float32
    elevation = np.rad2deg(np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1])))
    expected = np.linspace(*ELEVATION_DEG, BEAMS)[points[:, 4].astype(int)]
    np.testing.assert_allclose(elevation, expected, atol=1e-3)
    assert np.linalg.norm(points[:, :3], axis=1).max() < RANGE_M + 6 * NOISE_M


def test_a_ring_meets_flat_ground_in_a_circle_of_the_known_radius(log):
    empty = replace(log, actors=(), road=replace(log.road, blocks=()))
    points = scan(empty, TICK, Rig.for_size(160, 90)).points.astype(float)
    for ring in (0, 8, 16):
        radius = np.hypot(*points[points[:, 4] == ring][:, :2].T)
        down = np.deg2rad(-np.linspace(*ELEVATION_DEG, BEAMS)[ring])
        assert np.abs(radius - 1.84023 / np.tan(down)).max() < 6 * NOISE_M
        assert abs(radius.mean() - 1.84023 / np.tan(down)) < 0.01


def test_hits_of_an_actor_lie_in_its_box(log, sweep):
    yaw = float(log.ego.track.yaw[TICK])
    turn = Quaternion(axis=[0, 0, 1], angle=yaw)
    origin = turn.rotate(LIDAR_IN_EGO) + np.append(log.ego.track.xy[TICK], 0.0)
    ego = np.stack([sweep.points[:, 1], -sweep.points[:, 0], sweep.points[:, 2]])
    ground_frame = turn.rotation_matrix @ ego + origin[:, None]
    bodies = ground_frame[:, sweep.points[:, 3] == 60.0]
    assert sum(sweep.hits.values()) == bodies.shape[1] > 50
    for actor in log.actors:
        if not sweep.hits.get(actor.id):
            continue
        box = Box(
            [*actor.track.xy[TICK], actor.size_wlh[2] / 2],
            actor.size_wlh + 12 * NOISE_M,  # range noise moves points off the faces
            Quaternion(axis=[0, 0, 1], angle=float(actor.track.yaw[TICK])),
        )
        assert int(points_in_box(box, bodies).sum()) >= sweep.hits[actor.id]


def test_noise_differs_between_ticks_and_scenes_only(log, sweep):
    rig = Rig.for_size(160, 90)
    np.testing.assert_array_equal(scan(log, TICK, rig).points, sweep.points)
    other = scan(replace(log, index=log.index + 1), TICK, rig).points
    assert not np.array_equal(other, sweep.points)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_of_two_bodies_is_hit_whatever_their_order(log, order):
    """A low car stands before a tall truck: only beams over its roof reach the truck."""
    yaw = float(log.ego.track.yaw[TICK])
    along = np.array([np.cos(yaw), np.sin(yaw)])
    model, ticks = log.actors[0], len(log.ego.track.yaw)
    bodies = []
    for number, (ahead_m, size) in enumerate(((12.0, (1.9, 4.5, 1.6)), (24.0, (1.9, 7.0, 3.1)))):
        xy = log.ego.track.xy[TICK] + ahead_m * along
        track = replace(model.track, xy=np.tile(xy, (ticks, 1)), yaw=np.full(ticks, yaw))
        present = np.ones(ticks, bool)
        bodies.append(
            replace(model, id=number, size_wlh=np.array(size), track=track, present=present)
        )
    scene = replace(log, actors=tuple(bodies[i] for i in order), road=replace(log.road, blocks=()))
    sweep = scan(scene, TICK, Rig.for_size(160, 90))
    points = sweep.points[sweep.points[:, 3] == 60.0].astype(float)
    # The rear faces stand 2.25 and 3.5 m before the centres; y is forward of the lidar.
    near, far = 12.0 - 2.25 - LIDAR_IN_EGO[0], 24.0 - 3.5 - LIDAR_IN_EGO[0]
    on_car = points[:, 1] < near + 4.5 + 0.2
    assert sweep.hits == {0: int(on_car.sum()), 1: int((~on_car).sum())}
    assert sweep.hits[0] > 20
    assert sweep.hits[1] > 10
    assert np.abs(points[~on_car, 1] - far).max() < 6 * NOISE_M
    # Below the line over the car's rear edge nothing of the truck is seen.
    slope = (1.6 - LIDAR_IN_EGO[2]) / near
    assert (points[~on_car, 2] > slope * points[~on_car, 1] - 0.2).all()
