"""Records in other projects' forms from raw tables: cameras, sweeps, boxes, CAN bus of a key-frame.

Boxes and poses come from the index, which is checked against the tables; what an index leaves out
(sweeps, points by sensor, calibrations as lists) is read from the tables when a format asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.utils import category_to_detection_name

from datamodules.agents import in_own_frame, rows_of
from datamodules.can_bus import CanBusReader, nearest, pose_vectors
from datamodules.exchange.schema import FUTURE_STEPS
from datamodules.index_build import velocities
from datamodules.occupancy import FrameOccupancy
from datamodules.poses import FloatArray, inverse, rigid, rotation_matrices
from datamodules.records import LIDAR, FrameRecord, Index, SceneRecord
from datamodules.tables import Progress, Tables, open_tables
from odvla.types import CAMERAS

MAX_SWEEPS = 10
# How long ahead the devkit's PredictHelper looks for 16 steps of 0.5 s.
FUTURE_LIMIT_S = FUTURE_STEPS / 2 + 0.15


class Source:
    """Everything that formats are made from.

    Args:
        index: the root's index.
        prefix: what stands before "samples/..." in paths of files.
        progress: told about the tables, which are read on first use.
    """

    def __init__(self, index: Index, prefix: str, progress: Progress | None = None) -> None:
        self.index = index
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        self.progress = progress
        self.occupancy = FrameOccupancy(index, keep=0)
        self._can: dict[int, tuple[FloatArray, list[tuple[float, float] | None]]] = {}

    @cached_property
    def tables(self) -> Tables:
        """The raw tables, with lidar files between the key-frames.

        Raises:
            UserError: a table is missing or inconsistent.
        """
        return open_tables(self.index.root, self.index.version, self.progress, sweeps=(LIDAR,))

    @cached_property
    def velocity(self) -> FloatArray:
        """Velocities [P, 2] over ground in global axes, NaN where the devkit cannot tell."""
        data = self.index.annotations
        times = np.asarray(self.index.arrays["frame.timestamp_us"])[data.frame]
        return velocities(data.centre[:, :2], times, data.prev, data.next, np.nan)

    @cached_property
    def category_numbers(self) -> dict[str, int]:
        """Category -> its number in category.json, or its row where the table has none."""
        records = self.tables.category
        return {record["name"]: record.get("index", row) for row, record in enumerate(records)}

    def scene(self, frame: FrameRecord) -> SceneRecord:
        """Scene of a key-frame."""
        return self.index.scenes[frame.scene]

    def can(self, frame: FrameRecord) -> tuple[FloatArray, tuple[float, float] | None]:
        """The can_bus vector [18], and speed in m/s and steering in rad; None without CAN bus."""
        if frame.scene not in self._can:
            scene = self.scene(frame)
            reader = CanBusReader(self.index.root)
            poses = reader.messages(scene.name, "pose")
            steers = reader.messages(scene.name, "steeranglefeedback")
            frames = slice(scene.first, scene.last)
            times = np.asarray(self.index.arrays["frame.timestamp_us"][frames])
            states: list[tuple[float, float] | None] = [None] * len(times)
            if poses and steers:
                states = [
                    (float(poses[p]["vel"][0]), float(steers[s]["value"]))
                    for p, s in zip(nearest(poses, times), nearest(steers, times), strict=True)
                ]
            self._can = {frame.scene: (pose_vectors(poses, times), states)}
        vectors, states = self._can[frame.scene]
        return vectors[frame.position], states[frame.position]

    def frame_fields(self, frame: FrameRecord) -> dict[str, Any]:
        """The fields before the boxes, in the order of UniAD's infos."""
        index = self.index
        tables, first = self.tables, self._file(frame, LIDAR)
        mount = tables.get("calibrated_sensor", first["calibrated_sensor_token"])
        pose = tables.get("ego_pose", first["ego_pose_token"])
        files = [self._file(frame, name) for name in CAMERAS]
        files += self._sweeps(first)
        sensors = self._sensors(frame, files)
        cameras = dict(zip(CAMERAS, sensors, strict=False))
        for name, camera in cameras.items():
            camera["type"] = name
            calibration = files[CAMERAS.index(name)]["calibrated_sensor_token"]
            intrinsic = tables.get("calibrated_sensor", calibration)["camera_intrinsic"]
            camera["cam_intrinsic"] = np.array(intrinsic, dtype=np.float64)
        return {
            "lidar_path": self.prefix + first["filename"],
            "token": frame.token,
            "prev": index.frames[frame.prev].token if frame.prev >= 0 else "",
            "next": index.frames[frame.next].token if frame.next >= 0 else "",
            "can_bus": self.can(frame)[0],
            "frame_idx": frame.position,
            "sweeps": sensors[len(CAMERAS) :],
            "cams": cameras,
            "scene_token": self.scene(frame).token,
            "lidar2ego_translation": mount["translation"],
            "lidar2ego_rotation": mount["rotation"],
            "ego2global_translation": pose["translation"],
            "ego2global_rotation": pose["rotation"],
            "timestamp": frame.timestamp_us,
        }

    def _file(self, frame: FrameRecord, channel: str) -> dict[str, Any]:
        sample = self.tables.get("sample", frame.token)
        return self.tables.get("sample_data", sample["data"][channel])

    def _sweeps(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The files of the lidar before a key-frame's, latest first."""
        for _ in range(MAX_SWEEPS):
            if not record["prev"]:
                return
            record = self.tables.get("sample_data", record["prev"])
            yield record

    def _sensors(self, frame: FrameRecord, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Where each file was taken from; `sensor2lidar` takes its points to the lidar of t0."""
        tables = self.tables
        mounts = [tables.get("calibrated_sensor", f["calibrated_sensor_token"]) for f in files]
        poses = [tables.get("ego_pose", f["ego_pose_token"]) for f in files]
        matrices = [
            rigid([r["translation"] for r in records], [r["rotation"] for r in records])
            for records in (poses, mounts)
        ]
        to_lidar = inverse(frame.lidar_to_global) @ matrices[0] @ matrices[1]
        return [
            {
                "data_path": self.prefix + file["filename"],
                "type": "lidar",
                "sample_data_token": file["token"],
                "sensor2ego_translation": mount["translation"],
                "sensor2ego_rotation": mount["rotation"],
                "ego2global_translation": pose["translation"],
                "ego2global_rotation": pose["rotation"],
                "timestamp": file["timestamp"],
                "sensor2lidar_rotation": matrix[:3, :3].copy(),
                "sensor2lidar_translation": matrix[:3, 3].copy(),
            }
            for file, mount, pose, matrix in zip(files, mounts, poses, to_lidar, strict=True)
        ]

    def agent_fields(self, frame: FrameRecord, *, raw_names: bool) -> dict[str, Any]:
        """Boxes and what was counted in them.

        Args:
            frame: t0.
            raw_names: nuScenes' categories as they are, or the ten detection classes where a
                category belongs to one.
        """
        data = self.index.annotations
        rows = rows_of(self.index, frame)
        records = self.annotations(frame)
        boxes, rotation = self.boxes(frame, rows)
        # yaw_pitch_roll of pyquaternion: of a box that is not level not quite the heading.
        boxes[:, 6] = -np.arctan2(-rotation[:, 0, 1], rotation[:, 0, 0]) - np.pi / 2
        names = [data.categories[k] for k in data.category[rows]]
        if not raw_names:
            names = [category_to_detection_name(name) or name for name in names]
        lidar = np.array([record["num_lidar_pts"] for record in records], dtype=np.int64)
        radar = np.array([record["num_radar_pts"] for record in records], dtype=np.int64)
        to_lidar = inverse(frame.lidar_to_global)
        return {
            "gt_boxes": boxes,
            "gt_names": np.array(names, dtype=str),
            "gt_velocity": self.velocity[rows] @ to_lidar[:2, :2].T,
            "num_lidar_pts": lidar,
            "num_radar_pts": radar,
            "valid_flag": lidar + radar > 0,
        }

    def annotations(self, frame: FrameRecord) -> list[dict[str, Any]]:
        """Records of a key-frame's boxes, in the order of the index."""
        tokens = self.index.annotations.token[rows_of(self.index, frame)]
        return [self.tables.get("sample_annotation", token.decode()) for token in tokens]

    def boxes(self, frame: FrameRecord, rows: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Boxes of annotation rows in the lidar frame of `frame`.

        Returns:
            [n, 7] centre, width, length, height and the heading of the length, and [n, 3, 3].
        """
        data = self.index.annotations
        to_lidar = inverse(frame.lidar_to_global)
        rotation = to_lidar[:3, :3] @ rotation_matrices(data.rotation[rows])
        boxes = np.zeros((len(rows), 7))
        boxes[:, :3] = data.centre[rows] @ to_lidar[:3, :3].T + to_lidar[:3, 3]
        boxes[:, 3:6] = data.size[rows]
        boxes[:, 6] = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
        return boxes, rotation

    def chain(
        self, rows: NDArray[np.int64], steps: int, limit_s: float = np.inf
    ) -> NDArray[np.int64]:
        """The next annotations [n, steps] of the same instances, -1 after the last.

        One after another: where an instance was not annotated for a while, the next one counts as
        if it had come at once. That is what the converters do.

        Args:
            rows: annotation rows at t0.
            steps: how many.
            limit_s: later ones do not count.
        """
        data = self.index.annotations
        times = np.asarray(self.index.arrays["frame.timestamp_us"])[data.frame]
        found = np.full((len(rows), steps), -1, dtype=np.int64)
        current = rows.astype(np.int64)
        for step in range(steps):
            current = np.where(current >= 0, data.next[current], -1)
            late = (times[current] - times[rows]) * 1e-6 >= limit_s
            current = np.where((current < 0) | late, -1, current)
            found[:, step] = current
        return found

    def long_future(self, frame: FrameRecord) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Positions [n, 16, 2] of the devkit's PredictHelper in each agent's frame, and a mask."""
        data = self.index.annotations
        rows = rows_of(self.index, frame)
        later = self.chain(rows, FUTURE_STEPS, FUTURE_LIMIT_S)
        return in_own_frame(data, rows, data.centre[later], later >= 0), later >= 0
