"""Published numbers beside ours: read from experiments/published/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.report import ResultTable
from odvla.metrics.protocol import PRESETS

FOLDER = Path(__file__).parent / "published"
PLAN_COLUMNS = ("L2 1s", "2s", "3s", "avg", "col 1s", "2s ", "3s ", "avg ")
Cells = tuple[float | str | None, ...]


@dataclass(frozen=True)
class PublishedPlans:
    """Rows of planning tables that were made under one protocol."""

    protocol: str  # a preset, or "quoted, ...": unknown but for the convention in time
    source: str
    rows: tuple[tuple[str, Cells], ...]  # cells of PLAN_COLUMNS

    @property
    def comparable(self) -> bool:
        """Whether the protocol is known, so that other numbers may stand beside these."""
        return self.protocol in PRESETS


def published_plans() -> list[PublishedPlans]:
    """All published planning numbers, by protocol."""
    found = []
    for content in _files("planning"):
        for table in content["tables"]:
            rows = []
            for name, numbers in table["rows"].items():
                collision = numbers.get("collision", [None] * 4)
                rows.append((name, (*numbers["l2"], *collision)))
            found.append(PublishedPlans(table["protocol"], content["source"], tuple(rows)))
    return found


def published_tables() -> list[ResultTable]:
    """All other published tables, as printed."""
    tables = []
    for content in _files("averages"):
        for table in content["tables"]:
            columns = tuple(table.get("columns", content.get("columns")))
            rows = tuple((str(name), tuple(cells)) for name, cells in table["rows"].items())
            title = f"Published: {table['title']}"
            tables.append(ResultTable(title, columns, rows, note=content["source"]))
    return tables


def _files(kind: str) -> list[dict[str, Any]]:
    contents = [yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))]
    return [content for content in contents if content["kind"] == kind]
