"""DriveLM's records from the town's truth: a key-frame's questions in the order of a graph.

Training questions are as the published train file has them: free answers, no tags. Those of val are
as the challenge asks them: few, tagged, some with four options; once with answers and once without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.multiple_choice import LETTERS, with_options
from datamodules.town.log import TICK_S, TICKS_PER_KEYFRAME, FloatArray, SceneLog
from datamodules.town.phrasing import Dice, a_thing, in_colour, listed, pick
from datamodules.town.recorded import RecordedSample
from datamodules.town.scene_facts import FrameFacts, Thing, wrap

EVERY_KEYFRAMES = 6  # the published data set has about one key-frame in six, too
FIRST_KEYFRAME = 2
REACH_M = 45.0
OBJECTS, MOVERS = 4, 2
LEAST_PX = 12.0  # width and height, of 1600 x 900, that an object has to show
FULL_SIZE = (1600, 900)
AHEAD_S = 3.0
NEAR_WAY_M = 2.5
TURN_RAD, SLIGHT_RAD, STEER_RAD = 0.3, 0.06, 0.25
STATUS_QUESTION = "What is the moving status of object {}?"
STATUSES = ("Going ahead.", "Turn right.", "Turn left.", "Stopped.", "Back up.", "Reverse parking.")
BEHAVIOR_QUESTION = "Predict the behavior of the ego vehicle."
STEERING = ("going straight", "slightly steering to the left", "slightly steering to the right",
            "steering to the left", "steering to the right")  # fmt: skip
PACES = ("not moving", "driving slowly", "driving with normal speed", "driving fast",
         "driving very fast")  # fmt: skip
PACE_LIMITS_MPS = (0.3, 3.0, 7.0, 10.0)
Record = dict[str, Any]
Topics = dict[str, list[Record]]


@dataclass(frozen=True)
class Shown:
    """A thing that a camera shows and that the questions are about."""

    thing: Thing
    id: str  # <c1,CAM_BACK,1088.3,497.5>
    rectangle: list[float]  # left, top, right, bottom in pixels of 1600 x 900
    status: str  # one of STATUSES
    in_way: bool  # the car will be where it is within AHEAD_S


@dataclass(frozen=True)
class GraphRecords:
    """What a key-frame gives to each of the three files."""

    train: Record
    test: Record  # questions as the challenge asks them, with answers
    questions: Record  # the same without


def graph_records(
    facts: FrameFacts, log: SceneLog, sample: RecordedSample, dice: Dice
) -> GraphRecords | None:
    """Records of one key-frame; None where the data set has none, or nothing is to be seen.

    Args:
        facts: what is true.
        log: the scene, for what happens next.
        sample: the sample's cameras.
        dice: chooses words and options.
    """
    if facts.keyframe % EVERY_KEYFRAMES != FIRST_KEYFRAME:
        return None
    shown = _shown(facts, log, sample)
    if not shown:
        return None
    paths = {c: f"../nuscenes/{s.filename}" for c, s in sample.sensors.items() if "CAM" in c}
    infos = {
        one.id: {
            "Category": _category(one.thing),
            "Status": "Moving" if one.thing.moving else "Stationary",
            "Visual_description": _looks(one),
            "2d_bbox": one.rectangle,
        }
        for one in shown
    }
    behavior = _behavior(log, facts.keyframe)
    asked = _training(facts, shown, behavior, dice)
    tested = _tested(facts, shown, behavior, dice)
    held_back = {
        topic: [{**record, "A": ""} for record in records] for topic, records in tested.items()
    }
    return GraphRecords(
        train={"key_object_infos": infos, "QA": asked, "image_paths": paths},
        test={"QA": tested, "image_paths": paths},
        questions={"QA": held_back, "image_paths": paths},
    )


def as_file(
    frames: Mapping[str, Mapping[str, Record]], descriptions: Mapping[str, str] | None = None
) -> Record:
    """The content of a file.

    Args:
        frames: scene token -> sample token -> record.
        descriptions: of the scenes; None: the file has none.
    """
    return {
        scene: {
            **({"scene_description": descriptions[scene]} if descriptions else {}),
            "key_frames": dict(found),
        }
        for scene, found in frames.items()
    }


def _shown(facts: FrameFacts, log: SceneLog, sample: RecordedSample) -> list[Shown]:
    """Up to OBJECTS things: the nearest that move, those on our way, then the nearest."""
    near = [thing for thing in facts.things if thing.distance_m <= REACH_M]
    if not near:
        return []
    movers = [thing for thing in near if thing.moving][:MOVERS]
    others = [thing for thing in near if thing not in movers]
    others.sort(key=lambda thing: (thing.ahead_m is None, thing.distance_m))
    ranked = [*movers, *others]
    seen = sample.seen_by([thing.actor for thing in ranked], facts.keyframe)
    channels = {sensor.filename: sensor for sensor in sample.sensors.values()}
    shown: list[Shown] = []
    for thing, (file, rectangle) in zip(ranked, seen, strict=True):
        if file is None or rectangle is None or len(shown) == OBJECTS:
            continue
        camera = channels[file]
        scale = np.tile(np.array(FULL_SIZE) / np.array(camera.size), 2)
        left, top, right, bottom = (np.array(rectangle) * scale).round(1).tolist()
        if min(right - left, bottom - top) < LEAST_PX:
            continue
        x, y = round((left + right) / 2, 1), round((top + bottom) / 2, 1)
        shown.append(
            Shown(
                thing,
                f"<c{len(shown) + 1},{camera.channel},{x},{y}>",
                [left, top, right, bottom],
                _status(thing, facts.keyframe),
                _in_way(log, thing, facts.keyframe),
            )
        )
    return shown


def _training(facts: FrameFacts, shown: list[Shown], behavior: str, dice: Dice) -> Topics:
    """Questions as the train file has them."""
    perception = [_important(shown)]
    perception += [_qa(STATUS_QUESTION.format(one.id), one.status) for one in shown]
    perception += [_qa(f"What does {one.id} look like?", _looks(one)) for one in shown]
    prediction = [_noticed(shown)]
    prediction += [_way_question(one) for one in shown]
    planning = [q for one in shown for q in (_action(facts, one, dice), _collision(one))]
    return {
        "perception": perception,
        "prediction": prediction,
        "planning": [*planning, _safe(facts)],
        "behavior": [_qa(BEHAVIOR_QUESTION, behavior)],
    }


def _tested(facts: FrameFacts, shown: list[Shown], behavior: str, dice: Dice) -> Topics:
    """Questions as the challenge asks them."""
    one = dice.choose(shown)
    status = _options(STATUS_QUESTION.format(one.id), one.status, STATUSES, dice)
    behaviors = tuple(_behavior_text(s, p) for s in STEERING for p in PACES)
    return {
        "perception": [_tagged(_important(shown), 2), _tagged(status, 0)],
        "prediction": [_tagged(_noticed(shown), 3), _tagged(_way_question(one), 0)],
        "planning": [
            _tagged(_action(facts, one, dice), 1),
            _tagged(_collision(one), 1),
            _tagged(_safe(facts), 1),
        ],
        "behavior": [_tagged(_options(BEHAVIOR_QUESTION, behavior, behaviors, dice), 0)],
    }


def _important(shown: list[Shown]) -> Record:
    told = listed(
        [
            f"{in_colour(a_thing(one.thing)).lower()} to the {one.thing.sector} of the ego vehicle"
            for one in shown
        ]
    )
    ids = listed([one.id for one in shown])
    named = f"Its ID is {ids}." if len(shown) == 1 else f"Their IDs are {ids}."
    return _qa("Which objects matter for driving in this scene?", f"There is {told}. {named}")


def _noticed(shown: list[Shown]) -> Record:
    """The same objects, the nearest first."""
    told = [
        f"{order} {one.id}: {one.status.rstrip('.').lower()}"
        for order, one in zip(
            ("First", "second", "third", "fourth"),
            sorted(shown, key=lambda one: one.thing.distance_m),
            strict=False,
        )
    ]
    return _qa(
        "In which order does the ego vehicle get near objects, and what does each of them do?",
        "; ".join(told) + ".",
    )


def _way_question(one: Shown) -> Record:
    question = f"Will the ego vehicle come to where {one.id} is within three seconds?"
    return _qa(question, "Yes." if one.in_way else "No.")


def _action(facts: FrameFacts, one: Shown, dice: Dice) -> Record:
    question = f"What does the ego vehicle do with regard to {one.id}, and for what reason?"
    does = facts.narration.removeprefix("the car is ")
    form = pick(dice, ("The ego vehicle is {0} {1}.", "It is {0} {1}."))
    return _qa(question, form.format(does, facts.reason))


def _collision(one: Shown) -> Record:
    """What would bring the two together: by where the object is."""
    if one.in_way and not one.thing.moving:
        danger = "Driving on without slowing down."
    else:
        danger = {
            "front": "Going ahead faster than it.",
            "back": "Braking hard." if one.thing.moving else "Backing up.",
        }.get(one.thing.sector, f"Steering to the {one.thing.sector.rpartition(' ')[2]}.")
    return _qa(f"Which action could lead to a collision with {one.id}?", danger)


def _safe(facts: FrameFacts) -> Record:
    leader = facts.leader
    close = leader is not None and (leader.ahead_m or 0.0) < 12.0
    if facts.light in ("red", "yellow") or (close and leader is not None and not leader.moving):
        safe = "Slow down, or stay where it is."
    elif close:
        safe = "Keep the distance to the vehicle ahead, slow down gently."
    else:
        safe = "Keep going at the same speed, slow down gently."
    return _qa("Which actions are safe for the ego vehicle now?", safe)


def _options(question: str, answer: str, answers: tuple[str, ...], dice: Dice) -> Record:
    """With three wrong answers beside the right one."""
    left = [other for other in answers if other != answer]
    options = [answer]
    while len(options) < len(LETTERS):
        options.append(left.pop(int(dice.uniform() * len(left))))
    order = sorted(options, key=lambda _: dice.uniform())
    return _qa(with_options(question, order), LETTERS[order.index(answer)])


def _qa(question: str, answer: str) -> Record:
    nothing = dict.fromkeys(("C", "con_up", "con_down", "cluster", "layer"))
    return {"Q": question, "A": answer, **nothing}


def _tagged(record: Record, tag: int) -> Record:
    return {**record, "tag": [tag]}


def _category(thing: Thing) -> str:
    if thing.name == "pedestrian":
        return "Pedestrian"
    return "Traffic element" if thing.name in ("traffic cone", "barrier") else "Vehicle"


def _looks(one: Shown) -> str:
    text = f"{one.thing.actor.colour_name} {one.thing.name}."
    return text[0].upper() + text[1:]


def _status(thing: Thing, keyframe: int) -> str:
    """What it does in the next two seconds."""
    if not thing.moving:
        return "Stopped."
    if thing.speed_mps < 0:
        return "Back up."
    first = keyframe * TICKS_PER_KEYFRAME
    yaw = np.unwrap(thing.actor.track.yaw[first : first + round(2.0 / TICK_S) + 1])
    turned = float(yaw[-1] - yaw[0])
    if abs(turned) < TURN_RAD:
        return "Going ahead."
    return "Turn left." if turned > 0 else "Turn right."


def _in_way(log: SceneLog, thing: Thing, keyframe: int) -> bool:
    """Whether the car's way of the next AHEAD_S leads past within NEAR_WAY_M of it as it stands."""
    way = log.ego.track.xy[_ahead(keyframe)]
    place = thing.actor.track.xy[keyframe * TICKS_PER_KEYFRAME]
    reach = NEAR_WAY_M + float(thing.actor.size_wlh[1]) / 2
    return bool((np.linalg.norm(way - place, axis=1) < reach).any())


def _behavior(log: SceneLog, keyframe: int) -> str:
    """How the car steers and how fast it is in the next AHEAD_S."""
    track = log.ego.track
    yaw: FloatArray = track.yaw[_ahead(keyframe)]
    turned = float(wrap(yaw[-1] - yaw[0]))
    side = 1 if turned > 0 else 2
    steering = 0 if abs(turned) < SLIGHT_RAD else side if abs(turned) < STEER_RAD else side + 2
    speed = float(track.speed[_ahead(keyframe)].mean())
    pace = int(np.searchsorted(PACE_LIMITS_MPS, speed))
    return _behavior_text(STEERING[steering], PACES[pace])


def _behavior_text(steering: str, pace: str) -> str:
    return f"The ego vehicle is {steering}. The ego vehicle is {pace}."


def _ahead(keyframe: int) -> slice:
    first = keyframe * TICKS_PER_KEYFRAME
    return slice(first, first + round(AHEAD_S / TICK_S) + 1)
