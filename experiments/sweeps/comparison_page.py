"""A sweep's comparison as tables, plots, Markdown, JSON and one page."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.report import ResultTable, without_nan
from experiments.report_page import html_page, html_table, plots_section
from experiments.report_plots import COLOURS, new_axes, svg_text
from experiments.sweeps.comparison import Row, SweepComparison
from odvla.weights import write_atomically

log = logging.getLogger(__name__)
MARKDOWN, NUMBERS, PAGE = "compare.md", "compare.json", "compare.html"
ARTIFACTS = "compare"  # folder in the sweep's MLflow run
MEAN = 1  # column that the best is looked for in
BAR_HEIGHT_IN = 0.34


def tables_of(found: SweepComparison) -> list[ResultTable]:
    """The combinations, each axis with the others averaged, and what has no result."""
    first = " x ".join(found.axes)
    tables = [_table(found, f"{found.name}: {first}", found.rows, _note(found))]
    for name, rows in found.by_axis.items():
        note = (
            f"Every value of {name} over the same combinations of the other axes and seeds; "
            "n counts them, sd is over them."
        )
        tables.append(_table(found, f"{found.name}: {name}, other axes averaged", rows, note))
    missing = [point for point in found.points if point.value is None]
    if missing:
        why = tuple((point.title, (point.state, point.error or None)) for point in missing)
        tables.append(ResultTable("Points without a result", ("state", "why"), why))
    return tables


def _table(found: SweepComparison, title: str, rows: Sequence[Row], note: str) -> ResultTable:
    best = found.best(rows)
    marked: frozenset[tuple[int, int]] = frozenset() if best is None else frozenset({(best, MEAN)})
    columns = ("n", "mean", "sd", "95 %", "- base", "95 % ", "p", "s", "M par.", "state")
    cells = tuple((row.title, _cells(row, base=number == 0)) for number, row in enumerate(rows))
    return ResultTable(title, columns, cells, note=note, digits=3, bold=marked)


def _cells(row: Row, *, base: bool) -> tuple[float | str | None, ...]:
    test, interval = row.test, row.interval
    return (
        f"{len(row.used)}/{len(row.points)}",
        row.mean,
        row.spread,
        f"{interval.low:.3f} to {interval.high:.3f}" if interval else None,
        "base" if base else (f"{test.difference.value:+.3f}" if test else None),
        f"{test.difference.low:+.3f} to {test.difference.high:+.3f}" if test else None,
        f"{test.p_value:.4f}" if test else None,
        None if row.seconds is None else f"{row.seconds:.0f}",
        None if row.parameters is None else f"{row.parameters / 1e6:.3g}",
        _states(row),
    )


def _states(row: Row) -> str | None:
    """How many points have no result, by why."""
    states = [point.state for point in row.points if point.value is None]
    return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or None


def _note(found: SweepComparison) -> str:
    better = "higher" if found.higher_is_better else "lower"
    parts = [f"{found.metric}, {better} is better; n: finished seeds; sd: over seeds."]
    if any(row.interval for row in found.rows):
        sizes = [row.interval.scenes for row in found.rows if row.interval]
        parts.append(
            "95 %: how the samples' mean over seeds varies, scenes resampled whole "
            f"({min(sizes)} scenes); - base: on the samples that both have, seed by seed; p: signs "
            "of whole scenes flipped, not corrected for the number of rows."
        )
    else:
        parts.append("No interval: this metric is no average over samples that were kept.")
    if found.rows[0].mean is None:
        parts.append("The base has no result, so nothing is compared with it.")
    parts.append("s: a point's stages, shared ones counted whole; M par.: millions, with buffers.")
    if found.card is not None:
        parts.append(found.card.sentence())
    return " ".join(parts)


def plots_of(found: SweepComparison) -> list[tuple[str, str]]:
    """Title and SVG of the bars, and of quality against what it costs."""
    rows = [row for row in found.rows if row.mean is not None]
    plots = [("Mean of each combination, with 95 % intervals over scenes", _bars(found, rows))]
    costs = {
        "Training time and quality": ("seconds of all stages", [row.seconds for row in rows]),
        "Size and quality": (
            "million parameters",
            [None if row.parameters is None else row.parameters / 1e6 for row in rows],
        ),
    }
    for title, (label, cost) in costs.items():
        known = [(row, value) for row, value in zip(rows, cost, strict=True) if value is not None]
        if known and (label.startswith("seconds") or len({value for _, value in known}) > 1):
            plots.append((title, _scatter(found, known, label)))
    return plots


def _axis_name(found: SweepComparison) -> str:
    direction = "higher" if found.higher_is_better else "lower"
    return f"{found.metric.rpartition('.')[2]} ({direction} is better)"


def _spread(row: Row) -> list[list[float]]:
    """Lengths of an interval below and above the mean, as matplotlib takes them."""
    if row.interval is None or row.mean is None:
        return [[0.0], [0.0]]
    return [
        [max(0.0, row.mean - row.interval.low)],
        [max(0.0, row.interval.high - row.mean)],
    ]


def _bars(found: SweepComparison, rows: Sequence[Row]) -> str:
    figure, axes = new_axes(_axis_name(found), "")
    figure.set_figheight(max(2.4, 1.2 + BAR_HEIGHT_IN * len(rows)))
    best = found.best(rows)
    for number, row in enumerate(rows):
        colour = COLOURS[1] if number == best else COLOURS[0]
        axes.barh(number, row.mean, 0.7, color=colour, xerr=_spread(row), ecolor="#555555")
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    return svg_text(figure, axes)


def _scatter(found: SweepComparison, known: Sequence[tuple[Row, float]], label: str) -> str:
    figure, axes = new_axes(label, _axis_name(found))
    best = found.best([row for row, _ in known])
    for number, (row, cost) in enumerate(known):
        colour = COLOURS[1] if number == best else COLOURS[0]
        axes.errorbar(cost, row.mean, yerr=_spread(row), fmt="o", color=colour, ecolor="#999999")
        axes.annotate(
            row.title, (cost, row.mean), xytext=(6, 4), textcoords="offset points", fontsize=8
        )
    axes.margins(x=0.18)
    return svg_text(figure, axes)


def numbers_of(found: SweepComparison) -> dict[str, Any]:
    """All that the tables say, for compare.json."""

    def row_numbers(row: Row) -> dict[str, Any]:
        return {
            "labels": list(row.labels),
            "n": len(row.used),
            "of": len(row.points),
            "mean": row.mean,
            "sd": row.spread,
            "interval_95": asdict(row.interval) if row.interval else None,
            "against_base": asdict(row.test) if row.test else None,
            "seconds": row.seconds,
            "parameters": row.parameters,
        }

    best = found.best(found.rows)
    return {
        "sweep": found.name,
        "metric": found.metric,
        "higher_is_better": found.higher_is_better,
        "axes": found.axes,
        "card": found.card.as_dict() if found.card else None,
        "best": None if best is None else list(found.rows[best].labels),
        "rows": [row_numbers(row) for row in found.rows],
        "by_axis": {
            name: [row_numbers(row) for row in rows] for name, rows in found.by_axis.items()
        },
        "points": [
            {
                "id": point.id,
                "labels": list(point.labels),
                "seed": point.seed,
                "state": point.state,
                "error": point.error or None,
                "value": point.value,
                "samples": len(point.samples),
                "seconds": point.seconds,
                "parameters": point.parameters,
            }
            for point in found.points
        ],
    }


def write_comparison(found: SweepComparison, out: Path) -> list[Path]:
    """Write compare.md, compare.json and compare.html.

    Returns:
        The three files.
    """
    tables = tables_of(found)
    out.mkdir(parents=True, exist_ok=True)
    markdown = "\n".join([f"## {found.name}", "", *(table.markdown() for table in tables)])
    done = sum(point.value is not None for point in found.points)
    lead = f"{done} of {len(found.points)} points finished. Metric: {html.escape(found.metric)}."
    sections = [
        ("results", "Results", "".join(html_table(table) for table in tables)),
        plots_section(plots_of(found)),
    ]
    texts = {
        MARKDOWN: markdown + "\n",
        NUMBERS: json.dumps(without_nan(numbers_of(found)), indent=1) + "\n",
        PAGE: html_page(f"Sweep {found.name}", lead, sections),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def track_comparison(folder: Path, files: Sequence[Path]) -> str:
    """Log files as artifacts of the sweep's MLflow run, where it has one that can be reached.

    Returns:
        The run's id; "": nothing was logged.
    """
    note = folder / "mlflow.json"
    if not note.is_file():
        return ""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from experiments.tracking_store import answers, shown

    kept = json.loads(note.read_text())
    uri, run = kept["uri"], kept["runs"].get("", "")
    if not answers(uri):
        log.warning("the MLflow server %s does not answer: nothing is logged there", shown(uri))
        return ""
    try:
        client = MlflowClient(tracking_uri=uri)
        for path in files:
            client.log_artifact(run, str(path), ARTIFACTS)
    except MlflowException as error:
        log.warning("the comparison is not logged: %s", error.message)
        return ""
    return run
