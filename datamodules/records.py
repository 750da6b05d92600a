"""The index of a nuScenes root: everything the readers need of its tables, light and picklable.

`load_index` is the only place that opens the devkit's database. It is kept in memory per root and
version, so that the stages of one run share it; workers receive the arrays, never the database.

Shape legend: F key-frames of the root, P annotations of the root.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes

from datamodules.can_bus import CanBus, CanBusReader
from datamodules.poses import FloatArray, inverse, rigid
from datamodules.tables import check_root, open_tables
from odvla.errors import UserError
from odvla.types import CAMERAS, DETECTION_CLASSES

log = logging.getLogger(__name__)
LIDAR = "LIDAR_TOP"
# Split of this toolkit -> the devkit's split of a version.
SPLITS = {
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-test": {"test": "test"},
}
MAX_VELOCITY_GAP_S = 1.5  # longest step the devkit takes a velocity over; doubled when centred


@dataclass(frozen=True)
class CameraRecord:
    """One image and its calibration."""

    name: str
    sample_data_token: str
    file: str  # relative to the root
    size: tuple[int, int]  # width, height in pixels
    intrinsics: FloatArray  # [3, 3] pixels of the file
    global_to_camera: FloatArray  # [4, 4] at the camera's own exposure time


@dataclass(frozen=True)
class FrameRecord:
    """One key-frame. prev and next are frame numbers, -1 at the ends of the scene."""

    token: str
    number: int  # position in Index.frames
    scene: int  # position in Index.scenes
    position: int  # 0 for the first key-frame of the scene
    prev: int
    next: int
    timestamp_us: int
    cameras: tuple[CameraRecord, ...]  # in the order of CAMERAS
    lidar_file: str
    lidar_to_global: FloatArray  # [4, 4] at the lidar's time, which is t0
    ego_to_global: FloatArray  # [4, 4] at t0
    ego_quaternion: FloatArray  # [4] rotation of ego_to_global as the table gives it
    first_annotation: int
    last_annotation: int  # one past the last row of Index.annotations


@dataclass(frozen=True)
class SceneRecord:
    """One scene: frames [first, last) of the index."""

    name: str
    token: str
    location: str
    description: str
    split: str  # train | val | test | "" (in no split of this version)
    first: int
    last: int


@dataclass(frozen=True)
class Annotations:
    """All annotated boxes of a root, in the global frame, sorted by key-frame."""

    token: NDArray[np.bytes_]  # [P]
    frame: NDArray[np.int64]  # [P] frame number
    instance: NDArray[np.int64]  # [P] row of the instance table: the track id
    category: NDArray[np.int64]  # [P] index into `categories`
    label: NDArray[np.int64]  # [P] index into DETECTION_CLASSES, -1 for other categories
    centre: FloatArray  # [P, 3] metres
    size: FloatArray  # [P, 3] width, length, height in metres
    rotation: FloatArray  # [P, 4] quaternion
    velocity: FloatArray  # [P, 2] m/s over ground in global axes; 0 where it cannot be told
    points: NDArray[np.int64]  # [P] lidar + radar points inside
    visibility: NDArray[np.int64]  # [P] level 1 (hidden) .. 4, 0 when not given
    next: NDArray[np.int64]  # [P] row of the instance's next annotation, -1: none
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """A nuScenes root, ready to be read frame by frame."""

    root: Path
    version: str
    scenes: tuple[SceneRecord, ...]
    frames: tuple[FrameRecord, ...]
    annotations: Annotations
    can_bus: CanBus
    number_of_token: dict[str, int] = field(repr=False)
    instance_tokens: tuple[str, ...] = field(repr=False, default=())

    def frame(self, sample_token: str) -> FrameRecord:
        """The key-frame of a sample token.

        Raises:
            UserError: the root has no such sample.
        """
        if sample_token not in self.number_of_token:
            raise UserError(f"sample {sample_token!r} is not in {self.root / self.version}")
        return self.frames[self.number_of_token[sample_token]]

    def scenes_of(self, split: str) -> tuple[SceneRecord, ...]:
        """Scenes of a split, in table order.

        Raises:
            UserError: this version has no such split, or no scene of it is there.
        """
        if split not in SPLITS[self.version]:
            raise UserError(
                f"{self.version} has no split {split!r}, only {list(SPLITS[self.version])}"
            )
        scenes = tuple(scene for scene in self.scenes if scene.split == split)
        if not scenes:
            raise UserError(f"{self.root / self.version} holds no scene of the {split} split")
        return scenes

    def location(self, frame: FrameRecord) -> str:
        """Map the frame lies on."""
        return self.scenes[frame.scene].location

    @cached_property
    def annotation_rows(self) -> dict[str, int]:
        """Annotation token -> row of `annotations`."""
        return {token.decode(): row for row, token in enumerate(self.annotations.token)}


def load_index(root: str | Path, version: str) -> Index:
    """The index of a root, built once per process and root.

    Args:
        root: a nuScenes root (or a generated town).
        version: v1.0-mini, v1.0-trainval or v1.0-test.

    Raises:
        UserError: anything missing or inconsistent; the sentence names it.
    """
    folder = Path(root).expanduser().resolve()
    if version not in SPLITS:
        raise UserError(f"data version {version!r} is not one of {', '.join(SPLITS)}")
    tables = check_root(folder, version)
    # The time of the largest table tells a regenerated root from the one in memory.
    return _load_index(folder, version, (tables / "sample_data.json").stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load_index(root: Path, version: str, _modified_ns: int) -> Index:
    tables = open_tables(root, version)
    scenes, samples = _scenes_and_samples(tables, version)
    numbers = {sample["token"]: number for number, (sample, _) in enumerate(samples)}
    annotations, bounds = _annotations(tables, samples, numbers)
    frames = _frames(tables, scenes, samples, numbers, bounds)
    reader = CanBusReader(root)
    parts = [
        reader.at(s.name, np.array([f.timestamp_us for f in frames[s.first : s.last]]))
        for s in scenes
    ]
    reader.warn_missing()
    names = ("acceleration", "rotation_rate", "velocity", "steering", "available")
    can_bus = CanBus(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))
    return Index(
        root,
        version,
        scenes,
        frames,
        annotations,
        can_bus,
        numbers,
        tuple(record["token"] for record in tables.instance),
    )


def _scenes_and_samples(
    tables: NuScenes, version: str
) -> tuple[tuple[SceneRecord, ...], list[tuple[dict[str, Any], int]]]:
    """Scenes in table order, and their samples in time order with the scene's number."""
    official = create_splits_scenes()
    split_of = {name: split for split, key in SPLITS[version].items() for name in official[key]}
    scenes: list[SceneRecord] = []
    samples: list[tuple[dict[str, Any], int]] = []
    for scene in tables.scene:
        first = len(samples)
        token = scene["first_sample_token"]
        while token:
            sample = tables.get("sample", token)
            if sample["scene_token"] != scene["token"] or len(samples) - first >= len(
                tables.sample
            ):
                raise UserError(f"sample {token} does not belong to the chain of {scene['name']}")
            samples.append((sample, len(scenes)))
            token = sample["next"]
        location = tables.get("log", scene["log_token"])["location"]
        scenes.append(
            SceneRecord(
                scene["name"],
                scene["token"],
                location,
                scene["description"],
                split_of.get(scene["name"], ""),
                first,
                len(samples),
            )
        )
    return tuple(scenes), samples


