"""Reading of results.json files, and what may be compared with what.

Shape legend: S samples that two results share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.planning_evaluation import MODEL
from experiments.published_tables import PLAN_COLUMNS, published_plans
from experiments.report import ResultTable
from odvla.errors import UserError
from odvla.metrics.intervals import PairedTest, paired_by_sample
from odvla.metrics.protocol import PRESETS, ProtocolCard, refuse_to_mix
from odvla.types import WAYPOINTS

Record = dict[str, Any]
ENDS = ("1s", "2s", "3s", "avg")
NUSCENES_VAL = 6019  # key-frames of the val split
# Of a results.json: what holds more results, and what is read of a sample of plans.
GROUPS = (
    "planning",
    "driving",
    "baselines",
    "counts",
    "perception",
    "detection",
    "tracking",
    "map_iou",
    "language",
    "alignment",
    "instruction",
    "interaction",
    "object_captions",
)
SAMPLE: dict[str, Any] = {
    "sample_token": str,
    "scene": str,
    "command": str,
    "speed_mps": int | float,
    "recorded_steps": int,
    "l2_m": dict,
    "l2_avg_m": dict,
}


@dataclass(frozen=True)
class Result:
    """One planner's results: numbers by protocol, and its samples where they were kept."""

    name: str
    path: Path
    protocols: dict[str, Record]  # protocol -> numbers with their card
    samples: dict[str, Record]  # token -> record; {} where there are none
    driving: Record | None = None
    other: Record | None = None  # all that is not about plans

    def card(self, protocol: str) -> ProtocolCard:
        """The card that numbers carry.

        Raises:
            UserError: they carry none.
        """
        where = f"{self.path}, {self.name}, {protocol}"
        return ProtocolCard.from_dict(self.protocols[protocol].get("card"), where)


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results of `score` and of `test`; a folder means the results.json in it.

    Raises:
        UserError: a file is missing or holds no results, or what is read of them is missing or of
            another type.
    """
    found: list[Result] = []
    for path in paths:
        file = path / "results.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"there are no results at {file}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no results of score or test")
        _check_groups(file, content)
        of_file = _of_file(file, content)
        for result in of_file:
            _check_numbers(result)
        found += of_file
    names = [result.name for result in found]
    if len(set(names)) < len(names):  # two runs with the same rows: the folder tells them apart
        found = [
            Result(
                f"{r.path.parent.name}: {r.name}",
                r.path,
                r.protocols,
                r.samples,
                r.driving,
                r.other,
            )
            for r in found
        ]
    return found


def _check_groups(file: Path, content: Record) -> None:
    """Groups of results are objects, and samples are whole."""
    planning = content.get("planning") or {}
    groups = {name: content.get(name) for name in GROUPS}
    if isinstance(planning, dict) and "predictions" not in content:
        planners = planning.get("planning")
        groups |= {"planning.planning": planners, "planning.driving": planning.get("driving")}
        if isinstance(planners, dict):
            groups |= {f"planning.planning.{name}": found for name, found in planners.items()}
    for name, group in groups.items():
        if group is not None and not isinstance(group, dict):
            raise UserError(f"{file}: {name} holds no group of results but {group!r:.40}")
    for name in ("predictions", "name"):
        if not isinstance(content.get(name, ""), str):
            raise UserError(f"{file}: {name} is no text but {content[name]!r:.40}")
    samples = content.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(record, dict) for record in samples):
        raise UserError(f"{file}: samples is no list of records")
    for number, record in enumerate(samples):
        for name, kinds in SAMPLE.items() if "l2_m" in record else ():
            if not isinstance(record.get(name), kinds):
                which = record.get("sample_token", number)
                raise UserError(f"{file}: sample {which} has no {name}, or one of another type")


def _check_numbers(result: Result) -> None:
    """Numbers of plans are there; those that were not finite are null."""
    where = f"{result.path}, {result.name}"
    for protocol, numbers in _group(where, result.protocols).items():
        own = f"{where}, {protocol}"
        shape = ProtocolCard.from_dict(_group(own, numbers).get("card"), own).shape
        intervals = numbers.get("intervals_95") or {}
        steps = numbers.get("collision_steps")
        if not isinstance(steps, list) or len(steps) != WAYPOINTS:
            raise UserError(f"{own}: collision_steps is no list of {WAYPOINTS} numbers")
        names = [f"l2_{end}_m" for end in ENDS] + [f"{shape}_collision_{end}" for end in ENDS]
        values = {name: numbers.get(name, "") for name in names}  # a text is no number
        interval = _group(own, _group(own, intervals).get("l2_avg_m") or {})
        values |= {f"intervals_95.l2_avg_m.{name}": value for name, value in interval.items()}
        values |= {f"collision_steps.{step}": value for step, value in enumerate(steps)}
        for name, value in values.items():
            if not isinstance(value, int | float | None):
                raise UserError(f"{own}: {name} is missing or no number")
        if not isinstance(numbers.get("n_samples"), int):
            raise UserError(f"{own}: n_samples is missing or no number")


def _group(where: str, content: Any) -> Record:
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r:.40} is no group of numbers")
    return content


def _of_file(file: Path, content: Record) -> list[Result]:
    # Answers and captions are no samples of a plan.
    samples = {r["sample_token"]: r for r in content.get("samples", ()) if "l2_m" in r}
    if "predictions" in content:  # of `score`
        name = content.get("name") or Path(content["predictions"]).name
        driving = content.get("driving", {})
        own = Result(name, file, content.get("planning", {}), samples, driving.get(name), content)
        beside = content.get("baselines", {})
        return [own, *(Result(n, file, p, {}, driving.get(n)) for n, p in beside.items())]
    planning = content.get("planning", {})
    planners = planning.get("planning", {})
    if not planners and not content:
        raise UserError(f"{file} holds no results of score or test")
    driving = planning.get("driving", {})
    return [
        Result(
            name,
            file,
            numbers.get("protocols", {}),
            samples if name == MODEL else {},
            driving.get(name),
            content if name == MODEL else None,
        )
        for name, numbers in planners.items()
    ] or [Result(file.parent.name, file, {}, {}, None, content)]


def planning_tables(results: Sequence[Result]) -> list[ResultTable]:
    """One table a protocol, published rows of the same protocol among ours.

    Raises:
        UserError: numbers under one protocol's name carry different cards.
    """
    protocols = list(dict.fromkeys(name for result in results for name in result.protocols))
    published = {plans.protocol: plans for plans in published_plans()}
    tables = []
    for protocol in protocols:
        ours = [result for result in results if protocol in result.protocols]
        refuse_to_mix([(result.name, result.card(protocol)) for result in ours])
        rows: list[tuple[str, tuple[float | str | None, ...]]] = []
        for result in ours:
            numbers = result.protocols[protocol]
            shape = result.card(protocol).shape
            cells = [numbers[f"l2_{end}_m"] for end in ENDS]
            collisions = (numbers[f"{shape}_collision_{end}"] for end in ENDS)
            cells += [None if value is None else 100 * value for value in collisions]
            interval = (numbers.get("intervals_95") or {}).get("l2_avg_m") or {}
            low, high = interval.get("low"), interval.get("high")
            spread = None if low is None or high is None else f"{low:.2f} to {high:.2f}"
            rows.append((result.name, (*cells, spread, str(numbers["n_samples"]))))
        columns = (*PLAN_COLUMNS, "L2 avg, 95 %", "n")
        note = ours[0].card(protocol).sentence()
        plans = published.get(protocol)
        if plans is None or not _same_protocol(ours[0].card(protocol), PRESETS[protocol]):
            tables.append(ResultTable(f"Planning, {protocol}", columns, tuple(rows), note=note))
            continue
        published.pop(protocol)
        beside = [(f"{name} (published)", (*cells, None, "6019")) for name, cells in plans.rows]
        if all(_is_nuscenes_val(result) for result in ours):
            note += f" Published: {plans.source}."
            tables.append(
                ResultTable(f"Planning, {protocol}", columns, (*rows, *beside), note=note)
            )
            continue
        tables.append(ResultTable(f"Planning, {protocol}", columns, tuple(rows), note=note))
        apart = f"{plans.source}. The same protocol, but on nuScenes val: other data than above."
        title = f"Planning, {protocol}, published on nuScenes val"
        tables.append(ResultTable(title, columns, tuple(beside), note=apart))
    for plans in published.values():
        note = f"{plans.source}. " + (
            "No result here was scored under this protocol."
            if plans.comparable
            else "Quoted from other papers; their protocols are not known: compare with nothing."
        )
        title = f"Published: planning, {plans.protocol}"
        tables.append(ResultTable(title, PLAN_COLUMNS, plans.rows, note=note))
    return tables


def _same_protocol(card: ProtocolCard, preset: ProtocolCard) -> bool:
    """Equal but for what the planner was told."""
    return replace(card, ego_status=preset.ego_status) == preset


def _is_nuscenes_val(result: Result) -> bool:
    """Whether the split is the one that papers print; a town has another size."""
    counts = (result.other or {}).get("counts", {})
    return (counts.get("in_split") or len(result.samples)) == NUSCENES_VAL


@dataclass(frozen=True)
class Comparison:
    """Two results on the samples that both have."""

    first: str
    second: str
    protocol: str
    test: PairedTest


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Paired tests of every later result against the first, under the protocols both have.

    Raises:
        UserError: the two cards of a protocol differ.
    """
    with_samples = [result for result in results if result.samples]
    found = []
    for other in with_samples[1:]:
        first = with_samples[0]
        for protocol in first.protocols:
            if protocol not in other.protocols:
                continue
            refuse_to_mix([(first.name, first.card(protocol)), (other.name, other.card(protocol))])
            own, others = (
                {
                    token: record["l2_avg_m"][protocol]
                    for token, record in result.samples.items()
                    # Null: it was not finite, and has no difference to anything.
                    if record["l2_avg_m"].get(protocol) is not None
                }
                for result in (first, other)
            )
            scene_of = {token: record["scene"] for token, record in first.samples.items()}
            test = paired_by_sample(own, others, scene_of)
            if test is not None:
                found.append(Comparison(first.name, other.name, protocol, test))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> ResultTable:
    """How far apart results are, and how sure that is."""
    rows = []
    for found in comparisons:
        difference = found.test.difference
        rows.append(
            (
                f"{found.second} - {found.first}, {found.protocol}",
                (
                    difference.value,
                    f"{difference.low:+.3f} to {difference.high:+.3f}",
                    f"{found.test.p_value:.4f}",
                    str(found.test.samples),
                    str(difference.scenes),
                ),
            )
        )
    return ResultTable(
        "Paired comparison, average L2 (m)",
        ("difference", "95 %", "p", "samples", "scenes"),
        tuple(rows),
        note="on the samples that both have; scenes resampled whole; p: signs of whole scenes "
        "flipped. Below zero, the second is better.",
        digits=3,
    )
