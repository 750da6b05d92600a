"""CAN bus messages of a scene, taken at its key-frames.

Some real scenes have no CAN bus (the devkit keeps a list of them), and a root may come without the
expansion. The values are then zero, as in UniAD, and `available` is False; a warning says so once.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.can_bus.can_bus_api import NuScenesCanBus

from odvla.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CanBus:
    """CAN values at F key-frames; all zero where `available` is False."""

    acceleration: NDArray[np.float64]  # [F, 3] m/s^2, as the pose message gives it
    rotation_rate: NDArray[np.float64]  # [F, 3] rad/s
    velocity: NDArray[np.float64]  # [F, 3] m/s; x is the speed along the heading
    steering: NDArray[np.float64]  # [F] steering angle feedback, rad, left positive
    available: NDArray[np.bool_]  # [F]


class CanBusReader:
    """Reads the pose and steering messages of one scene after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.devkit: NuScenesCanBus | None = None
        if (root / "can_bus").is_dir():
            self.devkit = NuScenesCanBus(dataroot=str(root))
        self._missing: list[str] = []

    def at(self, scene_name: str, times_us: NDArray[np.int64]) -> CanBus:
        """Values at key-frame times.

        The pose message is the last one not after the key-frame (the first of the scene if all are
        after it, as in UniAD); steering is the nearest message, as in GPT-Driver's cache.

        Args:
            scene_name: scene-0061 and so on.
            times_us: [F] Unix microseconds.

        Raises:
            UserError: a message file is there but cannot be read.
        """
        frames = len(times_us)
        poses = self._messages(scene_name, "pose")
        steers = self._messages(scene_name, "steeranglefeedback")
        if not poses:
            self._missing.append(scene_name)
            zeros = np.zeros((frames, 3))
            return CanBus(zeros, zeros, zeros, np.zeros(frames), np.zeros(frames, dtype=bool))
        pose_times = np.array([message["utime"] for message in poses])
        before = np.clip(np.searchsorted(pose_times, times_us, side="right") - 1, 0, None)
        acceleration, rotation_rate, velocity = (
            np.array([poses[i][key] for i in before], dtype=np.float64).reshape(frames, 3)
            for key in ("accel", "rotation_rate", "vel")
        )
        steering = np.zeros(frames)
        if steers:
            steer_times = np.array([message["utime"] for message in steers])
            nearest = _nearest(steer_times, times_us)
            steering = np.array([steers[i]["value"] for i in nearest], dtype=np.float64)
        known = np.ones(frames, dtype=bool)
        return CanBus(acceleration, rotation_rate, velocity, steering, known)

    def warn_missing(self) -> None:
        """Log, once for all scenes read so far, which had no CAN bus."""
        if self._missing:
            log.warning(
                "%s: no CAN bus for %d scene(s), e.g. %s; its values are zero there",
                self.root,
                len(self._missing),
                self._missing[0],
            )
            self._missing.clear()

    def _messages(self, scene_name: str, kind: str) -> list[dict[str, Any]]:
        path = self.root / "can_bus" / f"{scene_name}_{kind}.json"
        if self.devkit is None or not path.is_file():
            return []
        if int(scene_name[-4:]) in self.devkit.can_blacklist:
            return []
        try:
            messages = self.devkit.get_messages(scene_name, kind)
        except json.JSONDecodeError as error:
            raise UserError(f"CAN bus file {path} is not JSON: {error}") from error
        needed = (
            ("utime", "accel", "rotation_rate", "vel") if kind == "pose" else ("utime", "value")
        )
        for number, message in enumerate(messages):
            missing = [key for key in needed if key not in message]
            if missing:
                raise UserError(f"CAN bus file {path}: message {number} has no {missing[0]!r}")
        return messages


def _nearest(times: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    return np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)
