"""The full-size vision tower on one real frame: seconds, GFLOP and memory by part.

    python benchmarks/tower.py [ROOT] [--threads N] [--skip-flops]

ResNet-101 with deformable convolutions, BEVFormer with six layers on 200 x 200 cells, TrackFormer
with 901 queries and the panoptic map head with UniAD's settings, random weights, six images of
1600 x 900 with their real calibration. The first frame has no past; the second one is the same
moment half a second later with the first one's BEV and tracks as its past.

Beside ours stand the seconds of the reference implementation with pure-torch operations on two CPU
cores (the bar). Wall time says little on a machine with other work; processor time does, with
--threads 1 (several threads that wait for one another burn it, too). If the processor seconds of
one thread are below the bar, so are the seconds of two cores on an idle machine.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from datamodules.nuscenes import NuScenesDataConfig, NuScenesDataModule
from odvla.encoders.bevformer import BEVFormer, BEVFormerConfig
from odvla.ops.backends import describe_backend
from odvla.queries.panoptic_map import PanopticMap, PanopticMapConfig
from odvla.queries.trackformer import TrackFormer, TrackFormerConfig
from odvla.types import Frames

ROOT = "../shared/data/nuscenes-one-sample"
MEMORY_LIMIT_GB = 12.0
TRACKS = 40  # a street has about so many agents


@dataclass(frozen=True)
class Part:
    """A part of the tower, and what the reference needs for it."""

    name: str
    gflop: float  # of the reference, as FlopCounterMode counts
    bar_s: tuple[float, float]  # first frame, second frame


PARTS = (
    Part("ResNet-101 + DCNv2", 2793.5, (156.0, 156.0)),  # 26 s a camera on an idle machine
    Part("FPN", 282.0, (6.0, 6.0)),
    Part("BEVFormer, 6 layers", 579.3, (85.0, 100.0)),
    Part("track decoder", 48.9, (1.0, 1.0)),
    Part("life of tracks", 0.0, (0.0, 0.0)),
    Part("map encoder + decoder", 271.4, (9.7, 9.7)),
    Part("map masks + merge", 137.5, (12.3, 12.3)),
)


@dataclass
class Meter:
    """Seconds and FLOP by part; a part inside another one is not counted twice."""

    counter: FlopCounterMode | None = None
    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flop: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside: list[str] = field(default_factory=list)

    def _readings(self) -> tuple[float, float, float]:
        flop = self.counter.get_total_flops() if self.counter else 0
        return time.perf_counter(), time.process_time(), float(flop)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Measure every call of a method."""
        call: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self._readings()
            self._inside.append(name)
            result = call(*args, **kwargs)
            self._inside.pop()
            outer = self._inside[-1] if self._inside else None
            tables = (self.wall, self.cpu, self.flop)
            for table, start, end in zip(tables, before, self._readings(), strict=True):
                table[name] += end - start
                if outer is not None:
                    table[outer] -= end - start
            return result

        setattr(owner, method, watched)

    def clear(self) -> None:
        """Start anew."""
        for table in (self.wall, self.cpu, self.flop):
            table.clear()


@dataclass
class Tower:
    """The three modules and what they remember."""

    encoder: BEVFormer
    agents: TrackFormer
    map: PanopticMap
    bev: Any = None
    tracks: Any = None
    logits: torch.Tensor | None = None  # [B, Q, classes] of the last frame

    @classmethod
    def build(cls) -> Tower:
        """With offsets as after training: a few pixels, not zero."""
        torch.manual_seed(0)
        encoder = BEVFormerConfig(compat="uniad").build().eval()
        agents = TrackFormerConfig(compat="uniad").build(encoder.dim, encoder.grid).eval()
        lanes = PanopticMapConfig(compat="uniad").build(encoder.dim, encoder.grid).eval()
        for module in (encoder, agents, lanes):
            module.requires_grad_(False)  # FlopCounterMode hooks whatever could have a gradient
            for name, parameter in module.named_parameters():
                if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                    torch.nn.init.normal_(parameter, std=0.02)
        for name, parameter in encoder.backbone.named_parameters():
            if name.endswith("bn3.weight"):
                torch.nn.init.constant_(parameter, 0.2)  # keeps features of a deep net in range
            if name.endswith("conv_offset.weight"):
                torch.nn.init.normal_(parameter, std=0.02)
        return cls(encoder, agents, lanes)

    def watch(self, meter: Meter) -> None:
        """Measure by part."""
        meter.watch(self.encoder.backbone, "forward", PARTS[0].name)
        meter.watch(self.encoder.neck, "forward", PARTS[1].name)
        meter.watch(self.encoder, "encode_bev", PARTS[2].name)
        meter.watch(self.agents, "detect", PARTS[3].name)
        meter.watch(self.agents, "forward", PARTS[4].name)
        meter.watch(self.map, "decode", PARTS[5].name)
        meter.watch(self.map, "forward", PARTS[6].name)

    @torch.no_grad()
    def see(self, frames: Frames) -> tuple[int, int]:
        """One frame; the numbers of track and map tokens."""
        features, self.bev = self.encoder(frames, self.bev)
        agents, self.tracks = self.agents(features, frames, self.tracks)
        self.logits = agents.predictions.layer_logits[-1]
        lanes, _ = self.map(features, frames)
        assert bool(agents.feats.isfinite().all())
        assert bool(lanes.feats.isfinite().all())
        return agents.feats.shape[1], lanes.feats.shape[1]

    @torch.no_grad()
    def make_confident(self, count: int) -> None:
        """Lift the last layer's scores so far that about so many queries become tracks."""
        assert self.logits is not None
        best = self.logits.amax(-1).flatten().sort(descending=True).values[count - 1]
        birth = torch.tensor(self.agents.config.rules.birth).logit()
        self.agents.cls_branches[-1][-1].bias += birth - best + 1e-3

    def forget(self) -> None:
        """A new scene."""
        self.bev = self.tracks = None


