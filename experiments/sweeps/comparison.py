"""What a sweep has found: its points read from their folder, put together by labels, and compared.

Reads files only, so that it can be asked while the sweep still runs.

Shape legend: S samples (key-frames) that all results of a row have.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.handoff import CARD, WEIGHTS
from experiments.planning_evaluation import MODEL, OWN
from experiments.sweeps.graph import FAILED, MANIFEST, RESULTS, SCORE, read_manifest
from experiments.sweeps.work import STATUS
from odvla.errors import UserError
from odvla.metrics.intervals import Interval, PairedTest, bootstrap, paired_test
from odvla.metrics.protocol import ProtocolCard, refuse_to_mix

Record = dict[str, Any]
# Numbers that every sample has a part in -> where a sample's record has its part, and the factor
# that makes it the number's unit.
AVERAGES = {
    "l2_average_m": ("l2_avg_m", 1.0),
    "l2_avg_m": ("l2_avg_m", 1.0),
    "collision_average_percent": ("collision_avg", 100.0),
    "box_collision_avg": ("collision_avg", 1.0),
    "point_collision_avg": ("collision_avg", 1.0),
}


@dataclass(frozen=True)
class PointResult:
    """One point of a sweep, finished or not."""

    id: str
    labels: tuple[str, ...]  # one an axis
    seed: int
    state: str  # "finished", "failed", "begun", "not begun"
    error: str  # what stopped it, and in which task; "" where nothing did
    value: float | None  # the sweep's metric
    samples: Mapping[str, tuple[str, float]]  # token -> scene and the metric of this sample
    card: ProtocolCard | None
    seconds: float | None  # of all its stages, shared ones counted whole
    parameters: int | None  # of its last stage's weights, buffers included

    @property
    def title(self) -> str:
        """Labels and seed in one line."""
        return f"{', '.join(self.labels)}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """Points that have something in common: the seeds of one combination, or of one label."""

    labels: tuple[str, ...]
    points: tuple[PointResult, ...]  # finished or not
    used: tuple[PointResult, ...]  # those that the numbers are of
    mean: float | None
    spread: float | None  # standard deviation over the used points
    interval: Interval | None  # over scenes, of the mean over the used points
    test: PairedTest | None  # against the base row; None for the base, or without shared samples
    seconds: float | None
    parameters: float | None

    @property
    def title(self) -> str:
        """The labels in one line."""
        return ", ".join(self.labels)


@dataclass(frozen=True)
class SweepComparison:
    """All that is shown of a sweep."""

    name: str
    metric: str
    higher_is_better: bool
    axes: dict[str, list[str]]
    points: tuple[PointResult, ...]
    rows: tuple[Row, ...]  # one a combination of labels, the base first
    by_axis: dict[str, tuple[Row, ...]]  # the other axes averaged; {} where there is one axis
    card: ProtocolCard | None

    def best(self, rows: Sequence[Row]) -> int | None:
        """Which row has the best mean; None where there are not two to choose from."""
        found = [(row.mean, number) for number, row in enumerate(rows) if row.mean is not None]
        if len(found) < 2:
            return None
        choose = max if self.higher_is_better else min
        best = choose(value for value, _ in found)
        return next(number for value, number in found if value == best)


def compare_sweep(
    folder: Path, metric: str = "", *, higher_is_better: bool = False
) -> SweepComparison:
    """Read and compare the points of a sweep.

    Args:
        folder: of the sweep, with its sweep.json.
        metric: dotted path of a number in the points' results.json; "": what the sweep declares.
        higher_is_better: of that metric.

    Raises:
        UserError: there is no sweep, none of its points is finished, a result lacks the metric, or
            two points were scored under different protocols.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no sweep: there is no {MANIFEST} in it")
    manifest = read_manifest(folder / MANIFEST)
    if not metric:
        metric, higher_is_better = manifest["metric"], bool(manifest["higher_is_better"])
    points = tuple(_read_point(folder, entry, metric) for entry in manifest["points"])
    finished = [point for point in points if point.value is not None]
    if not finished:
        failed = [point for point in points if point.error]
        why = f"; {failed[0].title}: {failed[0].error}" if failed else ""
        raise UserError(f"no point of the sweep in {folder} is finished{why}")
    cards = _cards(finished)
    axes = {name: list(values) for name, values in manifest["axes"].items()}
    return SweepComparison(
        manifest["name"],
        metric,
        higher_is_better,
        axes,
        points,
        _rows(points),
        {name: _axis_rows(points, place) for place, name in enumerate(axes)}
        if len(axes) > 1
        else {},
        cards[0] if cards else None,
    )


