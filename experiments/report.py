"""The result tables: one structure, printed with rich, written as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from odvla.metrics.planning import PlanningScores


@dataclass(frozen=True)
class ResultTable:
    """A titled table of numbers; `note` says how to read it and is printed below it.

    A cell is a number or a text; numbers are printed with `digits` decimals. None prints as a dash.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | str | None, ...]], ...]
    note: str = ""
    digits: int = 2

    def __post_init__(self) -> None:
        """Check that every row has one cell a column."""
        for name, cells in self.rows:
            if len(cells) != len(self.columns):
                raise ValueError(
                    f"row {name!r} of table {self.title!r} has {len(cells)} cells for "
                    f"{len(self.columns)} columns"
                )

    def text(self, cell: float | str | None) -> str:
        """One cell as printed."""
        if cell is None:
            return "-"
        return cell if isinstance(cell, str) else f"{cell:.{self.digits}f}"

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(
            title=self.title,
            caption=self.note,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),  # the planning tables fit into 80 columns
            pad_edge=False,
        )
        table.add_column("", no_wrap=True)
        for column in self.columns:
            table.add_column(column, justify="right")
        for name, cells in self.rows:
            table.add_row(name, *[self.text(cell) for cell in cells])
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [
            f"### {self.title}",
            "",
            "| | " + " | ".join(self.columns) + " |",
            "|---|" + "---:|" * len(self.columns),
        ]
        lines += [
            f"| {name} | " + " | ".join(self.text(cell) for cell in cells) + " |"
            for name, cells in self.rows
        ]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


@dataclass(frozen=True)
class Report:
    """All tables of an experiment and the raw numbers behind them."""

    experiment: str
    tables: tuple[ResultTable, ...]
    numbers: dict[str, Any] = field(default_factory=dict)

    def print(self, console: Console) -> None:
        """Show every table in the terminal."""
        for table in self.tables:
            console.print(table.rich())

    def write(self, folder: Path) -> None:
        """Write table.md and results.json."""
        tables = [table.markdown() for table in self.tables]
        (folder / "table.md").write_text("\n".join([f"## {self.experiment}", "", *tables]))
        numbers = json.dumps(self.numbers, indent=2, sort_keys=True)
        (folder / "results.json").write_text(numbers + "\n")


@dataclass(frozen=True)
class Planner:
    """One row of the planning tables: scores under each card, and the share of readable plans."""

    name: str
    scores: tuple[PlanningScores, ...]
    parsed_percent: float | None


def planning_tables(planners: Sequence[Planner]) -> tuple[ResultTable, ...]:
    """One table a protocol, because numbers of different cards must not share a column."""
    titles = {
        "mean_up_to_t": "Planning, mean up to t (ST-P3, VAD): L2 in m, collisions in %",
        "value_at_t": "Planning, value at t (UniAD): L2 in m, collisions in %",
    }
    tables = []
    for index, first in enumerate(planners[0].scores):
        for planner in planners:
            if planner.scores[index].card.l2 != first.card.l2:
                raise ValueError(f"planner {planner.name!r} was scored under another protocol")
        tables.append(
            ResultTable(
                title=titles[first.card.l2],
                columns=(
                    *("L2 1s", "2s", "3s", "avg"),
                    *("col 1s", "2s ", "3s ", "avg "),
                    "parsed",
                ),
                rows=tuple(
                    (
                        planner.name,
                        (
                            *planner.scores[index].l2_m,
                            planner.scores[index].l2_average_m,
                            *planner.scores[index].collision_percent,
                            planner.scores[index].collision_average_percent,
                            planner.parsed_percent,
                        ),
                    )
                    for planner in planners
                ),
                note=f"{first.samples} samples; collision: {first.card.collision}; occupancy: "
                f"{first.card.occupancy}; average over {first.card.samples.replace('_', ' ')}; "
                f"{first.card.parse}.",
            )
        )
    return tuple(tables)