def _annotations(
    tables: NuScenes, samples: list[tuple[dict[str, Any], int]], numbers: dict[str, int]
) -> tuple[Annotations, list[int]]:
    """Boxes of all key-frames and the row each key-frame starts at (F + 1 numbers)."""
    tokens = [token for sample, _ in samples for token in sample["anns"]]
    bounds = np.concatenate([[0], np.cumsum([len(s["anns"]) for s, _ in samples])]).astype(int)
    records = [tables.get("sample_annotation", token) for token in tokens]
    row_of = {token: row for row, token in enumerate(tokens)}
    names = tuple(record["name"] for record in tables.category)
    category_number = {name: number for number, name in enumerate(names)}
    labels = [
        DETECTION_CLASSES.index(name) if name else -1
        for name in (category_to_detection_name(category) for category in names)
    ]
    category = np.array([category_number[r["category_name"]] for r in records], dtype=np.int64)
    frame = np.array([numbers[r["sample_token"]] for r in records], dtype=np.int64)
    times = np.array([sample["timestamp"] for sample, _ in samples], dtype=np.int64)
    centre = np.array([r["translation"] for r in records], dtype=np.float64).reshape(-1, 3)
    following = np.array([row_of.get(r["next"], -1) for r in records], dtype=np.int64)
    previous = np.array([row_of.get(r["prev"], -1) for r in records], dtype=np.int64)
    levels = [int(r["visibility_token"] or 0) for r in records]  # the tokens are "1" to "4"
    annotations = Annotations(
        token=np.array(tokens, dtype=np.bytes_),
        frame=frame,
        instance=np.array(
            [tables.getind("instance", r["instance_token"]) for r in records], dtype=np.int64
        ),
        category=category,
        label=np.array(labels, dtype=np.int64)[category],
        centre=centre,
        size=np.array([r["size"] for r in records], dtype=np.float64).reshape(-1, 3),
        rotation=np.array([r["rotation"] for r in records], dtype=np.float64).reshape(-1, 4),
        velocity=_velocities(centre[:, :2], times[frame], previous, following),
        points=np.array([r["num_lidar_pts"] + r["num_radar_pts"] for r in records], dtype=np.int64),
        visibility=np.array(levels, dtype=np.int64),
        next=following,
        categories=names,
    )
    return annotations, bounds.tolist()


