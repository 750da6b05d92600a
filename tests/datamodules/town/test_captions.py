"""Object captions, scene descriptions and narrations say what is so."""

import dataclasses
import json
import re

import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from datamodules.town.descriptions import hazard_text, road_text
from datamodules.town.log import (
    Actor,
    EgoLog,
    Lane,
    RoadMap,
    SceneLog,
    StopLine,
    Track,
    TrafficLight,
)
from datamodules.town.narration import NARRATIONS, reworded
from datamodules.town.phrasing import Dice, colourless, in_colour
from datamodules.town.scene_facts import SceneFacts

KEYS = {"sample_token", "instance_token", "attribute_caption", "depth_caption",
        "localization_caption", "motion_caption", "map_caption", "relation_caption",
        "final_caption", "2d_bbox", "3d_size", "cam_file"}  # fmt: skip
COLOURS = re.compile(r"\b(red|white|black|silver|blue|green|yellow|orange|grey)\b")
TICKS = 400


def words_of(value):
    return re.findall(r"[a-z0-9.]+", value.lower())


def test_object_captions_measure_what_the_devkit_measures(told):
    """Offsets, velocity and rectangle against the devkit's Box, moved through the sensor frames."""
    checked = 0
    for token, record in told.objects.items():
        assert set(record) == KEYS
        assert record["final_caption"].isascii()
        scene, k, number = token.split("/")
        actor, tick = told.logs[scene].actors[int(number)], int(k) * 10
        assert actor.id == int(number)
        if checked % 7 == 0:
            yaw = actor.track.yaw[tick]
            box = Box([*actor.track.xy[tick], actor.size_wlh[2] / 2], actor.size_wlh.tolist(),
                      Quaternion(axis=[0, 0, 1], angle=yaw),
                      velocity=(*(actor.track.speed[tick] * np.array([np.cos(yaw), np.sin(yaw)])),
                                0.0))  # fmt: skip
            sensors = told.recorded.samples[record["sample_token"]].sensors
            lidar = _into(box.copy(), sensors["LIDAR_TOP"])
            where, moves = record["localization_caption"], record["motion_caption"]
            assert (where["x_offset"], where["y_offset"]) == pytest.approx(
                tuple(lidar.center[:2]), abs=0.006
            )
            assert (moves["x_vel"], moves["y_vel"]) == pytest.approx(
                tuple(lidar.velocity[:2]), abs=0.006
            )
            assert record["depth_caption"]["depth"] == pytest.approx(
                np.hypot(*lidar.center[:2]), abs=0.006
            )
            if record["cam_file"] is not None:
                camera = sensors[record["cam_file"].split("/")[1]]
                corners = _into(box, camera).corners()
                pixels = view_points(
                    corners, np.array(camera.calibration["camera_intrinsic"]), normalize=True
                )[:2]
                low = pixels.min(1).clip(0, camera.size)
                high = pixels.max(1).clip(0, camera.size)
                assert record["2d_bbox"] == pytest.approx([*low, *high], abs=0.06)
        checked += 1
    assert checked > 3 * 40 * 6
    assert sum(r["cam_file"] is not None for r in told.objects.values()) > 0.9 * checked


def _into(box, sensor):
    for pose in (sensor.ego_pose, sensor.calibration):
        box.translate(-np.array(pose["translation"]))
        box.rotate(Quaternion(pose["rotation"]).inverse)
    return box


def test_descriptions_name_counts_and_colours_that_are_there(told):
    """`three cars`: never more than there are; a colour: somebody has it, or the light shows it."""
    numbers = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    plain = re.compile(rf"\b({'|'.join(numbers)}) (car|truck|pedestrian|motorcycle)s?\b")
    seen = 0
    for texts in told.texts.values():
        for record in texts.nucaption:
            scene, k = record["sample_token"].split("/")
            near = [told.logs[scene].actors[i] for i in told.tokens.annotated[scene, int(k)]]
            names = [actor.category for actor in near]
            for number, name in plain.findall(record["answer"].lower()):
                assert sum(name in full for full in names) >= numbers.index(number)
                seen += 1
            lights = {light.colour(int(k) * 0.5) for light in told.logs[scene].road.lights}
            shown = {actor.colour_name for actor in near} | lights
            assert set(COLOURS.findall(record["answer"].lower())) <= shown
            assert not COLOURS.search(record["answer_lidar"].lower())
            assert not set("{}|") & set(record["answer"] + record["answer_lidar"])
            assert (record["answer"] + record["question"]).isascii()
            assert record["answer"][0].isupper() or record["answer"][0].isdigit()
        assert len(texts.nucaption) == 5 * len(texts.nux)
    assert seen > 200
    answers = [r["answer"] for r in told.texts["train"].nucaption]
    assert len(set(answers)) > 0.7 * len(answers)


def test_markup_keeps_one_side_of_each_choice():
    text = "there is {an orange|a} bus. {the light is red|there is a light}."
    assert in_colour(text) == "There is an orange bus. The light is red."
    assert colourless(text) == "There is a bus. There is a light."


def test_everything_the_recorder_says_can_be_said_in_other_words(told):
    dice = Dice(np.random.default_rng(0))
    for log in told.logs.values():
        for said, why in sorted(set(zip(log.ego.narration, log.ego.reason, strict=True))):
            assert len(set(NARRATIONS[said])) >= 4
            wordings = {reworded(why, dice) for _ in range(60)}
            assert len(wordings) >= 4, why
            # Colours, sides and kinds of vehicle are facts: no wording may lose them.
            for word in ("left", "right", "red", "yellow", "truck", "bus", "bicycle", "motorcycle"):
                assert all(word in words_of(w) for w in wordings) == (word in words_of(why))
    for texts in told.texts.values():
        for record in texts.nux.values():
            assert set(record) == {"narration", "reasoning"}
            # Scorers split "Narration: N. Reasoning: R." at the first full stop.
            assert "." not in record["narration"] + record["reasoning"]


