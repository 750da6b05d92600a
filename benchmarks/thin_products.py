"""Linear layers on few rows: torch's way, and the way decoding multiplies them on a CPU.

    python benchmarks/thin_products.py              # Qwen2.5-0.5B's layers, some seconds
    python benchmarks/thin_products.py --threads 8

Eight layers of a shape take turns, so that weights come from memory, as they do in a model. The two
ways alternate; the table has their medians in GFLOP/s, and the ratio of times.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from odvla.language.thin_products import turned_product

SHAPES = {
    "query, output": (896, 896),
    "key, value": (896, 128),
    "up": (896, 4864),
    "down": (4864, 896),
}
ROWS = (2, 4, 8, 16, 32, 64, 128)
LAYERS, RUNS = 8, 7


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(
        "layer", "rows", "torch", "turned", "time", title=f"{options.threads} threads, GFLOP/s"
    )
    for name, (inputs, outputs) in SHAPES.items():
        layers = [nn.Linear(inputs, outputs) for _ in range(LAYERS)]
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            usual, turned = _both(layers, x)
            work = 2 * inputs * outputs * rows * LAYERS / 1e9
            cells = (f"{work / usual:.0f}", f"{work / turned:.0f}", f"{turned / usual:.2f} x")
            table.add_row(name, str(rows), *cells)
    Console().print(table)


@torch.inference_mode()
def _both(layers: list[nn.Linear], x: Tensor) -> tuple[float, float]:
    """Median seconds of all layers, torch's way and ours."""
    usual, turned = [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        for layer in layers:
            layer(x)
        between = time.perf_counter()
        for layer in layers:
            turned_product(layer, x)
        usual.append(between - started)
        turned.append(time.perf_counter() - between)
    return median(usual), median(turned)


if __name__ == "__main__":
    main()
