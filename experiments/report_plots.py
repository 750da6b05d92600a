"""Plots of a report, as SVG texts: error over time, by command and by speed, collisions.

Shape legend: S samples, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.result_files import Result
from odvla.metrics.intervals import bootstrap
from odvla.types import COMMANDS, STEP_S, WAYPOINTS

COLOURS = ("#2f6db3", "#d9732c", "#3c9a5f", "#b0476c", "#7a66b8", "#8a8a3a")
SPEEDS_MPS = (0.0, 0.5, 3.0, 6.0, 9.0, 12.0, float("inf"))
SIZE = (6.2, 3.4)


def all_plots(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Title and SVG of every plot that the results have samples for."""
    protocol, kept = comparable(results)
    if not kept:
        return []
    return [
        (
            f"L2 at each step, with 95 % intervals over scenes ({protocol})",
            error_over_time(kept, protocol),
        ),
        (f"Collisions at each step ({protocol})", collisions_over_time(kept, protocol)),
        (f"Average L2 by command ({protocol})", by_command(kept, protocol)),
        (f"Average L2 by speed ({protocol})", by_speed(kept, protocol)),
    ]


def comparable(results: Sequence[Result]) -> tuple[str, list[Result]]:
    """The protocol that most results with samples have, and these: a plot never mixes cards."""
    kept = [result for result in results if result.samples and result.protocols]
    shared = Counter(name for result in kept for name in result.protocols)
    if not shared:
        return "", []
    ((protocol, _),) = shared.most_common(1)  # the first of equals
    return protocol, [result for result in kept if protocol in result.protocols]


def error_over_time(results: Sequence[Result], protocol: str) -> str:
    """L2 [T] of every result over time."""
    figure, axes = new_axes("seconds ahead", "L2 (m)")
    times = STEP_S * np.arange(1, WAYPOINTS + 1)
    for result, colour in zip(results, _colours(results), strict=True):
        l2, known, scenes = _errors(result, protocol)
        found = [
            bootstrap(l2[:, step], known[:, step], scenes)
            for step in range(WAYPOINTS)
            if known[:, step].any()
        ]
        at = times[: len(found)]
        axes.plot(at, [f.value for f in found], color=colour, marker="o", label=result.name)
        low, high = [f.low for f in found], [f.high for f in found]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    return svg_text(figure, axes)


def collisions_over_time(results: Sequence[Result], protocol: str) -> str:
    """Share of plans that touch somebody at each step."""
    figure, axes = new_axes("seconds ahead", "collisions (%)")
    times = STEP_S * np.arange(1, WAYPOINTS + 1)
    for result, colour in zip(results, _colours(results), strict=True):
        rates = 100 * np.array(result.protocols[protocol]["collision_steps"], float)
        axes.plot(times, rates, color=colour, marker="o", label=result.name)
    axes.set_ylim(bottom=0)
    return svg_text(figure, axes)


def by_command(results: Sequence[Result], protocol: str) -> str:
    """Average L2 of the key-frames of each command."""
    return _bars(results, protocol, COMMANDS, lambda record: record["command"])


def by_speed(results: Sequence[Result], protocol: str) -> str:
    """Average L2 of the key-frames of each range of speeds."""
    bounds = list(itertools.pairwise(SPEEDS_MPS))
    names = ["standing"] + [
        f"{low:g}-{high:g} m/s" if np.isfinite(high) else f"over {low:g} m/s"
        for low, high in bounds[1:]
    ]

    def name_of(record: dict[str, Any]) -> str:
        place = np.searchsorted(SPEEDS_MPS[1:-1], record["speed_mps"], side="right")
        return names[int(place)]

    return _bars(results, protocol, names, name_of)


def _bars(results: Sequence[Result], protocol: str, names: Sequence[str], name_of: Any) -> str:
    figure, axes = new_axes("", "average L2 (m)")
    width = 0.8 / len(results)
    counts = dict.fromkeys(names, 0)
    for number, (result, colour) in enumerate(zip(results, _colours(results), strict=True)):
        groups: dict[str, list[tuple[float, str]]] = {name: [] for name in names}
        for record in result.samples.values():
            if record["l2_avg_m"].get(protocol) is not None:
                groups[name_of(record)].append((record["l2_avg_m"][protocol], record["scene"]))
        for place, name in enumerate(names):
            counts[name] = max(counts[name], len(groups[name]))
            if groups[name]:
                values = np.array([value for value, _ in groups[name]])
                scenes = [scene for _, scene in groups[name]]
                found = bootstrap(values, np.ones(len(values), bool), scenes)
                at = place + (number - (len(results) - 1) / 2) * width
                spread = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
                axes.bar(
                    at,
                    found.value,
                    width * 0.92,
                    color=colour,
                    yerr=spread,
                    ecolor="#888888",
                    label=result.name if place == 0 else None,
                )
    labels = [f"{name}\n{counts[name]}" for name in names]
    axes.set_xticks(range(len(names)), labels)
    return svg_text(figure, axes)


def _errors(
    result: Result, protocol: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[str]]:
    """L2 [S, T], which steps were recorded [S, T], and scenes [S]."""
    point = result.card(protocol).driven
    records = [record for record in result.samples.values() if point in record["l2_m"]]
    l2 = np.array([record["l2_m"][point] for record in records], float)  # null becomes NaN
    recorded = np.array([record["recorded_steps"] for record in records])
    known = np.arange(WAYPOINTS)[None] < recorded[:, None]
    return l2, known, [record["scene"] for record in records]


def _colours(results: Sequence[Result]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(results))]


def new_axes(x: str, y: str) -> tuple[Any, Any]:
    """An empty figure of the report's look, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=False, axis="x")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def svg_text(figure: Any, axes: Any) -> str:
    """The figure as an SVG element, to stand in a page."""
    from matplotlib import rc_context

    handles, labels = axes.get_legend_handles_labels()
    if labels:
        # Above the plot: nothing it could hide.
        place = "outside upper left"
        figure.legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc=place)
    out = io.StringIO()
    # Text stays text, and equal plots are equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "odvla"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]
