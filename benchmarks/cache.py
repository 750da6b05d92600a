"""Samples per second of stages 1 to 2.5 with and without a feature cache, and what a cache takes.

    python benchmarks/cache.py [EXPERIMENT] [key=value ...]

Every stage takes the same steps from the same weights on the experiment's own data (a town is made
if there is none): once looking at images in every step, once from the cache. The two take turns,
step by step in one run, so that a busy machine slows both. A sample is a conversation. Before
the clock starts, the key-frames of the cached steps are encoded; what that took is in the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from callbacks.feature_cache import CacheSettings, FeatureCache
from experiments.find import find_experiment
from experiments.prepare import build_model, build_tokenizer, data_module, prepare_data
from odvla.config import apply_overrides
from odvla.token_memory import TokenMemory
from odvla.types import Batch
from stages.base import StageModule

STAGES = ("alignment", "instruction", "interaction")
WARM_UP = 2
TRAINVAL_FRAMES = 34_149  # key-frames of v1.0-trainval
MEGABYTE, GIGABYTE = 10**6, 10**9


@dataclass
class Side:
    """One of the two ways to train."""

    module: StageModule
    optimiser: torch.optim.Optimizer
    batches: Iterator[Batch]
    seconds: list[float]
    samples: int = 0

    def step(self) -> None:
        """One step, timed from the asking for its batch."""
        started = time.perf_counter()
        batch = next(self.batches)
        loss = self.module.loss_of(batch, None).loss
        if loss.requires_grad:
            loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.samples += len(batch.talk.conversations) if batch.talk is not None else 0


def side(config: Any, stage: str, tokenizer: Any, folder: Path | None) -> tuple[Side, Any]:
    """A stage that learns from images, or from the cache in a folder, and that cache."""
    vla = build_model(config, tokenizer)
    settings = config.stages.of(stage)
    settings.freeze.apply(vla)
    module = settings.build(vla, 100)
    data = data_module(config, stage, tokenizer)
    cache = None
    if folder is not None:
        past = "scene" if settings.remember_tokens else "clip"
        where = CacheSettings(folder, stage, past, "benchmark", progress=True)
        cache = FeatureCache.open(where, vla, data, torch.device("cpu"))
        cache.fill()
        module.memory, data.unseen = TokenMemory(cache.shards), True
    optimiser = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=1e-5)
    return Side(module, optimiser, _endless(data.train_dataloader()), []), cache


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", nargs="?", default="tiny")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a side (default 6)")
    options = parser.parse_args()
    config = prepare_data(apply_overrides(find_experiment(options.experiment), options.changes))
    tokenizer = build_tokenizer(config)
    table = Table(title=f"{config.name}: stages 1 to 2.5, {torch.get_num_threads()} thread(s)")
    columns = ("stage", "images: samples/s", "cache: samples/s", "ratio", "frames", "filled in")
    for column in columns:
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for stage in (stage for stage in STAGES if stage in config.run):
            plain, _ = side(config, stage, tokenizer, None)
            started = time.perf_counter()
            cached, cache = side(config, stage, tokenizer, Path(folder))
            filled = time.perf_counter() - started
            for number in range(WARM_UP + options.steps):
                if number == WARM_UP:
                    for one in (plain, cached):
                        one.seconds, one.samples = [], 0
                plain.step()
                cached.step()
            rates = [one.samples / sum(one.seconds) for one in (plain, cached)]
            ratio = median(plain.seconds) / median(cached.seconds)
            row = [f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{ratio:.1f}x"]
            table.add_row(stage, *row, str(len(cache.shards)), f"{filled:.0f} s")
        size, frame = cache.shards.size_bytes(), cache.shards.size_bytes() / len(cache.shards)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{frame / 1000:.1f} kB a key-frame: {size / MEGABYTE:.1f} MB here, "
        f"{frame * TRAINVAL_FRAMES / GIGABYTE:.2f} GB for v1.0-trainval's {TRAINVAL_FRAMES:,}"
    )


if __name__ == "__main__":
    main()
