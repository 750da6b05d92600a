"""From the clock of the simulation to the scene's log: ticks, box tracks, ego states, words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from datamodules.town.geometry import FloatArray, rectangle, rectangles_overlap
from datamodules.town.log import (
    KEYFRAMES_PER_SCENE,
    TICK_S,
    TICKS_PER_KEYFRAME,
    Actor,
    EgoLog,
    RoadMap,
    SceneLog,
    Track,
)
from datamodules.town.narration_cues import narrate
from datamodules.town.paths import Path
from datamodules.town.traffic import STEP_S, Body, Recording, Vehicle, Walker

TICKS = KEYFRAMES_PER_SCENE * TICKS_PER_KEYFRAME
WHEELBASE_M = 2.588
MOVING_MPS = 0.3
EPOCH_S = 1_533_000_000.0  # scenes are dated from here on, an hour apart
BRAKE_LIGHT_ACCEL = -0.8


class Standing(Protocol):
    """A body that never moves."""

    @property
    def body(self) -> Body:
        """Kind and size."""
        ...

    @property
    def position(self) -> FloatArray:
        """Box centre: [2]."""
        ...

    @property
    def yaw(self) -> float:
        """Direction of the box's length."""
        ...


def record_scene(
    *,
    road: RoadMap,
    name: str,
    index: int,
    seed: int,
    path: Path,
    vehicles: Sequence[Vehicle],
    walkers: Sequence[Walker],
    parked: Sequence[Standing],
    recording: Recording,
    rng: np.random.Generator,
) -> SceneLog:
    """Bring everything to one row a tick, and take out whoever would overlap somebody else."""
    ego = _ego(path, recording)
    actors = [_vehicle_actor(vehicle, number, recording) for number, vehicle in enumerate(vehicles)]
    actors = actors[1:]  # the first vehicle is the ego car
    actors += [_parked_actor(standing) for standing in parked]
    actors += [_walker_actor(walker, number, recording) for number, walker in enumerate(walkers)]
    ego_boxes = _ego_boxes(ego)
    kept = _without_overlaps(
        ego_boxes, actors, first_standing=len(vehicles) - 1, parked=len(parked)
    )
    numbered = tuple(_renumbered(actor, number) for number, actor in enumerate(kept))
    return SceneLog(
        name=name,
        index=index,
        seed=seed,
        road=road,
        ego=ego,
        actors=numbered,
        daylight=float(rng.uniform(0.55, 1.0)),
        description=_describe(ego, numbered),
        start_time_s=EPOCH_S + 3600.0 * index,
    )


def _to_ticks(values: FloatArray) -> FloatArray:
    """Rows every STEP_S -> rows every TICK_S."""
    at = np.arange(TICKS) * TICK_S
    steps = np.arange(len(values)) * STEP_S
    return np.interp(at, steps, values)


def _ego(path: Path, recording: Recording) -> EgoLog:
    rows = np.array([step[0] for step in recording.vehicles])
    s, speed, acceleration = (_to_ticks(rows[:, i]) for i in range(3))
    yaw = path.heading(s)
    curvature = np.interp(s, path.s, path.curvature)
    reasons = [
        recording.reasons[min(round(t * TICK_S / STEP_S), len(rows) - 1)] for t in range(TICKS)
    ]
    narration, why = narrate(path, s, speed, acceleration, yaw, reasons)
    return EgoLog(
        track=Track(path.position(s), yaw, speed),
        acceleration=acceleration,
        yaw_rate=curvature * speed,
        steering=np.arctan(WHEELBASE_M * curvature),
        braking=acceleration < BRAKE_LIGHT_ACCEL,
        narration=narration,
        reason=why,
    )


def _ego_boxes(ego: EgoLog) -> FloatArray:
    """Corners of the ego car at every tick: [K, 4, 2]."""
    yaw = ego.track.yaw
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) * 1.44
    return rectangle(ego.track.xy + ahead, yaw, 1.73, 4.084)


def _vehicle_actor(vehicle: Vehicle, number: int, recording: Recording) -> Actor:
    rows = np.array([step[number] for step in recording.vehicles])
    path = vehicle.driver.path
    s, speed, acceleration = (_to_ticks(rows[:, i]) for i in range(3))
    moving = speed > MOVING_MPS
    two_wheels = vehicle.body.name in ("bicycle", "motorcycle")
    words = (
        ("cycle.with_rider", "cycle.with_rider")
        if two_wheels
        else ("vehicle.moving", "vehicle.stopped")
    )
    return Actor(
        id=0,
        category=vehicle.body.category,
        size_wlh=np.array(vehicle.body.size_wlh),
        colour=vehicle.body.colour,
        colour_name=vehicle.body.colour_name,
        track=Track(path.position(s), path.heading(s), speed),
        present=np.ones(TICKS, dtype=bool),
        braking=acceleration < BRAKE_LIGHT_ACCEL,
        attribute=tuple(words[0] if m else words[1] for m in moving),
        intent=_vehicle_intent(path, s, speed),
    )


def _vehicle_intent(path: Path, s: FloatArray, speed: FloatArray) -> str:
    """What a vehicle does over the scene, in a few words for captions."""
    if speed.max() < MOVING_MPS:
        return "waiting in traffic"
    for start, end, side in path.turns:
        if s[0] < start < s[-1] and end - 3.0 < s[-1]:
            return f"turning {side} at the junction"
    if any(s[0] < near and far < s[-1] for near, far, _ in path.swings):
        return "passing an obstacle"
    if speed.min() < MOVING_MPS:
        return "stopping and moving off again" if speed[-1] > MOVING_MPS else "coming to a stop"
    return "following the lane"


