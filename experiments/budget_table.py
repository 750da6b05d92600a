"""Budgets of stages as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from experiments.budget import GIB, StageBudget, totals
from experiments.schema import ExperimentConfig
from stages.optimisation import COMPONENTS


def print_budgets(
    config: ExperimentConfig,
    found: Sequence[StageBudget],
    rates: Mapping[str, float | None],
    console: Console,
) -> None:
    """Print what was counted.

    Args:
        config: the experiment.
        found: its stages.
        rates: samples a second of all devices together, by stage; None: not known.
        console: where to.
    """
    trainer = config.trainer
    sharing = f"{trainer.processes} x {trainer.sharing}" if trainer.processes > 1 else "one device"
    console.print(f"{config.name}: {sharing}, {trainer.precision}", highlight=False)
    console.print(_parameters(found))
    console.print(_memory(config, found))
    console.print(_time(found, rates))
    sums = totals(found)
    console.print(
        f"At most {sums['peak'] / GIB:.2f} GiB a device; handoffs take {sums['disk'] / GIB:.2f} "
        "GiB on disk. What the language model keeps for the backward pass is counted at full size, "
        "what a vision half that trains keeps is scaled up from small images; what a frozen one "
        "needs for a moment, and fragments of the allocator, come on top.",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("stage")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _parameters(found: Sequence[StageBudget]) -> Table:
    table = _table("Millions of parameters that train", *COMPONENTS, "all")
    for stage in found:
        counts = [stage.trained.get(name, 0) for name in COMPONENTS]
        told = [f"{count / 1e6:.2f}" if count else "-" for count in counts]
        table.add_row(stage.stage, *told, f"{sum(counts) / 1e6:.2f}")
    return table


def _memory(config: ExperimentConfig, found: Sequence[StageBudget]) -> Table:
    parts = ("weights", "gradients", "optimiser", "exchange", "activations", "step", "peak")
    unit, size = ("GiB", GIB) if totals(found)["peak"] >= GIB else ("MiB", GIB / 1024)
    table = _table(f"Memory of a device, {unit}", "batch", *parts)
    for stage in found:
        rows = getattr(config.data, stage.stage).batch_size
        numbers = [f"{getattr(stage.memory, part) / size:.2f}" for part in parts]
        table.add_row(stage.stage, str(rows), *numbers)
    return table


def _time(found: Sequence[StageBudget], rates: Mapping[str, float | None]) -> Table:
    table = _table("Work", "tokens a sample", "samples", "steps", "samples/s", "hours")
    for stage in found:
        rate = rates[stage.stage]
        hours = stage.hours(rate) if rate else None
        table.add_row(
            stage.stage,
            str(stage.tokens or "-"),
            "?" if stage.samples is None else f"{stage.samples:,}",
            "?" if stage.steps is None else f"{stage.steps:,}",
            "-" if rate is None else f"{rate:.2f}",
            "-" if hours is None else f"{hours:.1f}",
        )
    return table
