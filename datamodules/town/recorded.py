"""What is already written of the town when its texts are made: file names, calibrations, CAN bus.

The original converters of GPT-Driver's cache and of TOD3Cap read the nuScenes tables; so does this.
Where the objects and the car are is not read here: that comes from the scene's log.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.town.log import TICKS_PER_KEYFRAME, Actor, FloatArray
from odvla.errors import UserError
from odvla.types import CAMERAS

NEAR_PLANE_M = 0.5
UNIT_CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0.0, 1.0)])


@dataclass(frozen=True)
class RecordedSensor:
    """One key-frame file of one sensor."""

    channel: str
    token: str  # of the sample_data record
    filename: str  # relative to the data root
    timestamp_us: int
    size: tuple[int, int]  # pixels (width, height); (0, 0) for the lidar
    calibration: dict[str, Any]  # calibrated_sensor record
    ego_pose: dict[str, Any]

    @cached_property
    def sensor_to_ego(self) -> FloatArray:
        """[4, 4]."""
        return pose_matrix(self.calibration)

    @cached_property
    def ego_to_global(self) -> FloatArray:
        """[4, 4] at the time of this file."""
        return pose_matrix(self.ego_pose)

    @cached_property
    def global_to_sensor(self) -> FloatArray:
        """[4, 4] at the time of this file."""
        to_global = self.ego_to_global @ self.sensor_to_ego
        inverse = np.eye(4)
        inverse[:3, :3] = to_global[:3, :3].T
        inverse[:3, 3] = -to_global[:3, :3].T @ to_global[:3, 3]
        return inverse


@dataclass(frozen=True)
class RecordedSample:
    """All sensors of one key-frame."""

    sensors: dict[str, RecordedSensor]  # by channel

    def seen_by(
        self, actors: Sequence[Actor], keyframe: int
    ) -> list[tuple[str | None, list[float] | None]]:
        """For each actor, the camera that shows most of it and its rectangle there.

        Returns:
            File name, [left, top, right, bottom] in pixels, cut at the image's edges; None, None
            where no camera sees all of it in front.
        """
        corners = np.stack([_corners(actor, keyframe * TICKS_PER_KEYFRAME) for actor in actors])
        cameras = [self.sensors[channel] for channel in CAMERAS]
        rectangles = np.stack([_rectangles(camera, corners) for camera in cameras], axis=1)
        areas = np.prod(rectangles[..., 2:] - rectangles[..., :2], axis=-1)
        best = areas.argmax(1)
        found: list[tuple[str | None, list[float] | None]] = []
        for row, camera in enumerate(best):
            if areas[row, camera] > 0:
                rectangle = rectangles[row, camera].round(1).tolist()
                found.append((cameras[camera].filename, rectangle))
            else:
                found.append((None, None))
        return found


@dataclass(frozen=True)
class Recorded:
    """A town's tables, as far as texts need them."""

    root: Path
    samples: dict[str, RecordedSample]  # by sample token
    sample_rows: dict[str, dict[str, Any]]
    points: dict[str, tuple[int, int]]  # annotation token -> lidar points, radar points
    categories: tuple[str, ...]  # in the table's order

    def can_bus(self, scene: str, kind: str) -> list[dict[str, Any]]:
        """Messages of one scene; none where the file does not exist, as for some real scenes."""
        path = self.root / "can_bus" / f"{scene}_{kind}.json"
        return json.loads(path.read_text()) if path.is_file() else []


def read_recorded(root: Path, version: str) -> Recorded:
    """Read the tables under root/version.

    Raises:
        UserError: a table is missing.
    """

    def table(name: str) -> list[dict[str, Any]]:
        path = root / version / f"{name}.json"
        if not path.is_file():
            raise UserError(f"table {path} must be written before the texts of the town")
        return json.loads(path.read_text())

    channels = {row["token"]: row["channel"] for row in table("sensor")}
    calibrations = {row["token"]: row for row in table("calibrated_sensor")}
    poses = {row["token"]: row for row in table("ego_pose")}
    sensors: dict[str, dict[str, RecordedSensor]] = defaultdict(dict)
    for row in table("sample_data"):
        if not row["is_key_frame"]:
            continue
        calibration = calibrations[row["calibrated_sensor_token"]]
        channel = channels[calibration["sensor_token"]]
        sensors[row["sample_token"]][channel] = RecordedSensor(
            channel=channel,
            token=row["token"],
            filename=row["filename"],
            timestamp_us=row["timestamp"],
            size=(row["width"] or 0, row["height"] or 0),
            calibration=calibration,
            ego_pose=poses[row["ego_pose_token"]],
        )
    return Recorded(
        root=root,
        samples={token: RecordedSample(found) for token, found in sensors.items()},
        sample_rows={row["token"]: row for row in table("sample")},
        points={
            row["token"]: (row["num_lidar_pts"], row["num_radar_pts"])
            for row in table("sample_annotation")
        },
        categories=tuple(row["name"] for row in table("category")),
    )


def pose_matrix(record: dict[str, Any]) -> FloatArray:
    """[4, 4] of a nuScenes record with `translation` and `rotation` (w, x, y, z)."""
    w, x, y, z = record["rotation"]
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = record["translation"]
    return matrix


def _corners(actor: Actor, tick: int) -> FloatArray:
    """Corners of an actor's box in global axes: [8, 3]."""
    width, length, height = actor.size_wlh
    corners = UNIT_CORNERS * (length, width, height)
    yaw = actor.track.yaw[tick]
    turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
    corners[:, :2] = corners[:, :2] @ turn + actor.track.xy[tick]
    return corners


def _rectangles(camera: RecordedSensor, corners: FloatArray) -> FloatArray:
    """Image rectangles [A, 4] of boxes [A, 8, 3]; empty ones where a corner is not in front."""
    to_camera = camera.global_to_sensor
    seen = corners @ to_camera[:3, :3].T + to_camera[:3, 3]
    pixels = seen @ np.array(camera.calibration["camera_intrinsic"]).T
    in_front = seen[..., 2].min(1) > NEAR_PLANE_M
    pixels = pixels[..., :2] / np.maximum(pixels[..., 2:], NEAR_PLANE_M)
    limits = np.array(camera.size, dtype=float)
    low, high = pixels.min(1).clip(0, limits), pixels.max(1).clip(0, limits)
    return np.where(in_front[:, None], np.concatenate([low, high], axis=1), 0.0)
