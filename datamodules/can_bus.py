"""CAN bus messages of a scene, taken at its key-frames as the field's own files have them.

The converters of UniAD, VAD and GPT-Driver take the position from the last pose message not after a
key-frame, but acceleration, rotation rate and velocity from the message after that one: their loop
has gone one message further when it stops. The speed in GPT-Driver's ego state is that of the
nearest message. Real values that a public fork prints agree with this and with nothing else.

Some real scenes have no CAN bus (the devkit keeps a list of them), and a root may come without the
expansion. The values are then zero, as in UniAD, and `available` is False; a warning says so once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.can_bus.can_bus_api import NuScenesCanBus

from datamodules.table_checks import NUMBER, QUADRUPLE, VECTOR, WHOLE, unfit
from odvla.errors import UserError

log = logging.getLogger(__name__)
Message = dict[str, Any]
# What is taken from a message of each kind.
KEYS = {
    "pose": {
        "utime": WHOLE,
        "pos": VECTOR,
        "orientation": QUADRUPLE,
        "accel": VECTOR,
        "rotation_rate": VECTOR,
        "vel": VECTOR,
    },
    "steeranglefeedback": {"utime": WHOLE, "value": NUMBER},
}


@dataclass(frozen=True)
class CanBus:
    """CAN values at F key-frames; all zero where `available` is False."""

    acceleration: NDArray[np.float64]  # [F, 3] m/s^2, as the pose message gives it
    rotation_rate: NDArray[np.float64]  # [F, 3] rad/s
    velocity: NDArray[np.float64]  # [F, 3] m/s; x is the speed along the heading
    speed: NDArray[np.float64]  # [F] m/s along the heading, of the pose message nearest in time
    steering: NDArray[np.float64]  # [F] steering angle feedback, rad, left positive
    available: NDArray[np.bool_]  # [F]


class CanBusReader:
    """Reads the pose and steering messages of one scene after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._without: set[str] = set()  # scenes that the devkit lists as having none
        if (root / "can_bus").is_dir():
            numbers = NuScenesCanBus(dataroot=str(root)).can_blacklist
            self._without = {f"scene-{number:04d}" for number in numbers}
        self._missing: list[str] = []

    def at(self, scene_name: str, times_us: NDArray[np.int64]) -> CanBus:
        """Values at key-frame times.

        See the head of this file for which message each value is from.

        Args:
            scene_name: scene-0061 and so on.
            times_us: [F] Unix microseconds.

        Raises:
            UserError: a message file is there but cannot be read; see messages.
        """
        frames = len(times_us)
        poses = self.messages(scene_name, "pose")
        steers = self.messages(scene_name, "steeranglefeedback")
        if not poses:
            self._missing.append(scene_name)
            zeros = np.zeros((frames, 3))
            none = np.zeros(frames)
            return CanBus(zeros, zeros, zeros, none, none, np.zeros(frames, dtype=bool))
        vectors = pose_vectors(poses, times_us)
        speed = np.array([poses[i]["vel"][0] for i in nearest(poses, times_us)])
        steering = np.zeros(frames)
        if steers:
            steering = np.array([steers[i]["value"] for i in nearest(steers, times_us)])
        return CanBus(
            acceleration=vectors[:, 7:10],
            rotation_rate=vectors[:, 10:13],
            velocity=vectors[:, 13:16],
            speed=speed.astype(np.float64),
            steering=steering.astype(np.float64),
            available=np.ones(frames, dtype=bool),
        )

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

    def messages(self, scene_name: str, kind: str) -> list[Message]:
        """Messages of a scene ("pose" or "steeranglefeedback"), none where it has no CAN bus.

        Raises:
            UserError: the file is there but cannot be read, or a value is none; it names them.
        """
        path = self.root / "can_bus" / f"{scene_name}_{kind}.json"
        if scene_name in self._without or not path.is_file():
            return []
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or not even text
            raise UserError(f"CAN bus file {path} is not JSON: {error}") from error
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise UserError(f"CAN bus file {path} is not a list of messages")
        for key, what in KEYS[kind].items():
            for number, problem in unfit(messages, key, what):
                raise UserError(f"message {number} of CAN bus file {path}{problem}")
        return messages


def pose_vectors(poses: Sequence[Message], times_us: NDArray[np.int64]) -> NDArray[np.float64]:
    """The can_bus vectors [F, 18] of UniAD's infos, before the loader overwrites parts of them.

    0:3 position, 3:7 quaternion (w, x, y, z) of the last message not after the key-frame (of the
    scene's first one, if all are after it); 7:10 acceleration, 10:13 rotation rate and 13:16
    velocity of the first message after it (of the last one, if there is none); two zeros. All zero
    without messages.

    Source: uniad_nuscenes_converter.py, _get_can_bus_info.
    """
    vectors = np.zeros((len(times_us), 18))
    if poses:
        after = np.searchsorted(_times(poses), times_us, side="right")
        for vector, number in zip(vectors, after.tolist(), strict=True):
            here = poses[max(0, number - 1)]
            there = poses[min(number, len(poses) - 1)]
            vector[:7] = *here["pos"], *here["orientation"]
            vector[7:16] = *there["accel"], *there["rotation_rate"], *there["vel"]
    return vectors


def nearest(messages: Sequence[Message], times_us: NDArray[np.int64]) -> list[int]:
    """Number of the message nearest to each time; of two at the same distance the later one."""
    known = _times(messages)
    after = np.clip(np.searchsorted(known, times_us), 1, max(1, len(known) - 1))
    if len(known) == 1:
        return [0] * len(times_us)
    earlier = times_us - known[after - 1] < known[after] - times_us
    return np.where(earlier, after - 1, after).tolist()


def _times(messages: Sequence[Message]) -> NDArray[np.int64]:
    return np.array([message["utime"] for message in messages], dtype=np.int64)
