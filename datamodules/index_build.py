"""Makes the arrays of an index from the raw tables, maps and CAN bus of a nuScenes root.

Names of the arrays (F key-frames, P annotations, 6 cameras in the order of CAMERAS):

    frame.*       token, scene, position, prev, next, timestamp_us, lidar_file, lidar_to_global,
                  ego_to_global, ego_quaternion; annotations [F + 1] bounds of each key-frame's
                  boxes; by_token: rows by ascending token
    camera.*      token, file, size, intrinsics, global_to_camera, timestamp_us, all [F, 6, ...]
    scene.*       name, token, location, description, split; frames [S + 1] bounds
    annotation.*  the fields of Annotations, attribute; by_token
    instance.*, category.*, attribute.*    token or name
    can_bus.*     the fields of CanBus
    path.*        the fields of AgentPaths
    ego.*         the fields of EgoTable
    map.*         location; map.<location>.<layer>.<start, end, element>
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.splits import create_splits_scenes

from datamodules.agents import agent_paths
from datamodules.can_bus import CanBus, CanBusReader
from datamodules.ego_state import can_bus_vector, ego_state, future_positions, past_positions
from datamodules.ego_trajectories import cached_trajectories, planning_label
from datamodules.map_geometry import expansion_file, location_map
from datamodules.poses import FloatArray, inverse, rigid
from datamodules.records import (
    LIDAR,
    SPLITS,
    EgoTable,
    FrameRecord,
    FrameTable,
    Index,
    index_of_arrays,
)
from datamodules.tables import Progress, Tables
from odvla.errors import UserError
from odvla.types import CAMERAS, DETECTION_CLASSES

MAX_VELOCITY_GAP_S = 1.5  # longest step the devkit takes a velocity over; doubled when centred
CHANNELS = (LIDAR, *CAMERAS)
RECENT = 64  # key-frames; more than the past and the future that are looked at
Columns = dict[str, NDArray[Any]]


def index_arrays(
    tables: Tables, root: Path, version: str, progress: Progress | None = None
) -> Columns:
    """All arrays of a root's index; see index_steps."""
    columns: Columns = {}
    for step in index_steps(lambda: tables, root, version, progress).values():
        columns |= step(columns)
    return columns


def index_steps(
    tables: Callable[[], Tables], root: Path, version: str, progress: Progress | None = None
) -> dict[str, Callable[[Columns], Columns]]:
    """What an index is made in, by name: each step takes all arrays before it and makes more.

    Args:
        tables: reads those of the root (the devkit's NuScenes does as well).
        root: for maps and CAN bus.
        version: of the tables.
        progress: told about each part.

    Raises:
        UserError: in a step: a record is missing or does not fit; the sentence names it.
    """

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    def of_tables(_: Columns) -> Columns:
        content = tables()
        tell("scenes", 0, 1)
        samples, columns = _scenes(content, version)
        numbers = {sample["token"]: number for number, (sample, _) in enumerate(samples)}
        tell("boxes", 0, 1)
        columns |= _annotations(content, samples, numbers)
        tell("key-frames", 0, 1)
        return columns | _frames(content, columns["scene.frames"], samples, numbers)

    def can_bus_and_maps(columns: Columns) -> Columns:
        return _can_bus(root, columns, tell) | _maps(root, columns, tell)

    def agents_and_ego(columns: Columns) -> Columns:
        bare = index_of_arrays(root, version, columns)
        tell("paths of agents", 0, 1)
        paths = agent_paths(bare)
        found = {f"path.{f.name}": getattr(paths, f.name) for f in fields(paths)}
        return found | _ego(bare, tell)

    return {
        "tables": of_tables,
        "can_bus_and_maps": can_bus_and_maps,
        "agents_and_ego": agents_and_ego,
    }


def _texts(values: list[str]) -> NDArray[np.bytes_]:
    return np.array([value.encode() for value in values], dtype=np.bytes_)


def _by_token(tokens: NDArray[np.bytes_]) -> NDArray[np.int64]:
    return np.argsort(tokens, kind="stable").astype(np.int64)


def _scenes(tables: Tables, version: str) -> tuple[list[tuple[dict[str, Any], int]], Columns]:
    """Samples in time order, scene by scene, with the scene's number; and the scenes."""
    official = create_splits_scenes()
    split_of = {name: split for split, key in SPLITS[version].items() for name in official[key]}
    samples: list[tuple[dict[str, Any], int]] = []
    bounds = [0]
    locations = []
    for number, scene in enumerate(tables.scene):
        token = scene["first_sample_token"]
        while token:
            sample = tables.get("sample", token)
            samples.append((sample, number))
            token = sample["next"]
        bounds.append(len(samples))
        locations.append(tables.get("log", scene["log_token"])["location"])
    scenes = tables.scene
    return samples, {
        "scene.name": _texts([scene["name"] for scene in scenes]),
        "scene.token": _texts([scene["token"] for scene in scenes]),
        "scene.location": _texts(locations),
        "scene.description": _texts([scene["description"] for scene in scenes]),
        "scene.split": _texts([split_of.get(scene["name"], "") for scene in scenes]),
        "scene.frames": np.array(bounds, dtype=np.int64),
    }


