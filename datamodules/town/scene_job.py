"""One scene of a town: simulated, drawn and written.

Processes make scenes side by side. They import this module and with it nothing that only tables or
texts need: torch and the devkit take longer to import than a few scenes to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
from threadpoolctl import threadpool_limits

from datamodules.town.cameras import SceneRenderer
from datamodules.town.can_bus import write_can_bus
from datamodules.town.lidar import scan
from datamodules.town.log import KEYFRAMES_PER_SCENE, TICKS_PER_KEYFRAME, RoadMap, SceneLog
from datamodules.town.roads import build_road_map
from datamodules.town.scenario import simulate_scene
from datamodules.town.tables import LIDAR, KeyframeView, sensor_file
from datamodules.town.visibility import visibility


@dataclass(frozen=True)
class SceneJob:
    """What a process is told to make a scene."""

    folder: Path
    name: str
    location: str
    index: int
    seed: int  # of the town
    image_size: tuple[int, int]  # width, height
    jpeg_quality: int


def make_scene(job: SceneJob) -> tuple[SceneLog, list[KeyframeView]]:
    """Simulate and draw one scene: images, lidar sweeps and CAN bus files."""
    cv2.setNumThreads(0)  # the processes are the parallelism
    road = road_of(job.location, job.seed)
    log = simulate_scene(road, job.name, job.index, job.seed)
    renderer = _renderer(job.location, job.seed, job.image_size)
    quality = [cv2.IMWRITE_JPEG_QUALITY, job.jpeg_quality]
    for channel in (*renderer.rig.cameras, LIDAR):
        (job.folder / "samples" / channel).mkdir(parents=True, exist_ok=True)
    views = []
    for keyframe in range(KEYFRAMES_PER_SCENE):
        tick = keyframe * TICKS_PER_KEYFRAME
        for channel, image in renderer.render(log, tick).items():
            good, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
            if not good:
                raise OSError(f"could not encode an image of {job.name}")
            (job.folder / sensor_file(log, keyframe, channel)).write_bytes(data.tobytes())
        sweep = scan(log, tick, renderer.rig)
        (job.folder / sensor_file(log, keyframe, LIDAR)).write_bytes(sweep.points.tobytes())
        views.append(KeyframeView(sweep.hits, visibility(log, tick, renderer.rig)))
    (job.folder / "can_bus").mkdir(exist_ok=True)
    write_can_bus(job.folder / "can_bus", log)
    return log, views


@cache
def road_of(location: str, seed: int) -> RoadMap:
    """The roads of a location, built once in a process."""
    return build_road_map(location, seed)


@cache
def _renderer(location: str, seed: int, image_size: tuple[int, int]) -> SceneRenderer:
    """Kept for the process: to paint the ground takes half a second."""
    return SceneRenderer(road_of(location, seed), *image_size)


def one_thread() -> None:
    """Nearly all matrices here are 4x4: to wake threads for one takes longer than to invert it."""
    threadpool_limits(1)
