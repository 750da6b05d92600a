"""The planning metric for all samples at once, beside a loop over samples and steps.

    python benchmarks/metrics.py [--samples 6019] [--chunk 512] [--rounds 3]

The loop does what the released evaluation does: for every sample and step it rasters the car's box
anew (a scan over the box's cells), moves it and looks it up, for the plan and for the driven path.
Both see the same plans, masks and rasters, made from a seed; both must give the same numbers, to
the last digit of a collision and 1e-9 m of L2. Making the rasters is timed for neither.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from odvla.metrics.collisions import Traffic
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import PRESETS

CELL_M, FIRST_M, CELLS = 0.5, -49.75, 200
LENGTH_M, WIDTH_M, SHIFT_M = 4.084, 1.85, 0.5


@dataclass
class Loop:
    """Sums of a plain evaluation, a sample at a time."""

    l2: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    hits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    samples: int = 0

    def add(self, plan: NDArray, driven: NDArray, mask: NDArray, raster: NDArray) -> None:
        """One sample."""
        for step in range(6):
            offset = plan[step].astype(np.float64) - driven[step].astype(np.float64)
            self.l2[step] += float(np.sqrt((offset**2).sum())) * float(mask[step])
            if not touches(driven[step], raster[step]):
                self.hits[step] += touches(plan[step], raster[step])
        self.samples += 1


def raster_box() -> tuple[NDArray, NDArray]:
    """Cells of the car at the origin: those of its bounding rectangle whose centre lies inside."""
    edges = [(-LENGTH_M / 2 + SHIFT_M, -WIDTH_M / 2), (LENGTH_M / 2 + SHIFT_M, WIDTH_M / 2)]
    low, high = ((np.array(edge) - FIRST_M) / CELL_M for edge in edges)
    rows, columns = np.meshgrid(
        np.arange(int(low[0]), int(high[0]) + 2),
        np.arange(int(low[1]), int(high[1]) + 2),
        indexing="ij",
    )
    inside = np.ones(rows.shape, dtype=bool)
    polygon = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    for (r0, c0), (r1, c1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        inside &= (r1 - r0) * (columns - c0) - (c1 - c0) * (rows - r0) >= 0
    return rows[inside], columns[inside]


def touches(point: NDArray, raster: NDArray) -> bool:
    """Whether the box at a point touches an occupied cell; outside counts as the border."""
    rows, columns = raster_box()
    row = np.clip((point[1] / np.float32(CELL_M) + rows).astype(np.int64), 0, CELLS - 1)
    column = np.clip((-point[0] / np.float32(CELL_M) + columns).astype(np.int64), 0, CELLS - 1)
    return bool(raster[row, column].any())


def make(count: int, generator: np.random.Generator) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Driven paths, plans near them, masks and rasters with 30 boxes a step."""
    speed = generator.uniform(0, 12, (count, 1))
    times = 0.5 * np.arange(1, 7)[None]
    sideways = generator.normal(0, 0.2, (count, 1)) * times**2
    driven = np.stack([sideways, speed * times], axis=-1).astype(np.float32)
    plans = driven + generator.normal(0, 0.5, driven.shape).astype(np.float32) * times[..., None]
    known = generator.integers(0, 40, count)
    mask = np.arange(6)[None] < np.where(known < 6, known, 6)[:, None]
    raster = np.zeros((count, 6, CELLS, CELLS), dtype=bool)
    corner = generator.integers(0, CELLS - 10, (count, 6, 30, 2))
    for sample in range(count):
        for step in range(6):
            for row, column in corner[sample, step]:
                raster[sample, step, row : row + 9, column : column + 4] = True
    return plans.astype(np.float32), driven, mask, raster


def main() -> None:
    """Print both times and their ratio; stop where the numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6019)
    parser.add_argument("--chunk", type=int, default=512, help="samples whose rasters are kept")
    parser.add_argument("--rounds", type=int, default=3, help="of the fast one; the best counts")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    loop, metric = Loop(), PlanningMetric(PRESETS["uniad"])
    slow_s = fast_s = 0.0
    for start in range(0, options.samples, options.chunk):
        count = min(options.chunk, options.samples - start)
        plans, driven, mask, raster = make(count, generator)
        tensors = [torch.from_numpy(array) for array in (plans, driven, mask)]
        names = [f"sample-{start + number:06d}" for number in range(count)]
        best, before = float("inf"), metric
        for _ in range(options.rounds):
            metric = copy.deepcopy(before)
            began = time.perf_counter()
            metric.update(names, *tensors, Traffic(raster=torch.from_numpy(raster)))
            best = min(best, time.perf_counter() - began)
        fast_s += best
        began = time.perf_counter()
        for sample in range(count):
            loop.add(plans[sample], driven[sample], mask[sample], raster[sample])
        slow_s += time.perf_counter() - began
    began = time.perf_counter()
    scores = metric.scores()
    fast_s += time.perf_counter() - began
    if scores.collision_steps != tuple(loop.hits / loop.samples):
        raise SystemExit(f"collisions differ: {scores.collision_steps} and {loop.hits}")
    if np.abs(np.array(scores.l2_steps_m) - loop.l2 / loop.samples).max() > 1e-9:
        raise SystemExit(f"L2 differs: {scores.l2_steps_m} and {loop.l2 / loop.samples}")
    lines = (
        f"{loop.samples} samples, {torch.get_num_threads()} threads; the same results",
        f"loop        {slow_s:8.3f} s",
        f"vectorised  {fast_s:8.3f} s   {slow_s / fast_s:.0f} times as fast",
        f"L2 (m) {[round(v, 3) for v in scores.l2_m]}, collisions {scores.collision}",
    )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