def _annotations(
    tables: Tables, samples: list[tuple[dict[str, Any], int]], numbers: dict[str, int]
) -> Columns:
    """Boxes of all key-frames and the row each key-frame starts at (F + 1 numbers)."""
    tokens = [token for sample, _ in samples for token in sample["anns"]]
    bounds = np.concatenate([[0], np.cumsum([len(s["anns"]) for s, _ in samples])])
    records = [tables.get("sample_annotation", token) for token in tokens]
    row_of = {token: row for row, token in enumerate(tokens)}
    names = [record["name"] for record in tables.category]
    category_number = {name: number for number, name in enumerate(names)}
    attribute_number = {record["token"]: n for n, record in enumerate(tables.attribute)}
    labels = [
        DETECTION_CLASSES.index(name) if name else -1
        for name in (category_to_detection_name(category) for category in names)
    ]

    def column(values: list[Any], dtype: Any, *shape: int) -> NDArray[Any]:
        return np.array(values, dtype=dtype).reshape(len(records), *shape)

    category = column([category_number[r["category_name"]] for r in records], np.int64)
    frame = column([numbers[r["sample_token"]] for r in records], np.int64)
    times = np.array([sample["timestamp"] for sample, _ in samples], dtype=np.int64)
    centre = column([r["translation"] for r in records], np.float64, 3)
    following = column([row_of.get(r["next"], -1) for r in records], np.int64)
    previous = column([row_of.get(r["prev"], -1) for r in records], np.int64)
    points = [r["num_lidar_pts"] + r["num_radar_pts"] for r in records]
    kinds = [attribute_number.get((r["attribute_tokens"] or [""])[0], -1) for r in records]
    instances = [tables.getind("instance", r["instance_token"]) for r in records]
    token = _texts(tokens)
    return {
        "annotation.token": token,
        "annotation.by_token": _by_token(token),
        "annotation.frame": frame,
        "annotation.instance": column(instances, np.int64),
        "annotation.category": category,
        "annotation.label": np.array(labels, dtype=np.int64)[category],
        "annotation.centre": centre,
        "annotation.size": column([r["size"] for r in records], np.float64, 3),
        "annotation.rotation": column([r["rotation"] for r in records], np.float64, 4),
        "annotation.velocity": velocities(centre[:, :2], times[frame], previous, following),
        "annotation.points": column(points, np.int64),
        # The tokens are "1" to "4".
        "annotation.visibility": column(
            [int(r["visibility_token"] or 0) for r in records], np.int64
        ),
        "annotation.attribute": column(kinds, np.int64),
        "annotation.next": following,
        "annotation.prev": previous,
        "frame.annotations": bounds.astype(np.int64),
        "category.name": _texts(names),
        "attribute.name": _texts([record["name"] for record in tables.attribute]),
        "instance.token": _texts([record["token"] for record in tables.instance]),
    }


def velocities(
    xy: FloatArray,
    times_us: NDArray[np.int64],
    previous: NDArray[np.int64],
    following: NDArray[np.int64],
    unknown: float = 0.0,
) -> FloatArray:
    """Velocity [P, 2] from the neighbouring annotations, as the devkit's box_velocity has it.

    Args:
        xy: [P, 2] positions of all annotations.
        times_us: [P].
        previous: [P] row of the instance's previous annotation, -1: none.
        following: [P] row of its next one.
        unknown: what stands where it cannot be told (the devkit: NaN).
    """
    here = np.arange(len(xy))
    last = np.where(following >= 0, following, here)
    first = np.where(previous >= 0, previous, here)
    elapsed_s = (times_us[last] - times_us[first]) * 1e-6
    centred = (following >= 0) & (previous >= 0)
    limit_s = np.where(centred, 2 * MAX_VELOCITY_GAP_S, MAX_VELOCITY_GAP_S)
    known = (elapsed_s > 0) & (elapsed_s <= limit_s)
    step = xy[last] - xy[first]
    return np.where(known[:, None], step / np.where(known, elapsed_s, 1.0)[:, None], unknown)