def _parked_actor(standing: Standing) -> Actor:
    body = standing.body
    still = np.zeros(TICKS)
    kind = body.category.split(".")[0]
    attribute = {"vehicle": "vehicle.parked", "human": "pedestrian.standing"}.get(kind, "")
    intents = {"vehicle": "parked at the kerb", "human": "working on the road"}
    return Actor(
        id=0,
        category=body.category,
        size_wlh=np.array(body.size_wlh),
        colour=body.colour,
        colour_name=body.colour_name,
        track=Track(np.tile(standing.position, (TICKS, 1)), np.full(TICKS, standing.yaw), still),
        present=np.ones(TICKS, dtype=bool),
        braking=np.zeros(TICKS, dtype=bool),
        attribute=(attribute,) * TICKS,
        intent=intents.get(kind, "standing on the road"),
    )


def _walker_actor(walker: Walker, number: int, recording: Recording) -> Actor:
    rows = [step[number] for step in recording.walkers]
    x, y = (_to_ticks(np.array([row[i] for row in rows])) for i in (0, 1))
    states = [rows[min(round(t * TICK_S / STEP_S), len(rows) - 1)][3] for t in range(TICKS)]
    speed = np.array([walker.speed if state == "walking" else 0.0 for state in states])
    if walker.crossing is not None:
        intent = "crossing the street" if speed.max() > 0 else "waiting to cross the street"
    else:
        intent = "walking along the pavement" if speed.max() > 0 else "standing on the pavement"
    return Actor(
        id=0,
        category=walker.body.category,
        size_wlh=np.array(walker.body.size_wlh),
        colour=walker.body.colour,
        colour_name=walker.body.colour_name,
        track=Track(np.stack([x, y], axis=-1), np.full(TICKS, walker.yaw), speed),
        present=np.ones(TICKS, dtype=bool),
        braking=np.zeros(TICKS, dtype=bool),
        attribute=tuple("pedestrian.moving" if v > 0 else "pedestrian.standing" for v in speed),
        intent=intent,
    )


def _without_overlaps(
    ego: FloatArray, actors: list[Actor], first_standing: int, parked: int
) -> list[Actor]:
    """Drop people on the pavement and cars at the kerb until no two boxes share ground.

    Nobody reacts to those, so that leaving them out changes nothing else; bodies in traffic are
    clear of each other already.
    """
    every = slice(None, None, 4)
    wide, long = (np.array([a.size_wlh[i] for a in actors]) + 0.02 for i in (0, 1))
    xy = np.array([a.track.xy[every] for a in actors])
    yaw = np.array([a.track.yaw[every] for a in actors])
    boxes = np.concatenate([rectangle(xy, yaw, wide[:, None], long[:, None]), ego[None, every]])
    reach = np.ptp(boxes[:, 0], axis=1).sum(-1)  # of each box, as it is at first
    standing = range(first_standing, first_standing + parked)
    # Who is looked at first stays: parked bodies, then in the order of the list.
    order = [*standing, *(i for i in range(len(actors)) if i not in standing)]
    taken = [len(actors)]  # the ego car
    for i in order:
        corner_apart = np.abs(boxes[i, :, 0] - boxes[taken, :, 0]).sum(-1)
        near = corner_apart < 2 * (reach[i] + reach[taken])[:, None]
        other, tick = np.nonzero(near)
        if not rectangles_overlap(boxes[i, tick], boxes[np.array(taken)[other], tick]).any():
            taken.append(i)
    return [actors[i] for i in sorted(taken[1:])]


def _renumbered(actor: Actor, number: int) -> Actor:
    return replace(actor, id=number)


def _describe(ego: EgoLog, actors: Sequence[Actor]) -> str:
    """A scene description in nuScenes' manner: a few comma-separated phrases."""
    words = " ".join((*ego.narration, *ego.reason))
    intents = " ".join(actor.intent for actor in actors)
    categories = {actor.category for actor in actors}
    phrases = (
        ("turning left", words, "turn left"),
        ("turning right", words, "turn right"),
        ("bend to the", words, "winding road"),
        ("standing still", words, "wait"),
        ("light ahead is", words, "traffic light"),
        ("pedestrian is crossing", words, "peds crossing"),
        ("crossing the street", intents, "ped on crosswalk"),
        ("parked truck is in the way", words, "pass parked truck"),
        ("parked bus is in the way", words, "pass parked bus"),
        ("parked trailer is in the way", words, "pass parked trailer"),
        ("construction site is in the way", words, "construction site"),
        ("in front is braking", words, "follow braking vehicle"),
        ("bicycle in front", words, "bicycle ahead"),
        ("motorcycle in front", words, "motorcycle ahead"),
    )
    parts = [phrase for word, text, phrase in phrases if word in text]
    if "peds crossing" in parts and "ped on crosswalk" in parts:
        parts.remove("ped on crosswalk")
    parts += [
        phrase
        for category, phrase in (
            ("vehicle.bus.rigid", "bus"),
            ("vehicle.construction", "excavator"),
        )
        if category in categories
    ]
    parts.append("dense traffic" if len(actors) > 34 else "some traffic")
    text = ", ".join(parts)
    return text[0].upper() + text[1:]
