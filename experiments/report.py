"""The result tables: one structure, printed with rich, written as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


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
    samples: list[dict[str, Any]] = field(default_factory=list)  # of the planning stage

    def print(self, console: Console) -> None:
        """Show every table in the terminal."""
        for table in self.tables:
            console.print(table.rich())

    def write(self, folder: Path) -> None:
        """Write table.md and results.json, with every sample where there are plans."""
        tables = [table.markdown() for table in self.tables]
        (folder / "table.md").write_text("\n".join([f"## {self.experiment}", "", *tables]))
        content = {**self.numbers, "samples": self.samples} if self.samples else self.numbers
        numbers = json.dumps(without_nan(content), indent=2, sort_keys=True)
        (folder / "results.json").write_text(numbers + "\n")


def without_nan(tree: Any) -> Any:
    """Nested dicts and lists with None for NaN and infinities, which no JSON file may hold."""
    if isinstance(tree, Mapping):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
