"""The road map: lanes join, stay on the asphalt and keep right; lights never let streams cross."""

from __future__ import annotations

import pickle
from itertools import combinations

import numpy as np
import pytest
from nuscenes.utils.splits import create_splits_scenes
from shapely.geometry import LineString, Point, Polygon
from shapely.ops import unary_union

from datamodules.town.geometry import headings, rectangle, rectangles_overlap, resample, smooth
from datamodules.town.log import RoadMap, TrafficLight
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenes import scene_names
from odvla.errors import UserError


@pytest.fixture(scope="module", params=LOCATIONS)
def road(request: pytest.FixtureRequest) -> RoadMap:
    return build_road_map(request.param, 0)


def test_lanes_end_where_their_successors_start(road: RoadMap) -> None:
    for lane in road.lanes:
        assert lane.successors, f"lane {lane.id} is a dead end"
        assert road.lanes[lane.id] is lane  # ids are positions
        for after in (road.lanes[number] for number in lane.successors):
            assert np.linalg.norm(lane.centre[-1] - after.centre[0]) < 1e-6
            turn = headings(after.centre)[0] - headings(lane.centre)[-1]
            assert np.cos(turn) > np.cos(0.25)


def test_every_lane_lies_on_drivable_ground(road: RoadMap) -> None:
    ground = unary_union([Polygon(polygon) for polygon in road.drivable]).buffer(0.05)
    for lane in road.lanes:
        band = LineString(lane.centre).buffer(lane.width_m / 2, cap_style=2)
        assert band.difference(ground).area < 0.05, f"lane {lane.id}"


def test_polygons_are_simple_counter_clockwise_and_on_the_canvas(road: RoadMap) -> None:
    everything = [*road.drivable, *road.ped_crossings, *road.walkways]
    everything += [line.polygon for line in road.stop_lines]
    for polygon in map(Polygon, everything):
        assert polygon.is_valid
        assert polygon.exterior.is_ccw
    corners = np.concatenate(everything)
    assert (corners >= 0).all()
    assert (corners <= road.extent_m).all()


def test_scenery_stands_off_the_road(road: RoadMap) -> None:
    taken = unary_union([Polygon(p) for p in (*road.drivable, *road.walkways)])
    assert len(road.blocks) > 60
    for block in road.blocks:
        width, length, _ = block.size
        # Width lies along x of the block's own axes, hence the quarter turn.
        corners = rectangle(block.position, block.yaw + np.pi / 2, width, length)
        assert Polygon(corners).intersection(taken).area == 0


def test_traffic_keeps_to_the_right(road: RoadMap) -> None:
    dividers = [LineString(line) for line in road.road_dividers]
    for lane in road.lanes:
        if lane.is_connector:
            continue
        middle = len(lane.centre) // 2
        divider = min(dividers, key=lambda line: line.distance(Point(lane.centre[middle])))
        onto = divider.interpolate(divider.project(Point(lane.centre[middle])))
        aside = np.array([onto.x, onto.y]) - lane.centre[middle]
        yaw = headings(lane.centre)[middle]
        assert np.dot(aside, [-np.sin(yaw), np.cos(yaw)]) > 0  # the divider is on the left
        if lane.left_neighbour is not None:
            assert road.lanes[lane.left_neighbour].right_neighbour == lane.id


def test_lights_never_let_two_streams_cross(road: RoadMap) -> None:
    """Slow check: connectors that meet and come from different lights are never both free."""
    ways = []
    for lane in road.lanes:
        if lane.stop_line is not None:
            light = road.stop_lines[lane.stop_line].light
            assert light is not None
            ways += [(light, LineString(road.lanes[i].centre)) for i in lane.successors]
    times = np.arange(0.25, 60, 0.5)
    free = {light.id: [light.colour(t) != "red" for t in times] for light in road.lights}
    conflicts = 0
    for (first, a), (second, b) in combinations(ways, 2):
        if first != second and a.crosses(b):
            conflicts += 1
            assert not (np.array(free[first]) & free[second]).any()
    assert conflicts > 10