def _rows(points: Sequence[PointResult]) -> tuple[Row, ...]:
    """One row a combination of labels: its points are told apart by their seeds."""
    groups: dict[tuple[str, ...], dict[Any, PointResult]] = {}
    for point in points:
        groups.setdefault(point.labels, {})[point.seed] = point
    base = next(iter(groups.values()))
    return tuple(
        _row(labels, group, None if group is base else base) for labels, group in groups.items()
    )


def _axis_rows(points: Sequence[PointResult], place: int) -> tuple[Row, ...]:
    """One row a label of one axis, over those partners that every label with results has."""
    groups: dict[str, dict[Any, PointResult]] = {}
    for point in points:
        partner = (*point.labels[:place], *point.labels[place + 1 :], point.seed)
        groups.setdefault(point.labels[place], {})[partner] = point
    ready = [
        {key for key, point in group.items() if point.value is not None}
        for group in groups.values()
    ]
    shared = set.intersection(*[keys for keys in ready if keys])
    base = next(iter(groups.values()))
    return tuple(
        _row((label,), group, None if group is base else base, shared)
        for label, group in groups.items()
    )


def _row(
    labels: tuple[str, ...],
    group: Mapping[Any, PointResult],
    base: Mapping[Any, PointResult] | None,
    shared: set[Any] | None = None,
) -> Row:
    """The numbers of a group of points.

    Args:
        labels: what they have in common.
        group: point by what tells it from the others.
        base: the group to compare with; points of one key are partners.
        shared: keys to use; None: all.
    """
    used = {
        key: point
        for key, point in group.items()
        if point.value is not None and (shared is None or key in shared)
    }
    values = [point.value for point in used.values() if point.value is not None]
    seconds = [point.seconds for point in used.values() if point.seconds is not None]
    parameters = [point.parameters for point in used.values() if point.parameters is not None]
    test = None
    if base is not None:
        partners = [key for key in used if key in base and base[key].value is not None]
        test = _paired([base[key] for key in partners], [used[key] for key in partners])
    return Row(
        labels,
        tuple(group.values()),
        tuple(used.values()),
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
        _interval(list(used.values()), values),
        test,
        statistics.fmean(seconds) if seconds else None,
        statistics.fmean(parameters) if parameters else None,
    )


def _interval(points: Sequence[PointResult], values: Sequence[float]) -> Interval | None:
    """The interval of the samples' mean, moved to the mean of the metric.

    The two differ where samples lack a part of their future: the metric then averages step by step.
    """
    tokens = _shared_tokens(points)
    if not tokens:
        return None
    scenes = [points[0].samples[token][0] for token in tokens]
    found = bootstrap(_means(points, tokens), np.ones(len(tokens), bool), scenes)
    mean = statistics.fmean(values)
    move = mean - found.value
    return Interval(mean, found.low + move, found.high + move, found.scenes)


def _paired(first: Sequence[PointResult], second: Sequence[PointResult]) -> PairedTest | None:
    tokens = _shared_tokens([*first, *second])
    if not tokens:
        return None
    scenes = [first[0].samples[token][0] for token in tokens]
    counted = np.ones(len(tokens), bool)
    return paired_test(_means(first, tokens), _means(second, tokens), counted, scenes)


def _shared_tokens(points: Sequence[PointResult]) -> list[str]:
    """Samples that all points have, in the order of the first."""
    if not points:
        return []
    return [token for token in points[0].samples if all(token in point.samples for point in points)]


def _means(points: Sequence[PointResult], tokens: Sequence[str]) -> np.ndarray:
    """Mean over points of each sample's value [S]."""
    return np.mean([[point.samples[token][1] for token in tokens] for point in points], axis=0)