def _velocities(
    xy: FloatArray,
    times_us: NDArray[np.int64],
    previous: NDArray[np.int64],
    following: NDArray[np.int64],
) -> FloatArray:
    """Velocity [P, 2] from the neighbouring annotations, as the devkit's box_velocity has it."""
    here = np.arange(len(xy))
    last = np.where(following >= 0, following, here)
    first = np.where(previous >= 0, previous, here)
    elapsed_s = (times_us[last] - times_us[first]) * 1e-6
    centred = (following >= 0) & (previous >= 0)
    limit_s = np.where(centred, 2 * MAX_VELOCITY_GAP_S, MAX_VELOCITY_GAP_S)
    known = (elapsed_s > 0) & (elapsed_s <= limit_s)
    step = xy[last] - xy[first]
    return np.where(known[:, None], step / np.where(known, elapsed_s, 1.0)[:, None], 0.0)


def _frames(
    tables: NuScenes,
    scenes: tuple[SceneRecord, ...],
    samples: list[tuple[dict[str, Any], int]],
    numbers: dict[str, int],
    bounds: list[int],
) -> tuple[FrameRecord, ...]:
    channels = (LIDAR, *CAMERAS)
    data = [[_sensor_data(tables, sample, name) for name in channels] for sample, _ in samples]
    sensors = [
        [tables.get("calibrated_sensor", d["calibrated_sensor_token"]) for d in row] for row in data
    ]
    poses = [[tables.get("ego_pose", d["ego_pose_token"]) for d in row] for row in data]
    sensor_to_ego = _rigid_of(sensors)  # [F, 7, 4, 4]
    ego_to_global = _rigid_of(poses)
    sensor_to_global = ego_to_global @ sensor_to_ego
    global_to_sensor = inverse(sensor_to_global)
    frames = []
    for number, (sample, scene) in enumerate(samples):
        cameras = tuple(
            CameraRecord(
                name,
                data[number][k]["token"],
                data[number][k]["filename"],
                (data[number][k]["width"], data[number][k]["height"]),
                np.array(sensors[number][k]["camera_intrinsic"], dtype=np.float64),
                global_to_sensor[number, k],
            )
            for k, name in enumerate(channels)
            if name != LIDAR
        )
        frames.append(
            FrameRecord(
                token=sample["token"],
                number=number,
                scene=scene,
                position=number - scenes[scene].first,
                prev=numbers[sample["prev"]] if sample["prev"] else -1,
                next=numbers[sample["next"]] if sample["next"] else -1,
                timestamp_us=sample["timestamp"],
                cameras=cameras,
                lidar_file=data[number][0]["filename"],
                lidar_to_global=sensor_to_global[number, 0],
                ego_to_global=ego_to_global[number, 0],
                ego_quaternion=np.array(poses[number][0]["rotation"], dtype=np.float64),
                first_annotation=bounds[number],
                last_annotation=bounds[number + 1],
            )
        )
    return tuple(frames)


def _sensor_data(tables: NuScenes, sample: dict[str, Any], channel: str) -> dict[str, Any]:
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