def straight_scene():
    """A street due north with one lane each way, a red light, and five bodies on it.

    The car stands at the origin: its lidar is 0.94 m further north.
    """
    still, zeros = np.zeros((TICKS, 2)), np.zeros(TICKS)
    north = np.full(TICKS, np.pi / 2)

    def actor(number, category, x, y, speed=0.0, yaw=np.pi / 2, attribute="", braking=False):
        track = Track(still + np.array([x, y + 0.943713]), zeros + yaw, zeros + speed)
        size, always = np.array([2.0, 4.5, 1.6]), np.ones(TICKS, bool)
        attributes = (attribute,) * TICKS
        return Actor(
            number,
            category,
            size,
            (0, 0, 0),
            "blue",
            track,
            always,
            always & braking,
            attributes,
            "",
        )

    def line(x, y0, y1):
        return np.stack([np.full(81, x), np.linspace(y0, y1, 81)], axis=-1)

    def area(x0, y0, x1, y1):
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)

    road = RoadMap(
        location="boston-seaport",
        extent_m=(100.0, 100.0),
        lanes=(
            Lane(0, line(0.0, -30, 40), 3.6, False, (), stop_line=0),
            Lane(1, line(-3.6, 40, -30), 3.6, False, ()),
        ),
        drivable=(area(-7, -30, 3, 60),),
        road_segments=((area(-7, -30, 3, 40), False), (area(-7, 39, 3, 60), True)),
        ped_crossings=(area(-7, 31, 3, 35),),
        walkways=(area(3, -30, 6, 40),),
        stop_lines=(StopLine(0, area(-2, 29, 2, 30), "TRAFFIC_LIGHT", 0),),
        lights=(TrafficLight(0, np.array([4.0, 40, 4]), -np.pi / 2, (("red", 99.0),), 0.0),),
        road_dividers=(),
        lane_dividers=(),
    )
    actors = (
        actor(0, "vehicle.car", 0.3, 20, 4.0, attribute="vehicle.moving", braking=True),
        actor(1, "vehicle.truck", -3.6, 12, 7.0, -np.pi / 2, "vehicle.moving"),
        actor(2, "human.pedestrian.adult", 0.5, 32, 1.4, np.pi, "pedestrian.moving"),
        actor(3, "vehicle.car", 2.2, 10, attribute="vehicle.parked"),
        actor(4, "human.pedestrian.adult", 4.5, -8, attribute="pedestrian.standing"),
        actor(5, "vehicle.bus.rigid", 0.0, -10, 4.0, attribute="vehicle.moving"),
    )
    does, why = ("the car is slowing down",) * TICKS, ("because the light ahead is red",) * TICKS
    drive = Track(still, north, zeros + 5.0)
    ego = EgoLog(drive, zeros, zeros, zeros, zeros > 0, does, why)
    return SceneLog("scene-0061", 0, 0, road, ego, actors, 1.0, "", 0.0)


def test_facts_of_a_street_that_was_drawn_by_hand():
    facts = SceneFacts(straight_scene()).at(0, range(6))
    by_id = {thing.actor.id: thing for thing in facts.things}
    assert [by_id[n].place for n in range(6)] == [
        "our lane", "oncoming lane", "crossing", "kerb", "pavement", "our lane",
    ]  # fmt: skip
    assert [by_id[n].sector for n in range(6)] == [
        "front", "front", "front", "front", "back", "back",
    ]  # fmt: skip
    assert facts.leader is by_id[0]
    assert facts.leader.ahead_m == pytest.approx(20.0, abs=0.6)
    assert by_id[1].velocity == pytest.approx((0.0, -7.0), abs=1e-9)
    assert by_id[2].velocity == pytest.approx((-1.4, 0.0), abs=1e-9)
    assert by_id[3].x_m == pytest.approx(2.2)
    assert facts.light == "red"
    assert facts.light_ahead_m == pytest.approx(29.5 - 0.943713, abs=0.6)
    assert facts.crossing_ahead_m == pytest.approx(31 - 0.943713, abs=1.1)
    assert facts.junction_ahead_m == pytest.approx(39 - 0.943713, abs=1.1)
    assert (facts.bend, facts.in_junction, facts.lanes_each_way) == ("", False, 1)
    dice = Dice(np.random.default_rng(0))
    for _ in range(20):
        hazards = in_colour(hazard_text(facts, dice))
        assert "blue car" in hazards
        assert any(word in hazards for word in ("brak", "slow"))
        assert re.search(r"one lane.*straight.*(junction).*crossing", road_text(facts, dice))
    empty = dataclasses.replace(facts, things=(), light=None, light_ahead_m=None)
    assert re.search(r"clear|no hazard|No hazard|Nothing", in_colour(hazard_text(empty, dice)))


def test_the_same_seed_writes_the_same_words(told):
    from datamodules.town.language import SplitTexts, add_scene

    log = told.logs["scene-0061"]
    written = []
    for seed in (3, 3, 4):
        texts = SplitTexts()
        objects = add_scene(log, texts, told.tokens, told.recorded, seed)
        written.append(json.dumps([objects, texts.nucaption, texts.questions, texts.nux]))
    assert written[0] == written[1] != written[2]
