"""Samples per second of every training stage, and where its time goes.

    python benchmarks/training_speed.py [EXPERIMENT] [key=value ...]

All stages are timed in one run on the experiment's own data (a town is made if there is none) with
a fresh model. A sample is a key-frame in the perception stage and a conversation in the others.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.find import find_experiment
from experiments.prepare import build_tokenizer, data_module, prepare_data
from odvla.config import apply_overrides
from odvla.types import Batch

WARM_UP, STEPS = 2, 6
PARTS = ("data", "encoder", "queries", "language", "backward", "optimiser")


class Stopwatch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def time_stage(config: Any, stage: str, tokenizer: Any) -> tuple[float, dict[str, float]]:
    """Samples per second of a stage and its parts' shares."""
    torch.manual_seed(0)
    vla = config.model.build(tokenizer)
    settings = config.stages.of(stage)
    module = settings.build(vla)
    settings.freeze.apply(vla)
    optimiser = module.configure_optimizers()["optimizer"]
    watch = Stopwatch()
    for name, parts in (
        ("encoder", [vla.encoder]),
        ("queries", list(vla.queries.values())),
        ("language", [vla.language]),
    ):
        for part in parts:
            part.forward = watch.wrap(name, part.forward)
    data = data_module(config, stage, tokenizer)
    data.setup("fit")
    batches = iter(itertools.cycle(data.train_dataloader()))
    samples, total = 0, 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            watch.seconds.clear()
            samples, total = 0, time.perf_counter()
        with watch.part("data"):
            batch: Batch = next(batches)
        loss = module.loss_of(batch, None).loss
        with watch.part("backward"):
            if loss.requires_grad:
                loss.backward()
        with watch.part("optimiser"):
            optimiser.step()
            optimiser.zero_grad()
        frames = len(batch.clip) * len(batch.valid)
        samples += frames if stage == "perception" or batch.talk is None else len(batch.talk.mask)
    total = time.perf_counter() - total
    return samples / total, {name: watch.seconds[name] / total for name in PARTS}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", nargs="?", default="tiny")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = prepare_data(apply_overrides(find_experiment(options.experiment), options.changes))
    tokenizer = build_tokenizer(config)
    table = Table(title=f"{config.name}: training, {torch.get_num_threads()} threads")
    for column in ("stage", "samples/s", *PARTS, "other"):
        table.add_column(column, justify="right")
    for stage in config.run:
        rate, shares = time_stage(config, stage, tokenizer)
        cells = [f"{100 * shares[name]:.0f} %" for name in PARTS]
        table.add_row(stage, f"{rate:.1f}", *cells, f"{100 * (1 - sum(shares.values())):.0f} %")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
