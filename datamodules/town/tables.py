"""The 13 nuScenes tables of a town, field by field as the devkit and its users expect them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from datamodules.town.log import (
    KEYFRAMES_PER_SCENE,
    TICK_S,
    TICKS_PER_KEYFRAME,
    Actor,
    SceneLog,
)
from datamodules.town.rig import FloatArray, Rig
from datamodules.town.tokens import TokenIndex, make_token

Record = dict[str, Any]
LIDAR = "LIDAR_TOP"
CATEGORIES = {
    "human.pedestrian.adult": "Adult on foot.",
    "human.pedestrian.child": "Child on foot.",
    "human.pedestrian.wheelchair": "Person in a wheelchair.",
    "human.pedestrian.stroller": "Stroller, with or without a child.",
    "human.pedestrian.personal_mobility": "Scooter, skateboard or the like, with its rider.",
    "human.pedestrian.police_officer": "Police officer.",
    "human.pedestrian.construction_worker": "Construction worker.",
    "animal": "Animal.",
    "vehicle.car": "Car.",
    "vehicle.motorcycle": "Motorcycle, with its rider if it has one.",
    "vehicle.bicycle": "Bicycle, with its rider if it has one.",
    "vehicle.bus.bendy": "Bus with a joint.",
    "vehicle.bus.rigid": "Bus without a joint.",
    "vehicle.truck": "Truck.",
    "vehicle.construction": "Construction vehicle.",
    "vehicle.emergency.ambulance": "Ambulance.",
    "vehicle.emergency.police": "Police vehicle.",
    "vehicle.trailer": "Trailer.",
    "movable_object.barrier": "Barrier that can be moved.",
    "movable_object.trafficcone": "Traffic cone.",
    "movable_object.pushable_pullable": "Something to push or pull, such as a cart.",
    "movable_object.debris": "Debris on the road.",
    "static_object.bicycle_rack": "Rack to park bicycles.",
}
ATTRIBUTES = {
    "vehicle.moving": "The vehicle moves.",
    "vehicle.stopped": "The vehicle stands still and means to go on.",
    "vehicle.parked": "The vehicle stands still and means to stay.",
    "cycle.with_rider": "Somebody rides it.",
    "cycle.without_rider": "Nobody rides it.",
    "pedestrian.sitting_lying_down": "The person sits or lies.",
    "pedestrian.standing": "The person stands.",
    "pedestrian.moving": "The person moves.",
}
# token -> (level, lowest visible share)
VISIBILITY = {
    "1": ("v0-40", 0.0),
    "2": ("v40-60", 0.4),
    "3": ("v60-80", 0.6),
    "4": ("v80-100", 0.8),
}
DIGITS = 5


@dataclass(frozen=True)
class KeyframeView:
    """What the sensors saw of the actors at one key-frame, by actor id."""

    hits: dict[int, int]  # lidar points
    visible: dict[int, float]  # share that some camera sees


def annotated_actors(log: SceneLog, keyframe: int, view: KeyframeView) -> tuple[int, ...]:
    """Actors to annotate: those that the lidar hits or a camera shows a fair part of."""
    tick = keyframe * TICKS_PER_KEYFRAME
    return tuple(
        actor.id
        for actor in log.actors
        if actor.present[tick]
        and (view.hits.get(actor.id, 0) > 0 or view.visible.get(actor.id, 0.0) > 0.15)
    )


def timestamp_us(log: SceneLog, keyframe: int) -> int:
    """Time of a key-frame in Unix microseconds."""
    return round((log.start_time_s + keyframe * TICKS_PER_KEYFRAME * TICK_S) * 1e6)


def log_file(log: SceneLog) -> str:
    """Name of the drive that a scene is cut from."""
    when = datetime.fromtimestamp(log.start_time_s, UTC)
    return f"n000-{when:%Y-%m-%d-%H-%M-%S}+0000"


def sensor_file(log: SceneLog, keyframe: int, channel: str) -> str:
    """Path of a key-frame file relative to the data root, named as nuScenes names them."""
    ending = "pcd.bin" if channel == LIDAR else "jpg"
    name = f"{log_file(log)}__{channel}__{timestamp_us(log, keyframe)}.{ending}"
    return f"samples/{channel}/{name}"


def fixed_tables(seed: int) -> dict[str, list[Record]]:
    """Tables that are the same for every town: category, attribute, visibility."""
    return {
        "category": [
            {"token": make_token(seed, "category", name), "name": name, "description": text}
            for name, text in CATEGORIES.items()
        ],
        "attribute": [
            {"token": make_token(seed, "attribute", name), "name": name, "description": text}
            for name, text in ATTRIBUTES.items()
        ],
        "visibility": [
            {"token": token, "level": level, "description": f"share visible in cameras: {level}"}
            for token, (level, _) in VISIBILITY.items()
        ],
    }


def sensor_table(seed: int, channels: Sequence[str]) -> list[Record]:
    """One record a sensor."""
    return [
        {
            "token": make_token(seed, "sensor", channel),
            "channel": channel,
            "modality": "lidar" if channel == LIDAR else "camera",
        }
        for channel in channels
    ]


def map_table(seed: int, logs: Sequence[SceneLog]) -> list[Record]:
    """One semantic prior a location, listing the drives made there."""
    by_location: dict[str, list[str]] = defaultdict(list)
    for log in logs:
        by_location[log.location].append(make_token(seed, "log", log.name))
    return [
        {
            "token": make_token(seed, "map", location),
            "category": "semantic_prior",
            "filename": f"maps/{make_token(seed, 'map', location)}.png",
            "log_tokens": tokens,
        }
        for location, tokens in sorted(by_location.items())
    ]


def scene_tables(
    log: SceneLog, rig: Rig, views: Sequence[KeyframeView], tokens: TokenIndex
) -> dict[str, list[Record]]:
    """Everything that belongs to one scene.

    Args:
        log: the scene.
        rig: gives calibration and image size.
        views: one a key-frame.
        tokens: must know which actors of this scene are annotated.
    """
    tables: dict[str, list[Record]] = {
        "log": [_log_record(log, tokens)],
        "scene": [_scene_record(log, tokens)],
        "calibrated_sensor": _calibration_records(log, rig, tokens),
        "sample": [],
        "ego_pose": [],
        "sample_data": [],
    }
    for keyframe in range(KEYFRAMES_PER_SCENE):
        tables["sample"].append(_sample_record(log, keyframe, tokens))
        for channel in (*rig.cameras, LIDAR):
            pose, data = _sensor_records(log, keyframe, channel, rig, tokens)
            tables["ego_pose"].append(pose)
            tables["sample_data"].append(data)
    tables |= _annotation_records(log, views, tokens)
    return tables


def _log_record(log: SceneLog, tokens: TokenIndex) -> Record:
    return {
        "token": make_token(tokens.seed, "log", log.name),
        "logfile": log_file(log),
        "vehicle": "n000",
        "date_captured": f"{datetime.fromtimestamp(log.start_time_s, UTC):%Y-%m-%d}",
        "location": log.location,
    }


def _scene_record(log: SceneLog, tokens: TokenIndex) -> Record:
    return {
        "token": tokens.scene(log.name),
        "log_token": make_token(tokens.seed, "log", log.name),
        "nbr_samples": KEYFRAMES_PER_SCENE,
        "first_sample_token": tokens.sample(log.name, 0),
        "last_sample_token": tokens.sample(log.name, KEYFRAMES_PER_SCENE - 1),
        "name": log.name,
        "description": log.description,
    }


def _calibration_records(log: SceneLog, rig: Rig, tokens: TokenIndex) -> list[Record]:
    records = []
    for channel in (*rig.cameras, LIDAR):
        mount = rig.lidar if channel == LIDAR else rig.cameras[channel]
        intrinsic = [] if channel == LIDAR else rig.intrinsics[channel].tolist()
        records.append(
            {
                "token": make_token(tokens.seed, "calibrated_sensor", log.name, channel),
                "sensor_token": make_token(tokens.seed, "sensor", channel),
                "translation": mount.translation.tolist(),
                "rotation": list(mount.quaternion),
                "camera_intrinsic": intrinsic,
            }
        )
    return records


def _sample_record(log: SceneLog, keyframe: int, tokens: TokenIndex) -> Record:
    last = keyframe == KEYFRAMES_PER_SCENE - 1
    return {
        "token": tokens.sample(log.name, keyframe),
        "timestamp": timestamp_us(log, keyframe),
        "prev": tokens.sample(log.name, keyframe - 1) if keyframe else "",
        "next": "" if last else tokens.sample(log.name, keyframe + 1),
        "scene_token": tokens.scene(log.name),
    }


def _sensor_records(
    log: SceneLog, keyframe: int, channel: str, rig: Rig, tokens: TokenIndex
) -> tuple[Record, Record]:
    """The ego pose and the file of one sensor; as in nuScenes, both share their token."""

    def token(at: int) -> str:
        inside = 0 <= at < KEYFRAMES_PER_SCENE
        return make_token(tokens.seed, "sample_data", log.name, at, channel) if inside else ""

    tick = keyframe * TICKS_PER_KEYFRAME
    xy = log.ego.track.xy[tick]
    pose = {
        "token": token(keyframe),
        "timestamp": timestamp_us(log, keyframe),
        "rotation": yaw_quaternion(float(log.ego.track.yaw[tick])),
        "translation": [round(float(xy[0]), DIGITS), round(float(xy[1]), DIGITS), 0.0],
    }
    is_lidar = channel == LIDAR
    data = {
        "token": token(keyframe),
        "sample_token": tokens.sample(log.name, keyframe),
        "ego_pose_token": token(keyframe),
        "calibrated_sensor_token": make_token(tokens.seed, "calibrated_sensor", log.name, channel),
        "timestamp": timestamp_us(log, keyframe),
        "fileformat": "pcd" if is_lidar else "jpg",
        "is_key_frame": True,
        "height": 0 if is_lidar else rig.height,
        "width": 0 if is_lidar else rig.width,
        "filename": sensor_file(log, keyframe, channel),
        "prev": token(keyframe - 1),
        "next": token(keyframe + 1),
    }
    return pose, data


def _annotation_records(
    log: SceneLog, views: Sequence[KeyframeView], tokens: TokenIndex
) -> dict[str, list[Record]]:
    """Boxes and the instances they belong to."""
    seen_at: dict[int, list[int]] = defaultdict(list)
    for keyframe in range(KEYFRAMES_PER_SCENE):
        for actor in tokens.annotated[log.name, keyframe]:
            seen_at[actor].append(keyframe)
    annotations, instances = [], []
    actors = {actor.id: actor for actor in log.actors}
    for number, keyframes in sorted(seen_at.items()):
        names = [tokens.annotation(log.name, keyframe, number) for keyframe in keyframes]
        instances.append(
            {
                "token": tokens.instance(log.name, number),
                "category_token": make_token(tokens.seed, "category", actors[number].category),
                "nbr_annotations": len(keyframes),
                "first_annotation_token": names[0],
                "last_annotation_token": names[-1],
            }
        )
        for position, keyframe in enumerate(keyframes):
            record = _box_record(log, keyframe, actors[number], views[keyframe], tokens)
            record["prev"] = names[position - 1] if position else ""
            record["next"] = names[position + 1] if position + 1 < len(names) else ""
            annotations.append(record)
    annotations.sort(key=lambda record: record["sample_token"])
    return {"sample_annotation": annotations, "instance": instances}


def _box_record(
    log: SceneLog, keyframe: int, actor: Actor, view: KeyframeView, tokens: TokenIndex
) -> Record:
    tick = keyframe * TICKS_PER_KEYFRAME
    x, y = actor.track.xy[tick]
    share = view.visible.get(actor.id, 0.0)
    attribute = actor.attribute[tick]
    return {
        "token": tokens.annotation(log.name, keyframe, actor.id),
        "sample_token": tokens.sample(log.name, keyframe),
        "instance_token": tokens.instance(log.name, actor.id),
        "visibility_token": max(
            token for token, (_, least) in VISIBILITY.items() if share >= least
        ),
        "attribute_tokens": [make_token(tokens.seed, "attribute", attribute)] if attribute else [],
        "translation": [
            round(float(x), DIGITS),
            round(float(y), DIGITS),
            round(float(actor.size_wlh[2]) / 2, DIGITS),
        ],
        "size": [round(float(v), 3) for v in actor.size_wlh],
        "rotation": yaw_quaternion(float(actor.track.yaw[tick])),
        "num_lidar_pts": view.hits.get(actor.id, 0),
        "num_radar_pts": 0,
    }


def yaw_quaternion(yaw: float) -> list[float]:
    """Rotation about z as w, x, y, z."""
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


def interpolated(values: FloatArray, times_s: FloatArray) -> FloatArray:
    """Rows every TICK_S at any times of the scene."""
    ticks = np.arange(len(values)) * TICK_S
    if values.ndim == 1:
        return np.interp(times_s, ticks, values)
    return np.stack([np.interp(times_s, ticks, column) for column in values.T], axis=-1)
