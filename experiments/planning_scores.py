"""Planners side by side under any number of protocols, per sample and put together.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.planning_truth import GroundTruthCheck, PlanningTruth
from experiments.report import ResultTable
from odvla.errors import UserError
from odvla.metrics.intervals import Interval, PairedTest, bootstrap_steps, paired_by_sample
from odvla.metrics.planning import (
    SECONDS,
    STEPS_PER_SECOND,
    PlanningMetric,
    PlanningSamples,
    PlanningScores,
    counted_steps,
    judged_hits,
    over_time,
)
from odvla.metrics.protocol import PRESETS, ProtocolCard
from odvla.types import WAYPOINTS

STANDING_STILL = [[0.0, 0.0]] * WAYPOINTS
MISSING = "missing"


@dataclass(frozen=True)
class PlanSet:
    """Plans of one planner for the key-frames of a split.

    `failures` says for which rows there is no usable plan, and why; their points are 0.
    """

    name: str
    points: Tensor  # [S, 6, 2] float64 metres, LIDAR_TOP at t0
    failures: Mapping[int, str] = field(default_factory=dict)
    ego_status: str = "not stated"

    @classmethod
    def complete(cls, name: str, points: Any, ego_status: str = "used") -> PlanSet:
        """Plans that are all there."""
        return cls(name, torch.as_tensor(points, dtype=torch.float64), {}, ego_status)

    @property
    def readable_percent(self) -> float:
        """Share of the plans made that could be read; missing ones were not made."""
        made = len(self.points) - sum(why == MISSING for why in self.failures.values())
        bad = sum(why != MISSING for why in self.failures.values())
        return 100.0 * (made - bad) / made if made else 0.0

    def used_rows(self, card: ProtocolCard) -> list[int]:
        """Rows that a protocol scores.

        Raises:
            UserError: the protocol accepts no missing or unreadable plan, and there is one.
        """
        used = []
        for row in range(len(self.points)):
            why = self.failures.get(row)
            policy = card.missing if why == MISSING else card.unreadable
            if why is None or policy == "standing_still":
                used.append(row)
            elif policy == "stop":
                raise UserError(
                    f"{self.name}: {len(self.failures)} plans are missing or cannot be read (the "
                    f"first: {why}), and this protocol stops there, as the code it is named after"
                )
        return used


@dataclass(frozen=True)
class Scored:
    """One planner under one protocol."""

    scores: PlanningScores
    samples: PlanningSamples
    scenes: tuple[str, ...]  # [S] of the samples

    def intervals(self) -> dict[str, Interval]:
        """Bootstrap intervals over scenes of the averages that papers print."""
        card = self.scores.card
        found = {}
        for name, values, counted, convention in zip(
            ("l2_avg_m", f"{card.shape}_collision_avg"),
            (self.samples.l2_m, judged_hits(self.samples, card)),
            counted_steps(self.samples.mask, card),
            (card.l2, card.collision),
            strict=True,
        ):
            if card.samples == "reference":  # steps that do not count are 0, and divided by
                values, counted = torch.where(counted, values, 0.0), torch.ones_like(counted)
            average = partial(_average, convention=convention)
            found[name] = bootstrap_steps(values.numpy(), counted.numpy(), self.scenes, average)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        intervals = {name: asdict(found) for name, found in self.intervals().items()}
        return {**self.scores.as_dict(), "intervals_95": intervals}


def _average(steps: np.ndarray, convention: str) -> np.ndarray:
    """Mean over 1, 2 and 3 s [...] of means of the steps [..., 6], as PlanningScores has it."""
    return over_time(torch.from_numpy(steps), convention).nanmean(-1).numpy()


def per_sample(
    samples: PlanningSamples, card: ProtocolCard
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each sample's average L2 [S] and collision [S] as the protocol puts steps together; counted.

    Means over samples of these are the table's averages, exactly for "reference" and
    "complete_only"; for "valid_steps" the table divides step by step, here a sample's own recorded
    steps are put together. NaN where it has none for any of 1, 2 and 3 s.
    """
    l2_counted, hit_counted = counted_steps(samples.mask, card)
    hits = judged_hits(samples, card)
    l2 = _combined(samples.l2_m, l2_counted, card.l2, card.samples == "reference")
    collision = _combined(hits, hit_counted, card.collision, card.samples == "reference")
    counted = hit_counted.any(1).numpy()
    return l2.numpy(), collision.numpy(), counted


