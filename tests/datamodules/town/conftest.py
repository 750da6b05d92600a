"""Simulated scenes with stand-ins for the tables, for the tests of the town's texts."""

import types
from pathlib import Path

import numpy as np
import pytest

from datamodules.town.language import SPLITS, SplitTexts, add_scene, split_of
from datamodules.town.log import KEYFRAMES_PER_SCENE, TICK_S, TICKS_PER_KEYFRAME
from datamodules.town.recorded import Recorded, RecordedSample, RecordedSensor
from datamodules.town.rig import Rig
from datamodules.town.roads import build_road_map
from datamodules.town.scenario import simulate_scene

SCENES = (
    ("scene-0061", "singapore-onenorth"),
    ("scene-0553", "singapore-onenorth"),
    ("scene-0103", "singapore-onenorth"),
)
SEEN_WITHIN_M = 60.0


class PlainTokens:
    """Tokens that can be read; every actor near the car is annotated."""

    def __init__(self, logs):
        self.annotated = {
            (log.name, k): [a.id for a in log.actors if _near(log, a, k * TICKS_PER_KEYFRAME)]
            for log in logs
            for k in range(KEYFRAMES_PER_SCENE)
        }

    def scene(self, name):
        return name

    def sample(self, name, k):
        return f"{name}/{k}"

    def annotation(self, name, k, actor):
        return f"{name}/{k}/{actor}"

    def instance(self, name, actor):
        return f"{name}//{actor}"


def _near(log, actor, tick):
    return (
        bool(actor.present[tick])
        and np.linalg.norm(actor.track.xy[tick] - log.ego.track.xy[tick]) < SEEN_WITHIN_M
    )


def make_recorded(logs, tokens):
    """What read_recorded would find had the tables been written."""
    rig = Rig.for_size(320, 180)
    calibration = {
        channel: {
            "translation": mount.translation.tolist(),
            "rotation": list(mount.quaternion),
            "camera_intrinsic": rig.intrinsics[channel].tolist() if channel in rig.cameras else [],
        }
        for channel, mount in {**rig.cameras, "LIDAR_TOP": rig.lidar}.items()
    }
    samples, rows, points, categories = {}, {}, {}, {}
    for log in logs:
        for k in range(KEYFRAMES_PER_SCENE):
            token, tick = tokens.sample(log.name, k), k * TICKS_PER_KEYFRAME
            yaw, time_us = log.ego.track.yaw[tick], int((log.start_time_s + tick * TICK_S) * 1e6)
            pose = {
                "translation": [*log.ego.track.xy[tick].tolist(), 0.0],
                "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
            }
            samples[token] = RecordedSample(
                {
                    c: RecordedSensor(c, f"{token}/{c}", f"samples/{c}/{k}.jpg", time_us,
                                      (0, 0) if c == "LIDAR_TOP" else (320, 180), value, pose)
                    for c, value in calibration.items()
                }
            )  # fmt: skip
            neighbours = {"prev": k - 1, "next": k + 1}
            rows[token] = {"timestamp": time_us} | {
                key: tokens.sample(log.name, n) if 0 <= n < KEYFRAMES_PER_SCENE else ""
                for key, n in neighbours.items()
            }
            for number in tokens.annotated[log.name, k]:
                points[tokens.annotation(log.name, k, number)] = (number % 3, 0)
        categories |= dict.fromkeys(actor.category for actor in log.actors)
    return Recorded(Path("no-can-bus-here"), samples, rows, points, tuple(categories))


@pytest.fixture(scope="session")
def told():
    """Two train scenes and a val scene, and all that was written about them."""
    roads = {place: build_road_map(place, 3) for _, place in SCENES}
    logs = [simulate_scene(roads[place], name, n, 3) for n, (name, place) in enumerate(SCENES)]
    tokens = PlainTokens(logs)
    recorded = make_recorded(logs, tokens)
    texts = {split: SplitTexts() for split in SPLITS}
    objects = {}
    for log in logs:
        objects |= add_scene(log, texts[split_of(log.name, "v1.0-mini")], tokens, recorded, 3)
    return types.SimpleNamespace(
        logs={log.name: log for log in logs},
        tokens=tokens,
        recorded=recorded,
        texts=texts,
        objects=objects,
        PlainTokens=PlainTokens,
        make_recorded=make_recorded,
    )