def _cards(finished: Sequence[PointResult]) -> list[ProtocolCard]:
    """The cards of all points, which must be equal.

    Raises:
        UserError: naming two points and the choices they differ in.
    """
    carded = [(point.title, point.card) for point in finished if point.card is not None]
    bare = [point for point in finished if point.card is None]
    if carded and bare:
        raise UserError(
            f"{carded[0][0]} carries a protocol card and {bare[0].title} does not; they cannot be "
            "compared"
        )
    refuse_to_mix(carded)
    return [card for _, card in carded]


def _read_point(folder: Path, entry: Mapping[str, Any], metric: str) -> PointResult:
    """One entry of sweep.json's points with what its folders hold."""
    stages = {kind: folder / "stages" / task for kind, task in entry["stages"].items()}
    place = folder / "points" / entry["id"]
    state, error = _state(stages, place)
    value: float | None = None
    samples: dict[str, tuple[str, float]] = {}
    card: ProtocolCard | None = None
    if state == "finished":
        path = place / RESULTS
        content = _json(path)
        value = _number(content, metric, path)
        card = _card(content, metric, path)
        samples = _samples(content, metric)
        if not math.isfinite(value):
            state, error, value = "failed", f"{metric} is not a finite number", None
    seconds = [
        _json(stage / kind / CARD)["seconds"]
        for kind, stage in stages.items()
        if (stage / kind / CARD).is_file()
    ]
    weights = [stage / kind / WEIGHTS for kind, stage in stages.items()]
    return PointResult(
        entry["id"],
        tuple(entry["labels"].values()),
        entry["seed"],
        state,
        error,
        value,
        samples,
        card,
        sum(seconds) if len(seconds) == len(stages) else None,
        _parameters(weights[-1]) if weights else None,
    )


def _state(stages: Mapping[str, Path], place: Path) -> tuple[str, str]:
    """How far a point is, and what stopped it."""
    if (place / RESULTS).is_file():
        return "finished", ""
    tasks = {**stages, SCORE: place}
    for kind, task in tasks.items():
        if (task / FAILED).is_file():
            return "failed", f"{kind}: {_json(task / FAILED).get('error', 'no reason recorded')}"
    for kind, task in tasks.items():
        if (task / STATUS).is_file():
            seen = _json(task / STATUS)
            steps = f", step {seen['step']} of {seen['steps']}" if "step" in seen else ""
            return "begun", f"{kind} is running or was interrupted{steps}"
    done = [kind for kind, stage in stages.items() if (stage / kind / CARD).is_file()]
    if done:
        return "begun", f"{done[-1]} is done, what comes after it is not"
    return "not begun", ""


def _json(path: Path) -> Record:
    """A JSON object.

    Raises:
        UserError: the file holds none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _number(content: Record, metric: str, path: Path) -> float:
    """A number by its dotted path; NaN where null was written.

    Raises:
        UserError: it is not there.
    """
    found: Any = content
    for part in metric.split("."):
        inside = found if isinstance(found, dict) else {}
        if part not in inside:
            there = ", ".join(inside) or "nothing"
            raise UserError(f"{path} has no {metric}: at {part!r} there is only {there}")
        found = inside[part]
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(f"{metric} in {path} is a {type(found).__name__}, not a number")
    return float(found)


def _card(content: Record, metric: str, path: Path) -> ProtocolCard | None:
    """The card that stands beside the metric, or nearest above it."""
    found: Any = content
    card = None
    for part in metric.split(".")[:-1]:
        found = found[part]
        card = found.get("card", card) if isinstance(found, dict) else card
    return None if card is None else ProtocolCard.from_dict(card, f"{path}, {metric}")


def _samples(content: Record, metric: str) -> dict[str, tuple[str, float]]:
    """Each sample's part in the metric; {} where the metric is none that samples have a part in."""
    parts = metric.split(".")
    if MODEL not in parts or len(parts) < 2 or parts[-1] not in AVERAGES:
        return {}
    name, factor = AVERAGES[parts[-1]]
    protocol = {own: name for name, own in OWN.items()}.get(parts[-2], parts[-2])
    return {
        record["sample_token"]: (record["scene"], factor * record[name][protocol])
        for record in content.get("samples", ())
        if record.get(name, {}).get(protocol) is not None
    }


def _parameters(path: Path) -> int | None:
    """Numbers in a safetensors file, by its header."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