def one_real_frame(root: Path) -> Frames:
    """The first key-frame of a nuScenes root at full size."""
    data = NuScenesDataModule(NuScenesDataConfig(str(root), image_size=(1600, 900)))
    record = data.index.frames[0]
    return data.loader.load(record, scene_start=True)


def half_a_second_later(frames: Frames) -> Frames:
    """The same images after 2.5 m straight ahead."""
    can_bus = frames.can_bus.clone()
    can_bus[:, 0] = 2.5
    return replace(
        frames,
        can_bus=can_bus,
        scene_start=torch.zeros_like(frames.scene_start),
        timestamp_s=frames.timestamp_s + 0.5,
    )


def table_of(frames: list[tuple[str, Meter, int]], flop: dict[str, float]) -> Table:
    """All parts of both frames."""
    threads = torch.get_num_threads()
    table = Table(title=f"full-size tower, one real frame, {threads} threads, float32")
    for column in ("part", "GFLOP", "of the reference"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for label, _, _ in frames:
        for column in (f"{label}: wall s", "cpu s", "bar s", "bar / ours", "GFLOP/s"):
            table.add_column(column, justify="right")
    rows = [*PARTS, None]
    for part in rows:
        chosen = PARTS if part is None else (part,)
        ours = sum(flop.get(p.name, 0.0) for p in chosen) / 1e9
        cells = [
            "sum" if part is None else part.name,
            f"{ours:.1f}" if ours else "",
            f"{sum(p.gflop for p in chosen):.1f}",
        ]
        for _, meter, number in frames:
            wall = sum(meter.wall[p.name] for p in chosen)
            bar = sum(p.bar_s[number] for p in chosen)
            cpu = sum(meter.cpu[p.name] for p in chosen)
            # Like the bar, several threads are judged by the wall clock.
            spent = cpu if threads == 1 else wall
            ratio = f"{bar / spent:.1f}" if bar else ""
            rate = f"{ours / spent:.0f}" if ours else ""
            cells += [f"{wall:.2f}", f"{cpu:.2f}", f"{bar:.1f}", ratio, rate]
        table.add_row(*cells, end_section=part is PARTS[-1])
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(ROOT))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-flops", action="store_true", help="count no FLOP")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=180)
    now = one_real_frame(options.root)
    tower, meter = Tower.build(), Meter()
    tower.watch(meter)
    later = half_a_second_later(now)
    console.print(describe_backend(torch.device("cpu")))
    # The first pass wakes everything up; it also shows what scores these weights give.
    with nullcontext() if options.skip_flops else FlopCounterMode(display=False) as counter:
        meter.counter = counter
        tower.see(now)
    meter.counter = None
    flop = {} if options.skip_flops else dict(meter.flop)
    if flop:
        console.print(f"counted {sum(flop.values()) / 1e9:.1f} GFLOP")
    tower.make_confident(TRACKS)
    tower.forget()
    results = []
    for number, (label, frames) in enumerate((("first", now), ("second", later))):
        meter.clear()
        tokens = tower.see(frames)
        copy = Meter(wall=defaultdict(float, meter.wall), cpu=defaultdict(float, meter.cpu))
        results.append((label, copy, number))
        console.print(f"{label} frame: {tokens[0]} track tokens, {tokens[1]} map tokens")
    console.print(table_of(results, flop))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.print(
        f"peak memory of the process (ru_maxrss, weights and images included): {peak_gb:.2f} GB, "
        f"limit {MEMORY_LIMIT_GB:.0f} GB: {'kept' if peak_gb < MEMORY_LIMIT_GB else 'BROKEN'}"
    )


if __name__ == "__main__":
    main()