def _frames(
    tables: Tables,
    bounds: NDArray[np.int64],
    samples: list[tuple[dict[str, Any], int]],
    numbers: dict[str, int],
) -> Columns:
    """Key-frames and their cameras."""
    data = [[_sensor_data(tables, sample, name) for name in CHANNELS] for sample, _ in samples]
    sensors = [
        [tables.get("calibrated_sensor", d["calibrated_sensor_token"]) for d in row] for row in data
    ]
    poses = [[tables.get("ego_pose", d["ego_pose_token"]) for d in row] for row in data]
    ego_to_global = _rigid_of(poses)  # [F, 7, 4, 4]
    sensor_to_global = ego_to_global @ _rigid_of(sensors)
    scene = np.array([number for _, number in samples], dtype=np.int64)
    token = _texts([sample["token"] for sample, _ in samples])
    cameras = [row[1:] for row in data]
    intrinsics = [[s["camera_intrinsic"] for s in row[1:]] for row in sensors]

    def neighbour(side: str) -> NDArray[np.int64]:
        return np.array([numbers[s[side]] if s[side] else -1 for s, _ in samples], dtype=np.int64)

    def texts(key: str) -> NDArray[np.bytes_]:
        return _texts([d[key] for row in cameras for d in row]).reshape(-1, len(CAMERAS))

    return {
        "frame.token": token,
        "frame.by_token": _by_token(token),
        "frame.scene": scene,
        "frame.position": np.arange(len(samples)) - bounds[scene],
        "frame.prev": neighbour("prev"),
        "frame.next": neighbour("next"),
        "frame.timestamp_us": np.array([s["timestamp"] for s, _ in samples], dtype=np.int64),
        "frame.lidar_file": _texts([row[0]["filename"] for row in data]),
        "frame.lidar_to_global": sensor_to_global[:, 0],
        "frame.ego_to_global": ego_to_global[:, 0],
        "frame.ego_quaternion": np.array([row[0]["rotation"] for row in poses], dtype=np.float64),
        "camera.token": texts("token"),
        "camera.file": texts("filename"),
        "camera.size": np.array([[(d["width"], d["height"]) for d in row] for row in cameras]),
        "camera.timestamp_us": np.array([[d["timestamp"] for d in row] for row in cameras]),
        "camera.intrinsics": np.array(intrinsics, dtype=np.float64),
        "camera.global_to_camera": inverse(sensor_to_global[:, 1:]),
    }


def _sensor_data(tables: Tables, sample: dict[str, Any], channel: str) -> dict[str, Any]:
    if channel not in sample["data"]:
        raise UserError(
            f"sample {sample['token']} has no key-frame of {channel} in sample_data.json"
        )
    return tables.get("sample_data", sample["data"][channel])


def _rigid_of(records: list[list[dict[str, Any]]]) -> FloatArray:
    return rigid(
        np.array([[r["translation"] for r in row] for row in records]),
        np.array([[r["rotation"] for r in row] for row in records]),
    )


def _can_bus(root: Path, columns: Columns, tell: Progress) -> Columns:
    """CAN values at every key-frame."""
    reader = CanBusReader(root)
    bounds, names = columns["scene.frames"], columns["scene.name"]
    parts = []
    for number, name in enumerate(names):
        tell("CAN bus", number, len(names))
        times = columns["frame.timestamp_us"][bounds[number] : bounds[number + 1]]
        parts.append(reader.at(name.decode(), times))
    reader.warn_missing()
    return {
        f"can_bus.{f.name}": np.concatenate([getattr(p, f.name) for p in parts])
        for f in fields(CanBus)
    }


def _maps(root: Path, columns: Columns, tell: Progress) -> Columns:
    """Geometry of every location that has a map expansion."""
    locations = sorted({name.decode() for name in columns["scene.location"]})
    there = [name for name in locations if expansion_file(root, name).is_file()]
    found: Columns = {"map.location": _texts(there or [""])}
    for number, name in enumerate(there):
        tell("maps", number, len(there))
        layers = location_map(root, name).columns()
        found |= {f"map.{name}.{part}": values for part, values in layers.items()}
    return found


class _RecentFrames(FrameTable):
    """Key-frames that are asked for again and again are made once, and soon forgotten."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(arrays)
        self._made: dict[int, FrameRecord] = {}

    def __getitem__(self, number: Any) -> Any:
        """One key-frame, or several."""
        if isinstance(number, slice) or number < 0:
            return super().__getitem__(number)
        if number not in self._made:
            if len(self._made) == RECENT:
                del self._made[next(iter(self._made))]
            self._made[number] = super().__getitem__(number)
        return self._made[number]


def _ego(index: Index, tell: Progress) -> Columns:
    """The car at every key-frame; see EgoTable."""
    # Past and future of a key-frame are looked up some fifty times.
    index = replace(index, frames=_RecentFrames(index.arrays))
    rows: dict[str, list[Any]] = {f.name: [] for f in fields(EgoTable)}
    for frame in index.frames:
        if frame.number % 500 == 0:
            tell("path of the car", frame.number, len(index.frames))
        future, mask = future_positions(index, frame)
        cached, label = cached_trajectories(index, frame), planning_label(index, frame)
        state = ego_state(index, frame)
        values: dict[str, Any] = {
            "history": past_positions(index, frame),
            "future": future,
            "future_mask": mask,
            "can_bus": can_bus_vector(index, frame, scene_start=False),
            "cached_velocity": cached.velocity,
            "cached_yaw_rate": cached.yaw_rate,
            "uniad_path": label.path,
            "uniad_velocity": label.velocity,
        }
        for name, row in rows.items():
            row.append(values[name] if name in values else getattr(state, name)[0].numpy())
    return {f"ego.{name}": np.array(row) for name, row in rows.items()}
