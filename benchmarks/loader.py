"""Frames per second of the image loader, and where its time goes.

    python benchmarks/loader.py ROOT [--version V] [--size 1600x900] [--workers 2] [--frames 60]

A frame is six camera images of the root's key-frames, repeated. The parts are timed one after
another in one process; the rate is that of a DataLoader with --workers processes.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from datamodules.collate import Collate
from datamodules.frames import REDUCED_FLAGS, load_image
from datamodules.nuscenes import FrameDataset, NuScenesDataConfig, NuScenesDataModule, start_worker
from datamodules.sampling import ClipRequest


def time_parts(data: NuScenesDataModule, size: tuple[int, int], frames: int) -> dict[str, float]:
    """Seconds a frame of each part of loading one."""
    spent: dict[str, float] = defaultdict(float)

    def lap(part: str, start: float) -> float:
        now = time.perf_counter()
        spent[part] += now - start
        return now

    records = [data.index.frames[k % len(data.index.frames)] for k in range(frames)]
    for record in records:
        images = []
        for camera in record.cameras:
            at = time.perf_counter()
            content = (data.index.root / camera.file).read_bytes()
            at = lap("read", at)
            flag = next(
                (f for k, f in REDUCED_FLAGS if camera.size[0] >= k * size[0]), cv2.IMREAD_COLOR
            )
            image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
            at = lap("decode", at)
            if image.shape[1::-1] != size:
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            at = lap("resize", at)
            images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            lap("to RGB", at)
        at = time.perf_counter()
        stack = np.empty((len(images), 3, *size[::-1]), dtype=np.uint8)
        for number, image in enumerate(images):
            for channel, plane in enumerate(cv2.split(image)):
                stack[number, channel] = plane
        torch.from_numpy(stack)
        lap("stack", at)
    at = time.perf_counter()
    for record in records:
        for camera in record.cameras:
            load_image(data.index.root / camera.file, camera.size, size)
    spent["load_image itself"] = time.perf_counter() - at
    dataset = FrameDataset(data.index, data.config, data.loader)
    samples = [dataset[ClipRequest(record.number, valid=False)] for record in records[:8]]
    at = time.perf_counter()
    for record in records:
        dataset[ClipRequest(record.number, valid=False)]
    spent["all but images"] = time.perf_counter() - at
    at = time.perf_counter()
    for k in range(frames):
        Collate()([samples[k % len(samples)]])
    spent["collate"] = time.perf_counter() - at
    return {part: seconds / frames for part, seconds in spent.items()}


def rate(data: NuScenesDataModule, workers: int, frames: int) -> float:
    """Frames per second of a DataLoader, after its workers have started."""
    dataset = FrameDataset(data.index, data.config, data.loader)
    warm = 2 * max(workers, 1)
    total = len(data.index.frames)
    requests = [[ClipRequest(k % total)] for k in range(frames + warm)]
    loader = DataLoader(
        dataset,
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=Collate(),
        worker_init_fn=start_worker,
    )
    start = 0.0
    for number, _ in enumerate(loader):
        if number == warm - 1:
            start = time.perf_counter()
    return frames / (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--size", action="append", help="width x height; may be given again")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=60)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    table = Table(title=f"six images a frame, {options.frames} frames, ms a frame in one process")
    rows: dict[str, list[str]] = defaultdict(list)
    table.add_column("")
    for text in options.size or ["1600x900", "800x450", "320x180"]:
        width, height = map(int, text.split("x"))
        settings = NuScenesDataConfig(
            str(options.root), options.version, image_size=(width, height), targets=("agents",)
        )
        data = settings.build()
        table.add_column(text, justify="right")
        for part, seconds in time_parts(data, (width, height), options.frames).items():
            rows[part].append(f"{1e3 * seconds:.1f}")
        for workers in (0, options.workers):
            found = rate(data, workers, options.frames)
            rows[f"frames/s, {workers} workers"].append(f"{found:.1f}")
    for part, cells in rows.items():
        table.add_row(part, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
