"""The runs of an MLflow store with their lineage."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from experiments.report import ResultTable
from experiments.run_copies import PARENT, PUSHED, all_runs
from experiments.tracking_store import MEANT_FOR, shown

SHORT = 8  # digits of ids and hashes
# The first of these that a run has is its main metric.
METRICS = (
    "planning/OpenDriveVLA/mean_up_to_t/l2_average_m",
    "planning/planning/OpenDriveVLA/mean_up_to_t/l2_average_m",
    "val/loss",
    "train/loss",
)


def run_table(uri: str) -> ResultTable:
    """All runs, each below its parent.

    Args:
        uri: of the store.
    """
    runs = all_runs(MlflowClient(tracking_uri=uri))
    known = {run.info.run_id for run in runs}
    below: dict[str, list[Run]] = {}
    for run in runs:
        parent = run.data.tags.get(PARENT, "")
        below.setdefault(parent if parent in known else "", []).append(run)
    rows: list[tuple[str, tuple[str | None, ...]]] = []

    def add(parent: str, depth: int) -> None:
        for run in below.get(parent, ()):
            name = "  " * depth + (run.info.run_name or "-")
            rows.append((name, _cells(run)))
            add(run.info.run_id, depth + 1)

    add("", 0)
    columns = ("run", "stage", "parent", "from", "card", "data", "began", "status", "main metric")
    note = (
        f"{len(runs)} runs of {shown(uri)}; from: the handoff that a stage began with, card: the "
        "one that it left, data: fingerprint; hashes and ids by their first digits."
    )
    return ResultTable("Runs", columns, tuple(rows), note=note)


def _cells(run: Run) -> tuple[str | None, ...]:
    tags = run.data.tags
    status = run.info.status.lower()
    if MEANT_FOR in tags:
        status += ", pushed" if PUSHED in tags else ", not pushed"
    began = datetime.fromtimestamp(run.info.start_time / 1000)
    return (
        run.info.run_id[:SHORT],
        tags.get("stage"),
        _short(tags.get(PARENT)),
        _short(tags.get("parent_card")),
        _short(tags.get("card")),
        _short(tags.get("data_fingerprint")),
        f"{began:%Y-%m-%d %H:%M}",
        status,
        _main_metric(run.data.metrics),
    )


def _short(text: str | None) -> str | None:
    return None if text in (None, "", "None") else str(text)[:SHORT]


def _main_metric(metrics: dict[str, Any]) -> str | None:
    for name in METRICS:
        if name in metrics:
            return f"{name.rpartition('/')[2] if '/l2' in name else name} {metrics[name]:.3f}"
    return None
