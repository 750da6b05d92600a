"""A step of Muon on a CPU: in bfloat16, as torch.optim.Muon takes it, and in fp32, as ours does.

    python benchmarks/muon.py [EXPERIMENT] [key=value ...]

Ours takes matrices of one shape together; beside it stands what that gains. The matrices are those
of the experiment's language model. All take turns in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from experiments.find import find_experiment
from odvla.config import apply_overrides
from stages.optimisation import Muon

ROUNDS = 15


def matrices(shapes: list[torch.Size]) -> list[nn.Parameter]:
    """Parameters of these shapes with a gradient."""
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for one in made:
        one.grad = torch.randn_like(one)
    return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", nargs="?", default="tiny")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = apply_overrides(find_experiment(options.experiment), options.changes)
    language = replace(config.model.language, pretrained=None).build(config.tokenizer.vocab_size)
    shapes = [p.shape for p in language.layers.parameters() if p.ndim == 2]
    optimisers = {
        "torch.optim.Muon, bfloat16": torch.optim.Muon(matrices(shapes)),
        "ours, fp32, one by one": Muon([{"params": matrices(shapes)}], largest_stacked=0),
        "ours, fp32": Muon([{"params": matrices(shapes)}]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimisers}
    for number in range(ROUNDS + 1):
        for name, optimiser in optimisers.items():
            start = time.perf_counter()
            optimiser.step()
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    slowest = max(middle.values())
    table = Table(
        title=f"{len(shapes)} matrices of {config.name}, {torch.get_num_threads()} threads"
    )
    for column in ("", "ms a step", "times as fast"):
        table.add_column(column, justify="right")
    for name, value in middle.items():
        table.add_row(name, f"{1000 * value:.1f}", f"{slowest / value:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
