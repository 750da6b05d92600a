"""One optimiser step of every stage of opendrivevla_0_5b with random weights: seconds and memory.

    python benchmarks/one_step.py                        # all stages, small images, small BEV
    python benchmarks/one_step.py --stages planning --scale 4

The language model, the projectors and the query modules have their full size; images and BEV are
smaller by --scale each way, so that a machine without a GPU can do it. Memory is the process's peak
(VmHWM), which the model, its gradients and AdamW's state make up.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.find import find_experiment
from experiments.schema import ExperimentConfig
from experiments.throughput import random_model, trial
from odvla.vla import DrivingVLA

STAGES = ("alignment", "instruction", "interaction", "planning")
GIB = 2**30


def shrunk(name: str, scale: int, precision: str) -> ExperimentConfig:
    """The experiment with smaller images and BEV, one conversation a batch."""
    config = find_experiment(name)
    width, height = config.data.image_size
    encoder = config.model.encoder
    encoder = replace(encoder, rows=encoder.rows // scale, columns=encoder.columns // scale)
    return replace(
        config,
        model=replace(config.model, encoder=encoder, object_match_m=1e6),
        data=replace(config.data, image_size=(width // scale, height // scale)),
        trainer=replace(config.trainer, accelerator="cpu", devices=1, precision=precision),
    )


def peak_gib() -> float:
    """The process's largest resident memory since the last reset."""
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


def reset_peak() -> None:
    """Start to look for the largest memory anew (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def has_agents(vla: DrivingVLA) -> None:
    """Let every query be a track: an untrained detector finds nobody to talk about."""
    track = vla.queries["track"]
    rules = replace(track.config.rules, birth=0.0, keep=0.0)
    track.config = replace(track.config, rules=rules, max_tracks=40)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiment", default="opendrivevla_0_5b")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--scale", type=int, default=8, help="images and BEV are so much smaller")
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    options = parser.parse_args()
    config = shrunk(options.experiment, options.scale, options.precision)
    console = Console(width=110)
    console.print(f"images {config.data.image_size}, {torch.get_num_threads()} threads")
    vla, tokenizer = random_model(config)
    has_agents(vla)
    table = Table("stage", "trains (M)", "loss", "places", "seconds", "peak GiB", box=None)
    for stage in options.stages:
        reset_peak()
        ready = trial(config, stage, vla, tokenizer)
        started = time.perf_counter()
        loss = ready.step()
        seconds = time.perf_counter() - started
        trained = sum(p.numel() for p in vla.parameters() if p.requires_grad) / 1e6
        talk = ready.batch.talk
        assert talk is not None
        row = (f"{trained:.1f}", f"{loss:.3f}", str(talk.mask.shape[1]), f"{seconds:.1f}")
        table.add_row(stage, *row, f"{peak_gib():.2f}")
        console.print(f"{stage}: {seconds:.1f} s, {peak_gib():.2f} GiB")
        del ready
    console.print(table)


if __name__ == "__main__":
    main()
