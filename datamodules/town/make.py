"""Make a town: simulate, draw and write every scene, then the tables, maps and texts."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
from threadpoolctl import threadpool_limits

from datamodules.town.ground import drivable_mask
from datamodules.town.language import write_language
from datamodules.town.log import RoadMap, SceneLog
from datamodules.town.map_expansion import map_expansion
from datamodules.town.rig import Rig
from datamodules.town.scene_job import SceneJob, make_scene, one_thread, road_of
from datamodules.town.scenes import scene_names, version_of
from datamodules.town.tables import (
    LIDAR,
    KeyframeView,
    annotated_actors,
    fixed_tables,
    map_table,
    scene_tables,
    sensor_table,
)
from datamodules.town.tokens import TokenIndex, make_token
from odvla.errors import UserError

MASK_CELL_M = 0.1  # what the devkit assumes of a semantic prior
SMALLEST_IMAGE = (64, 36)
TOWN_FILE = "town.json"


@dataclass(frozen=True)
class TownConfig:
    """What a town is made from; the same settings give the same bytes, whatever `workers` is."""

    out: str
    scenes: int = 10
    image_size: tuple[int, int] = (320, 180)  # width, height
    seed: int = 0
    workers: int = 2
    jpeg_quality: int = 90
    language: bool = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: naming the setting and its value.
        """
        scene_names(self.scenes)
        width, height = self.image_size
        if width < SMALLEST_IMAGE[0] or height < SMALLEST_IMAGE[1]:
            raise UserError(f"images of {width}x{height} are too small, at least 64x36 is needed")
        if self.workers < 1:
            raise UserError(f"workers must be at least 1, not {self.workers}")


def make_town(config: TownConfig, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write a data root in nuScenes' format.

    It is written into `<out>.partial` and renamed at the end, so that `out` is whole or not there.
    What a killed run left behind is removed.

    Args:
        config: the town.
        progress: called with (scenes done, scenes in all) after each scene.

    Returns:
        The data root.

    Raises:
        UserError: `out` exists and is not an empty folder.
    """
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; name a new folder for the town")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    names = scene_names(config.scenes)
    jobs = [
        SceneJob(
            partial, name, location, index, config.seed, config.image_size, config.jpeg_quality
        )
        for index, (name, location) in enumerate(names)
    ]
    for location in sorted({location for _, location in names}):
        _write_map(partial, road_of(location, config.seed), config.seed)
    done: dict[int, tuple[SceneLog, list[KeyframeView]]] = {}
    with _processes(min(config.workers, len(jobs))) as pool:
        for index, result in _run(jobs, pool):
            done[index] = result
            if progress is not None:
                progress(len(done), len(jobs))
        scenes = [done[index] for index in range(len(jobs))]
        version = version_of(config.scenes)
        tokens = _write_tables(partial, version, scenes, config)
        if config.language:
            logs = [log for log, _ in scenes]
            write_language(partial, version, logs, tokens, config.seed, pool)
    _write_town_file(partial, version, config)
    if out.exists():
        out.rmdir()
    return partial.rename(out)


@contextmanager
def _processes(count: int) -> Iterator[Executor | None]:
    """Processes beside this one; None where one is enough, which is then this one."""
    if count == 1:
        yield None
        return
    # Started afresh, because a forked copy of a process with numerical threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=one_thread) as pool:
        yield pool


def _run(
    jobs: list[SceneJob], pool: Executor | None
) -> Iterator[tuple[int, tuple[SceneLog, list[KeyframeView]]]]:
    """Scenes as they become ready, in any order."""
    if pool is None:
        for job in jobs:
            with threadpool_limits(1):
                result = make_scene(job)
            # As processes hand it over: a pickle made of it tells equal objects from the same one.
            yield job.index, pickle.loads(pickle.dumps(result))
        return
    waiting = {pool.submit(make_scene, job): job.index for job in jobs}
    while waiting:
        ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ready:
            yield waiting.pop(future), future.result()


def _write_map(folder: Path, road: RoadMap, seed: int) -> None:
    """Map expansion, base map and semantic prior of one location."""
    maps = folder / "maps"
    for part in ("expansion", "basemap"):
        (maps / part).mkdir(parents=True, exist_ok=True)
    _write_json(maps / "expansion" / f"{road.location}.json", map_expansion(road, seed))
    _, data = cv2.imencode(".png", drivable_mask(road, MASK_CELL_M))
    (maps / "basemap" / f"{road.location}.png").write_bytes(data.tobytes())
    (maps / f"{make_token(seed, 'map', road.location)}.png").write_bytes(data.tobytes())


def _write_tables(
    folder: Path,
    version: str,
    scenes: list[tuple[SceneLog, list[KeyframeView]]],
    config: TownConfig,
) -> TokenIndex:
    tokens = TokenIndex(
        config.seed,
        {
            (log.name, keyframe): annotated_actors(log, keyframe, view)
            for log, views in scenes
            for keyframe, view in enumerate(views)
        },
    )
    rig = Rig.for_size(*config.image_size)
    tables: dict[str, list[dict[str, Any]]] = {
        **fixed_tables(config.seed),
        "sensor": sensor_table(config.seed, (*rig.cameras, LIDAR)),
        "map": map_table(config.seed, [log for log, _ in scenes]),
    }
    for log, views in scenes:
        for name, records in scene_tables(log, rig, views, tokens).items():
            tables.setdefault(name, []).extend(records)
    (folder / version).mkdir()
    for name, records in tables.items():
        _write_json(folder / version / f"{name}.json", records)
    return tokens


def _write_town_file(folder: Path, version: str, config: TownConfig) -> None:
    """What the town was made from, and a fingerprint of its tables."""
    digest = hashlib.sha256()
    for path in sorted((folder / version).glob("*.json")):
        digest.update(path.read_bytes())
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "workers")}
    _write_json(
        folder / TOWN_FILE, {"version": version, **settings, "fingerprint": digest.hexdigest()}
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
