"""Seconds and peak memory of every backend of the deformable ops, as ratios in one run.

    python benchmarks/ops.py [--small] [--threads N] [--device cpu|cuda] [--backends NAME ...]

The sizes are those of the full-size tower: temporal attention (TSA), spatial attention for the
cells that one camera sees (SCA), the track decoder's attention, and the deformable convolutions of
the third and fourth stage of ResNet-101 for one camera. --small shrinks them all, to see that
everything runs.

How it is measured: on a CPU every case runs in a process of its own, on a GPU one after the other.
Seconds are the best of several calls; on a CPU with one thread they are processor seconds, so that
other work on the machine counts less. Memory on a CPU is how far the first call lifts the process's
peak (ru_maxrss, reset before it) above what was held; on a GPU it is max_memory_allocated above
what was held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from odvla.ops.backends import COMPILED, NAMES, available_backends, use_backend
from odvla.ops.deformable_attention import deformable_attention
from odvla.ops.deformable_conv import modulated_deform_conv

LEVELS = ((116, 200), (58, 100), (29, 50), (15, 25))
HEADS, DIM = 8, 256
REPEATS = {"cpu": 3, "cuda": 20}
BASE = "grid_sample"  # the reference's pure path, in this table
SHRUNK = 8  # --small: so many times fewer queries, and rows and columns of maps


@dataclass(frozen=True)
class Attention:
    """Sizes of a deformable attention."""

    queries: int
    points: int
    maps: tuple[tuple[int, int], ...]

    def inputs(self, shrink: int) -> list[Tensor]:
        """Places (neighbours look near one another), weights, maps as the layers make them."""
        queries = self.queries // shrink
        sizes = [(max(h // shrink, 2), max(w // shrink, 2)) for h, w in self.maps]
        values = [torch.randn(1, height, width, DIM).permute(0, 3, 1, 2) for height, width in sizes]
        shape = (1, queries, HEADS, len(sizes), self.points)
        start = torch.rand(1, queries, 1, 1, 1, 2).sort(1).values
        locations = start + 0.05 * torch.randn(*shape, 2)
        weights = torch.rand(*shape).flatten(3).softmax(-1).view(shape)
        return [locations, weights, *values]

    @staticmethod
    def run(locations: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        """The operation."""
        return deformable_attention(values, locations, weights)


@dataclass(frozen=True)
class Convolution:
    """Sizes of a modulated deformable convolution."""

    channels: int
    height: int
    width: int

    def inputs(self, shrink: int) -> list[Tensor]:
        """A map in channels-last memory, offsets of a few pixels, mask, kernel."""
        height, width = self.height // shrink, self.width // shrink
        x = torch.randn(1, height, width, self.channels).permute(0, 3, 1, 2)
        weight = torch.randn(self.channels, self.channels, 3, 3)
        return [x, 2 * torch.randn(1, 18, height, width), torch.rand(1, 9, height, width), weight]

    @staticmethod
    def run(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """The operation."""
        return modulated_deform_conv(x, offset, mask, weight, padding=1)


CASES: dict[str, Attention | Convolution] = {
    "TSA": Attention(40_000, 4, ((200, 200), (200, 200))),
    "SCA, a camera": Attention(7_500, 8, LEVELS),
    "track decoder": Attention(901, 4, ((200, 200),)),
    "DCN stage 3, a camera": Convolution(256, 58, 100),
    "DCN stage 4, a camera": Convolution(512, 29, 50),
}


def measure(case: str, backend: str, backward: bool, shrink: int, device: str) -> dict[str, float]:
    """Seconds and megabytes of one case, in this process."""
    torch.manual_seed(0)
    use_backend(backend)
    tensors = [tensor.to(device) for tensor in CASES[case].inputs(shrink)]
    leaves = [tensor.requires_grad_(backward) for tensor in tensors]

    def call() -> None:
        with torch.set_grad_enabled(backward):
            result = CASES[case].run(*leaves)
        if backward:
            torch.autograd.grad(result, leaves, torch.ones_like(result))
        if device != "cpu":
            torch.cuda.synchronize()

    megabytes = _rise(call, device)
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds = []
    for _ in range(REPEATS[device]):
        start = clock()
        call()
        seconds.append(clock() - start)
    return {"seconds": min(seconds), "megabytes": megabytes}


def _rise(call: Callable[[], None], device: str) -> float:
    """Megabytes by which a first call lifts the peak above what is held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The peak so far may lie above what is held now: Linux forgets it when told so.
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def in_a_process_of_its_own(arguments: dict[str, object], threads: int) -> dict[str, float]:
    """`measure`, elsewhere."""
    command = [sys.executable, __file__, "--one", json.dumps(arguments), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table_of(found: dict[tuple[str, bool, str], dict[str, float]], title: str) -> Table:
    """grid_sample's seconds and megabytes, and everyone's as multiples of them."""
    names = list(dict.fromkeys(backend for _, _, backend in found))
    table = Table(title=title)
    table.add_column("operation")
    table.add_column("pass")
    for column in (f"{BASE} ms", f"{BASE} MB"):
        table.add_column(column, justify="right")
    for name in names:
        if name != BASE:
            table.add_column(f"{name} ms", justify="right")
            table.add_column(f"{name} MB", justify="right")
    for case, backward in dict.fromkeys((case, backward) for case, backward, _ in found):
        base = found[case, backward, BASE]
        cells = [f"{1e3 * base['seconds']:.2f}", f"{base['megabytes']:.0f}"]
        for name in names:
            if name != BASE:
                other = found[case, backward, name]
                for quantity in ("seconds", "megabytes"):
                    value, reference = other[quantity], base[quantity]
                    # Below a megabyte the peak says nothing.
                    known = quantity == "seconds" or reference >= 1
                    ratio = f" ({value / reference:.2f} x)" if known else ""
                    cells.append(
                        (f"{1e3 * value:.2f}" if quantity == "seconds" else f"{value:.0f}") + ratio
                    )
        label = "forward + backward" if backward else "forward"
        table.add_row(case, label, *cells, end_section=backward)
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="an eighth of every size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--backends", nargs="+", choices=NAMES[1:], help=f"beside {BASE} (default: all there are)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        sys.stdout.write(json.dumps(measure(**json.loads(options.one))) + "\n")
        return
    backends = [
        name
        for name in available_backends()
        if (name not in COMPILED or options.device == "cuda")
        and (not options.backends or name in (BASE, *options.backends))
    ]
    backends.sort(key=lambda name: name != BASE)
    wanted = list(itertools.product(CASES, (False, True), backends))
    found = {}
    for case, backward, backend in track(wanted, "measuring", console=Console(stderr=True)):
        arguments = {
            "case": case,
            "backend": backend,
            "backward": backward,
            "shrink": SHRUNK if options.small else 1,
            "device": options.device,
        }
        if options.device == "cpu":
            found[case, backward, backend] = in_a_process_of_its_own(arguments, options.threads)
        else:
            found[case, backward, backend] = measure(**arguments)
    clock = "processor" if options.device == "cpu" and options.threads == 1 else "wall"
    place = f"{options.device}, {options.threads} threads, {clock} seconds"
    sizes = "an eighth of the sizes" if options.small else "full sizes"
    Console(width=150).print(table_of(found, f"deformable ops, {sizes}, {place}, float32"))


if __name__ == "__main__":
    main()
