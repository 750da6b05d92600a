"""Simulated scenes: nobody collides, motion is smooth, rules are obeyed, words are true."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from shapely.geometry import Point, Polygon
from shapely.ops import unary_union

from datamodules.town.geometry import FloatArray, rectangle
from datamodules.town.log import (
    KEYFRAMES_PER_SCENE,
    TICK_S,
    TICKS_PER_KEYFRAME,
    RoadMap,
    SceneLog,
)
from datamodules.town.roads import build_road_map
from datamodules.town.scenario import simulate_scene
from datamodules.town.scenes import scene_names

TICKS = KEYFRAMES_PER_SCENE * TICKS_PER_KEYFRAME
EGO_WIDTH_M, EGO_LENGTH_M, AXLE_TO_CENTRE_M = 1.73, 4.08, 1.44
SCENES = 10


@pytest.fixture(scope="module")
def logs() -> list[SceneLog]:
    roads: dict[str, RoadMap] = {}
    found = []
    for index, (name, location) in enumerate(scene_names(SCENES)):
        roads.setdefault(location, build_road_map(location, 0))
        found.append(simulate_scene(roads[location], name, index, 0))
    return found


def _ahead(yaw: FloatArray | float) -> FloatArray:
    return np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)


def _ego_boxes(log: SceneLog) -> FloatArray:
    yaw = log.ego.track.yaw
    centre = log.ego.track.xy + _ahead(yaw) * AXLE_TO_CENTRE_M
    return rectangle(centre, yaw, EGO_WIDTH_M, EGO_LENGTH_M)


def _local(log: SceneLog, tick: int, xy: FloatArray) -> FloatArray:
    """Metres (ahead, left) of the rear axle."""
    yaw = log.ego.track.yaw[tick]
    offset = np.asarray(xy) - log.ego.track.xy[tick]
    return np.stack([offset @ _ahead(yaw), offset @ _ahead(yaw + np.pi / 2)], axis=-1)


def test_boxes_never_share_ground(logs: list[SceneLog]) -> None:
    """Slow check with polygons, at every half key-frame."""
    for log in logs:
        ego = _ego_boxes(log)
        boxes = [rectangle(a.track.xy, a.track.yaw, *a.size_wlh[:2]) for a in log.actors]
        for tick in range(0, TICKS, 5):
            there = [
                Polygon(box[tick])
                for box, actor in zip(boxes, log.actors, strict=True)
                if actor.present[tick]
            ]
            there.append(Polygon(ego[tick]))
            together = unary_union(there).area
            assert together == pytest.approx(sum(p.area for p in there), abs=1e-6), log.name


def test_key_frames_are_populated(logs: list[SceneLog]) -> None:
    near = [
        sum(
            bool(a.present[k]) and np.hypot(*(a.track.xy[k] - log.ego.track.xy[k])) < 50
            for a in log.actors
        )
        for log in logs
        for k in range(0, TICKS, TICKS_PER_KEYFRAME)
    ]
    assert np.median(near) >= 8
    assert max(near) <= 40
    assert np.mean(np.array(near) >= 4) > 0.95


def test_motion_is_continuous(logs: list[SceneLog]) -> None:
    for log in logs:
        ego = log.ego
        acceleration = np.diff(ego.track.speed) / TICK_S
        assert acceleration.min() > -6.1
        assert acceleration.max() < 2.8
        lateral = np.abs(ego.yaw_rate * ego.track.speed)
        assert lateral.max() < 5.0
        turned = np.gradient(ego.track.yaw, TICK_S)
        np.testing.assert_allclose(turned, ego.yaw_rate, atol=0.12)
        np.testing.assert_allclose(
            np.tan(ego.steering) * ego.track.speed / 2.588, ego.yaw_rate, atol=1e-6
        )
        for track, present in [
            (ego.track, np.ones(TICKS, dtype=bool)),
            *((a.track, a.present) for a in log.actors),
        ]:
            both = present[1:] & present[:-1]
            step = np.hypot(*np.diff(track.xy, axis=0).T)[both]
            assert step.max(initial=0) < 15 * TICK_S
            yaw_step = np.diff(np.unwrap(track.yaw))[both]
            assert np.abs(yaw_step).max(initial=0) < 1.5 * TICK_S
            mean_speed = (track.speed[1:] + track.speed[:-1])[both] / 2
            # A person sets off within a tick; a vehicle's path is a chord shorter than its arc.
            assert np.abs(step / TICK_S - mean_speed).mean() < 0.1


def test_ego_stays_on_the_road(logs: list[SceneLog]) -> None:
    for log in logs:
        ground = unary_union([Polygon(p) for p in log.road.drivable]).buffer(0.05)
        for box in _ego_boxes(log)[::TICKS_PER_KEYFRAME]:
            assert Polygon(box).difference(ground).area < 0.02, log.name


def test_ego_enters_no_junction_on_red(logs: list[SceneLog]) -> None:
    passed = 0
    for log in logs:
        track = log.ego.track
        front = track.xy + _ahead(track.yaw) * (AXLE_TO_CENTRE_M + EGO_LENGTH_M / 2)
        for line in log.road.stop_lines:
            light = log.road.lights[line.light or 0]
            polygon = Polygon(line.polygon)
            reach = np.hypot(*(front - line.polygon.mean(0)).T) < 12
            facing = np.cos(light.yaw - track.yaw) < -0.5
            inside = np.array(
                [
                    bool(near) and polygon.covers(Point(p))
                    for near, p in zip(reach, front, strict=True)
                ]
            )
            for tick in np.flatnonzero(inside[1:] & ~inside[:-1] & facing[1:]):
                passed += 1
                assert light.colour((tick + 1) * TICK_S) != "red", f"{log.name} tick {tick}"
    assert passed >= 3


def test_ego_yields_to_people_who_cross(logs: list[SceneLog]) -> None:
    crossed = 0
    for log in logs:
        ego = [Polygon(box) for box in _ego_boxes(log)[::2]]
        moving = log.ego.track.speed[::2] > 1.0
        for actor in log.actors:
            if actor.intent.startswith("crossing") and actor.track.speed.max() > 0:
                crossed += 1
                walking = (actor.track.speed[::2] > 0) & moving
                for box, xy in zip(
                    np.array(ego)[walking], actor.track.xy[::2][walking], strict=True
                ):
                    assert box.distance(Point(xy)) > 0.8, log.name
    assert crossed >= 3


def _share(logs: Sequence[SceneLog], word: str) -> float:
    """Share of scenes in which a word of a reason occurs."""
    return float(np.mean([any(word in reason for reason in log.ego.reason) for log in logs]))


def test_scenes_are_eventful(logs: list[SceneLog]) -> None:
    speed = np.concatenate([log.ego.track.speed for log in logs])
    assert np.percentile(speed, 95) > 7.5
    assert np.percentile(speed, 25) < 4.0
    for log in logs:
        assert np.ptp(log.ego.track.speed) > 2.5, log.name
        assert len(set(log.ego.reason)) >= 4, log.name
    for word in ("light", "in front", "bend", "is in the way"):
        assert _share(logs, word) >= 0.2, word
    assert _share(logs, "pedestrian") > 0


def test_constant_velocity_is_a_poor_plan(logs: list[SceneLog]) -> None:
    """The reason the town exists: what happens next hangs on the scene."""
    errors = []
    for log in logs:
        for k in range(0, TICKS - 60, TICKS_PER_KEYFRAME):
            xy, yaw, v = log.ego.track.xy, log.ego.track.yaw[k], log.ego.track.speed[k]
            at = np.arange(1, 7)
            plan = xy[k] + np.outer(at * 0.5 * v, _ahead(yaw))
            errors.append(np.hypot(*(plan - xy[k + TICKS_PER_KEYFRAME * at]).T).mean())
    assert np.mean(errors) > 1.0


def test_narration_is_true(logs: list[SceneLog]) -> None:
    for log in logs:
        for k in range(TICKS):
            says, why, v = log.ego.narration[k], log.ego.reason[k], log.ego.track.speed[k]
            a = log.ego.acceleration[k]
            if "standing still" in says:
                assert v < 0.3
            if "slowing" in says or "braking" in says:
                assert a < -0.3
            if "speeding up" in says or "starting" in says:
                assert a > 0.2
            if "light ahead is" in why:
                colour = why.split()[-1]
                # Decisions are taken every other tick.
                shown = [
                    light.colour(tick * TICK_S)
                    for light in log.road.lights
                    for tick in (k - 1, k, k + 1)
                    if 0 < _local(log, k, light.position[:2])[0] < 75
                    and np.cos(light.yaw - log.ego.track.yaw[k]) < 0
                ]
                assert colour in shown, f"{log.name} tick {k}"
            if "pedestrian is crossing" in why:
                assert any(
                    a.category.startswith("human")
                    and a.track.speed[k] > 0
                    and 0 < _local(log, k, a.track.xy[k])[0] < 70
                    for a in log.actors
                ), f"{log.name} tick {k}"
            if "in front" in why:
                name = why.split(" in front")[0].split()[-1]
                assert any(
                    name in a.category
                    and a.present[k]
                    and np.hypot(*(a.track.xy[k] - log.ego.track.xy[k])) < 65
                    for a in log.actors
                ), f"{log.name} tick {k}: {why}"


def test_only_what_can_move_has_a_moving_attribute(logs: list[SceneLog]) -> None:
    for log in logs:
        assert log.description
        assert [actor.id for actor in log.actors] == list(range(len(log.actors)))
        for actor in log.actors:
            kinds = {attribute.split(".")[0] for attribute in actor.attribute}
            expected = {
                "human": {"pedestrian"},
                "movable_object": {""},
                "vehicle": {"cycle"} if "cycle" in actor.category else {"vehicle"},
            }[actor.category.split(".")[0]]
            assert kinds <= expected, actor.category
            if "vehicle.parked" in actor.attribute:
                assert np.ptp(actor.track.xy, axis=0).max() == 0


def test_same_seed_gives_the_same_scene() -> None:
    road = build_road_map("boston-seaport", 0)
    one, same, other = (simulate_scene(road, "scene-0061", 0, seed) for seed in (5, 5, 6))
    assert pickle.dumps(one) == pickle.dumps(same)
    assert pickle.dumps(one.ego) != pickle.dumps(other.ego)