def averages_by_sample(scored: Scored) -> tuple[dict[str, float], dict[str, float]]:
    """`per_sample` by sample token, of the samples that count: L2 (m) and collision (0 to 1)."""
    l2, collision, counted = per_sample(scored.samples, scored.scores.card)

    def known(values: np.ndarray) -> dict[str, float]:
        kept = counted & ~np.isnan(values)
        names = np.array(scored.samples.names)[kept].tolist()
        return dict(zip(names, values[kept].tolist(), strict=True))

    return known(l2), known(collision)


def _combined(values: Tensor, counted: Tensor, convention: str, reference: bool) -> Tensor:
    """Values [S, 6] -> [S]: the mean over 1, 2, 3 s of the value at t or the mean up to t."""
    kept = torch.where(counted, values, 0.0)
    parts, known = [], []
    for second in SECONDS:
        end = STEPS_PER_SECOND * second
        here = slice(0, end) if convention == "mean_up_to_t" else slice(end - 1, end)
        count = counted[:, here].sum(1)
        divisor = torch.full_like(count, end if convention == "mean_up_to_t" else 1)
        parts.append(kept[:, here].sum(1) / (divisor if reference else count.clamp_min(1)))
        known.append(torch.ones_like(count, dtype=torch.bool) if reference else count > 0)
    weight = torch.stack(known).double()
    return (torch.stack(parts) * weight).sum(0) / weight.sum(0)


def score_planners(
    truth: PlanningTruth,
    planners: Sequence[PlanSet],
    protocols: Mapping[str, ProtocolCard],
) -> dict[str, dict[str, Scored]]:
    """Every planner under every protocol: planner name -> protocol name -> scores.

    The ground truth is scored against itself on the way, before the plans.

    Raises:
        UserError: the check of the ground truth fails, or a protocol does not accept a planner's
            failures.
    """
    check = GroundTruthCheck(protocols)
    used = {
        (planner.name, name): set(planner.used_rows(card))
        for planner in planners
        for name, card in protocols.items()
    }
    metrics = {
        (planner.name, name): PlanningMetric(_told(card, planner), sync_on_compute=False)
        for planner in planners
        for name, card in protocols.items()
    }
    mask = truth.split.mask
    for here, traffic in truth.chunks(protocols.values()):
        for name, card in protocols.items():
            around = traffic(card)
            driven = truth.driven(card)
            check.add(name, truth.split.tokens[here], driven[here], mask[here], around)
            for planner in planners:
                rows = [r for r in range(here.start, here.stop) if r in used[planner.name, name]]
                if not rows:
                    continue
                local = torch.tensor(rows) - here.start
                metrics[planner.name, name].update(
                    [truth.split.tokens[row] for row in rows],
                    planner.points[rows],
                    driven[rows],
                    mask[rows],
                    _some(around, local),
                )
    scene_of = dict(zip(truth.split.tokens, truth.split.scenes, strict=True))
    found: dict[str, dict[str, Scored]] = {}
    for (planner_name, name), metric in metrics.items():
        if not used[planner_name, name]:
            raise UserError(f"{planner_name}: there is no plan that {name!r} could score")
        try:
            scores, samples = metric.scores(), metric.samples()
        except ValueError as error:
            raise UserError(f"{planner_name} under {name!r}: {error}") from error
        scenes = tuple(scene_of[token] for token in samples.names)
        found.setdefault(planner_name, {})[name] = Scored(scores, samples, scenes)
    return found


def _told(card: ProtocolCard, planner: PlanSet) -> ProtocolCard:
    return replace(card, ego_status=planner.ego_status)


def _some(traffic: Any, rows: Tensor) -> Any:
    """The traffic of some samples."""
    parts = {name: None if value is None else value[rows] for name, value in vars(traffic).items()}
    return type(traffic)(**parts)


def planning_tables(
    found: Mapping[str, Mapping[str, Scored]],
    readable: Mapping[str, float | None],
) -> tuple[ResultTable, ...]:
    """One table a protocol, because numbers of different cards must not share a column.

    Args:
        found: planner name -> protocol name -> scores.
        readable: planner name -> percentage of readable plans; None: it writes no text.
    """
    titles = {
        PRESETS["odvla_stp3"]: "Planning, mean up to t (ST-P3, VAD): L2 in m, collisions in %",
        PRESETS["odvla_uniad"]: "Planning, value at t (UniAD): L2 in m, collisions in %",
    }
    tables = []
    protocols = next(iter(found.values()))
    for name in protocols:
        rows = []
        for planner, by_protocol in found.items():
            scores = by_protocol[name].scores
            average = 100 * scores.collision_average
            rows.append(
                (
                    planner,
                    (
                        *scores.l2_m,
                        scores.l2_average_m,
                        *scores.collision_percent,
                        average,
                        readable.get(planner),
                    ),
                )
            )
        first = protocols[name].scores
        title = titles.get(PRESETS[name], f"Planning, {name}: L2 in m, collisions in %")
        tables.append(
            ResultTable(
                title=title,
                columns=(
                    *("L2 1s", "2s", "3s", "avg"),
                    *("col 1s", "2s ", "3s ", "avg "),
                    "parsed",
                ),
                rows=tuple(rows),
                note=f"{first.samples} samples; {first.card.sentence()}",
            )
        )
    return tuple(tables)


