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

    body: Body
    position: FloatArray
    yaw: float


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
    present = s < path.length_m - 1.0
    speed = np.where(present, speed, 0.0)
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
        present=present,
        braking=acceleration < BRAKE_LIGHT_ACCEL,
        attribute=tuple(words[0] if m else words[1] for m in moving),
        intent=vehicle.intent,
    )


def _parked_actor(standing: Standing) -> Actor:
    body = standing.body
    still = np.zeros(TICKS)
    attribute = "vehicle.parked" if body.category.startswith("vehicle") else ""
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
        intent="parked at the kerb" if attribute else "standing on the road",
    )


def _walker_actor(walker: Walker, number: int, recording: Recording) -> Actor:
    rows = [step[number] for step in recording.walkers]
    x, y = (_to_ticks(np.array([row[i] for row in rows])) for i in (0, 1))
    states = [rows[min(round(t * TICK_S / STEP_S), len(rows) - 1)][3] for t in range(TICKS)]
    speed = np.array([walker.speed if state == "walking" else 0.0 for state in states])
    crossing = walker.crossing is not None
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
        intent="crossing the street" if crossing else "walking along the pavement",
    )


def _without_overlaps(
    ego: FloatArray, actors: list[Actor], first_standing: int, parked: int
) -> list[Actor]:
    """Drop actors until no two boxes share ground; the ego car and what it swings around stay.

    The traffic model keeps its distance along paths; what is left to clash are rear ends that cut
    corners.
    """
    every = slice(None, None, 4)
    boxes = [
        rectangle(a.track.xy[every], a.track.yaw[every], a.size_wlh[0] + 0.1, a.size_wlh[1] + 0.1)
        for a in actors
    ]
    present = [a.present[every] for a in actors]
    standing = range(first_standing, first_standing + parked)
    # Who is looked at first stays: parked bodies, then in the order of the list.
    order = [*standing, *(i for i in range(len(actors)) if i not in standing)]
    kept: list[int] = []
    for i in order:
        clash = bool((rectangles_overlap(ego[every], boxes[i]) & present[i]).any())
        for j in kept:
            both = present[i] & present[j]
            clash = clash or bool((rectangles_overlap(boxes[i], boxes[j]) & both).any())
        if not clash:
            kept.append(i)
    return [actors[i] for i in sorted(kept)]


def _renumbered(actor: Actor, number: int) -> Actor:
    return replace(actor, id=number)


def _describe(ego: EgoLog, actors: Sequence[Actor]) -> str:
    """A scene description in nuScenes' manner: a few comma-separated phrases."""
    turned = float(ego.track.yaw[-1] - ego.track.yaw[0])
    parts = ["Turn left" if turned > 0.9 else "turn right" if turned < -0.9 else "Drive on"]
    if bool((ego.track.speed < 0.2).any()):
        parts.append("wait")
    reasons = " ".join(ego.reason)
    for word, phrase in (
        ("light", "traffic light"),
        ("pedestrian", "peds crossing"),
        ("parked truck", "pass parked truck"),
        ("road works", "road works"),
        ("bicycle", "bicycle ahead"),
    ):
        if word in reasons:
            parts.append(phrase)
    parts.append("dense traffic" if len(actors) > 28 else "some traffic")
    return ", ".join(parts).capitalize()
