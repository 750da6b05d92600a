"""The result tables: one structure, printed with rich, written as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class ResultTable:
    """A titled table of numbers; `note` says how to read it and is printed below it.

    A cell is a number or a text; numbers are printed with `digits` decimals. None and NaN
    print as a dash. `bold` names cells to be set in bold, as (row, column).
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | str | None, ...]], ...]
    note: str = ""
    digits: int = 2
    bold: frozenset[tuple[int, int]] = frozenset()

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
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
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
        for row, (name, cells) in enumerate(self.rows):
            texts = [
                Text(self.text(cell), "bold" if (row, place) in self.bold else "")
                for place, cell in enumerate(cells)
            ]
            table.add_row(Text(name), *texts)
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
            f"| {_in_markdown(name)} | " + " | ".join(self._marked(row, cells)) + " |"
            for row, (name, cells) in enumerate(self.rows)
        ]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def _marked(self, row: int, cells: Sequence[float | str | None]) -> list[str]:
        """Cells as Markdown has them."""
        texts = [_in_markdown(self.text(cell)) for cell in cells]
        return [f"**{t}**" if (row, place) in self.bold else t for place, t in enumerate(texts)]


def _in_markdown(text: str) -> str:
    """A bar would end the cell, a line break the row."""
    return text.replace("|", "\\|").replace("\n", " ")


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