@dataclass(frozen=True)
class PairedScores:
    """How much less a planner has than another, on the samples that a protocol scores of both."""

    other: str
    l2_m: PairedTest
    collision: PairedTest  # a share of 1


def paired_scores(
    found: Mapping[str, Mapping[str, Scored]], planner: str, protocol: str
) -> list[PairedScores]:
    """A planner less every other one, each sample with its own averages (`per_sample`).

    Args:
        found: planner name -> protocol name -> scores.
        planner: that is compared with the others.
        protocol: under which.
    """
    mine, tests = averages_by_sample(found[planner][protocol]), []
    for name, by_protocol in found.items():
        if name == planner:
            continue
        other = by_protocol[protocol]
        scene_of = dict(zip(other.samples.names, other.scenes, strict=True))
        l2, collision = (
            paired_by_sample(theirs, own, scene_of)
            for theirs, own in zip(averages_by_sample(other), mine, strict=True)
        )
        if l2 is not None and collision is not None:
            tests.append(PairedScores(name, l2, collision))
    return tests


def paired_table(planner: str, tests: Sequence[PairedScores], title: str) -> ResultTable:
    """How far a planner is from the others, and how sure that is."""

    def cells(test: PairedTest, scale: int, digits: int) -> tuple[str, str, str]:
        low, value, high = (scale * getattr(test.difference, k) for k in ("low", "value", "high"))
        p_value = f"{test.p_value:.3f}" if test.p_value >= 0.0005 else "<.001"
        return f"{value:+.{digits}f}", f"{low:+.2f},{high:+.2f}", p_value

    first = tests[0].l2_m
    return ResultTable(
        title=title,
        columns=("L2", "95 %", "p", "col", "95 % ", "p "),
        rows=tuple(
            (
                test.other.replace(f"{planner},", "itself,"),
                (*cells(test.l2_m, 1, 3), *cells(test.collision, 100, 2)),
            )
            for test in tests
        ),
        note=f"{first.samples} samples, each with the average of its recorded steps; "
        f"{first.difference.scenes} scenes, resampled whole; p: signs of whole scenes flipped. "
        f"Below zero {planner} is better; of trainings with other seeds it says nothing.",
    )


def sample_records(
    truth: PlanningTruth, planner: PlanSet, by_protocol: Mapping[str, Scored]
) -> list[dict[str, Any]]:
    """One record a key-frame, failures and missing plans among them."""
    commands, speeds = truth.split.commands, truth.split.speeds_mps
    hits: dict[str, dict[str, list[bool]]] = {}
    l2: dict[str, dict[str, list[float]]] = {}
    averages: dict[str, dict[str, float]] = {}
    collisions: dict[str, dict[str, float]] = {}
    for name, scored in by_protocol.items():
        tokens = scored.samples.names
        hits[name] = dict(zip(tokens, scored.samples.hits.tolist(), strict=True))
        l2[scored.scores.card.driven] = dict(zip(tokens, scored.samples.l2_m.tolist(), strict=True))
        averages[name], collisions[name] = averages_by_sample(scored)
    records = []
    for row, token in enumerate(truth.split.tokens):
        records.append(
            {
                "sample_token": token,
                "scene": truth.split.scenes[row],
                "command": commands[row],
                "speed_mps": round(speeds[row], 4),
                "failure": planner.failures.get(row),
                "plan": None if row in planner.failures else planner.points[row].tolist(),
                "recorded_steps": int(truth.split.mask[row].sum()),
                "l2_m": {point: found[token] for point, found in l2.items() if token in found},
                "l2_avg_m": {name: v[token] for name, v in averages.items() if token in v},
                "collision_avg": {name: v[token] for name, v in collisions.items() if token in v},
                "collision": {name: found[token] for name, found in hits.items() if token in found},
            }
        )
    return records