def test_light_faces_the_traffic_that_it_stops(road: RoadMap) -> None:
    for lane in road.lanes:
        if lane.stop_line is None:
            continue
        line = road.stop_lines[lane.stop_line]
        yaw = headings(lane.centre)[-1]
        light = road.lights[line.light]
        assert np.cos(light.yaw - yaw) < -0.8
        beyond = (light.position[:2] - line.polygon.mean(0)) @ [np.cos(yaw), np.sin(yaw)]
        assert 0 < beyond < 40
        assert LineString(lane.centre).intersects(Polygon(line.polygon))


def test_light_goes_through_its_cycle() -> None:
    light = TrafficLight(0, np.zeros(3), 0.0, (("green", 5.0), ("yellow", 2.0), ("red", 3.0)), 4.0)
    seen = [light.colour(t) for t in (0.0, 0.99, 1.0, 2.99, 3.0, 5.99, 6.0, -4.0, 10.5)]
    assert seen == ["green"] * 2 + ["yellow"] * 2 + ["red"] * 2 + ["green"] * 3


def test_streets_bend_in_many_radii_and_have_one_or_two_lanes(road: RoadMap) -> None:
    radii = []
    for lane in road.lanes:
        if not lane.is_connector:
            fine = smooth(resample(lane.centre, 0.5), 2.5, 0.5)
            bend = np.abs(np.gradient(headings(fine))) / 0.5
            radii.append(1 / max(bend.max(), 1e-4))
    assert min(radii) > 12.0
    assert np.percentile(radii, 90) / np.percentile(radii, 10) > 1.5
    assert any(lane.left_neighbour is not None for lane in road.lanes)
    alone = [a for a in road.lanes if a.left_neighbour is None and a.right_neighbour is None]
    assert alone


def test_there_are_junctions_of_three_and_four_arms() -> None:
    arms: set[int] = set()
    for location in LOCATIONS:
        road = build_road_map(location, 0)
        lines = [Point(line.polygon.mean(0)) for line in road.stop_lines]
        junctions = [Polygon(outline) for outline, is_junction in road.road_segments if is_junction]
        counts = [sum(area.distance(line) < 9 for line in lines) for area in junctions]
        assert 4 in counts  # every map has its hub
        arms |= set(counts)
    assert arms == {3, 4}


def test_same_seed_gives_the_same_map() -> None:
    one, same, other = (build_road_map("boston-seaport", seed) for seed in (3, 3, 4))
    assert pickle.dumps(one) == pickle.dumps(same)
    assert pickle.dumps(one) != pickle.dumps(other)
    elsewhere = build_road_map("singapore-queenstown", 3)
    assert pickle.dumps(one.lanes) != pickle.dumps(elsewhere.lanes)


def test_rectangles_overlap_like_shapely() -> None:
    rng = np.random.default_rng(0)
    first, second = (
        np.stack(
            [
                rectangle(rng.uniform(-4, 4, 2), rng.uniform(-4, 4), *rng.uniform(0.3, 5, 2))
                for _ in range(300)
            ]
        )
        for _ in range(2)
    )
    slow = [
        Polygon(a).intersection(Polygon(b)).area > 0 for a, b in zip(first, second, strict=True)
    ]
    assert rectangles_overlap(first, second).tolist() == slow
    assert 0.2 < np.mean(slow) < 0.9


def test_ten_scenes_are_the_official_mini_split() -> None:
    names = [name for name, _ in scene_names(10)]
    splits = create_splits_scenes()
    assert sorted(names) == sorted(splits["mini_train"] + splits["mini_val"])


@pytest.mark.parametrize("count", [6, 24, 75, 850])
def test_other_counts_mix_the_official_train_and_val_names(count: int) -> None:
    pairs = scene_names(count)
    names = [name for name, _ in pairs]
    splits = create_splits_scenes()
    assert len(set(names)) == count
    assert {location for _, location in pairs} == set(LOCATIONS)
    val = len(set(names) & set(splits["val"]))
    assert val + len(set(names) & set(splits["train"])) == count
    assert abs(val / count - 150 / 850) < 0.03


@pytest.mark.parametrize("count", [0, 851])
def test_scene_counts_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"not {count}"):
        scene_names(count)
