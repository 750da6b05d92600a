"""The planning tables of an experiment: the model, the model without its parts, blind planners.

| row | what it tells |
|---|---|
| vision zeroed, vision of another sample | whether the cameras matter |
| no ego state, no history, no command | what else does (the paper's Table IV, at the test alone) |
| ego-state MLP | what the ego state alone is worth, trained on the same split |
| constant velocity, acceleration, turn rate | what no learning at all is worth |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from datamodules.nuscenes import NuScenesDataModule
from experiments.baselines import (
    EgoMLP,
    EgoMLPConfig,
    constant_acceleration,
    constant_turn_rate,
    constant_velocity,
)
from experiments.planning_scores import (
    STANDING_STILL,
    PlanSet,
    Scored,
    paired_scores,
    paired_table,
    planning_tables,
    sample_records,
    score_planners,
)
from experiments.planning_truth import PlanningTruth, planning_split
from experiments.report import ResultTable
from odvla.errors import UserError
from odvla.language.waypoints import ParseFailure, reference_repair
from odvla.metrics.protocol import protocols_of
from stages.plan_ablations import KIND_OF

Record = dict[str, Any]
MODEL = "OpenDriveVLA"
ROWS = {
    "plan": MODEL,
    KIND_OF["no_vision"]: f"{MODEL}, vision zeroed",
    KIND_OF["other_vision"]: f"{MODEL}, vision of another sample",
    KIND_OF["no_ego"]: f"{MODEL}, no ego state",
    KIND_OF["no_history"]: f"{MODEL}, no history",
    KIND_OF["no_command"]: f"{MODEL}, no command",
}
# The two tables that are always made; sweeps and older results know them by these names.
OWN = {"odvla_stp3": "mean_up_to_t", "odvla_uniad": "value_at_t"}
COMPARED = "odvla_stp3"  # of them: under which planners are tested against each other


@dataclass(frozen=True)
class PlanningResult:
    """Tables, numbers for results.json, and one record a key-frame of the model itself."""

    tables: tuple[ResultTable, ...]
    numbers: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


def evaluate_planning(
    data: NuScenesDataModule,
    records: Sequence[Record],
    baseline: EgoMLPConfig,
    protocols: Sequence[str] = (),
    *,
    beyond: bool = False,
) -> PlanningResult:
    """Score the plans of a planning stage, and all rows that stand beside them.

    Args:
        data: the root that the predictions were made on.
        records: of predictions.jsonl.
        baseline: settings of the ego-state MLP.
        protocols: names of presets, beside the two tables that are always made.
        beyond: with the open-loop approximations of closed-loop scores.

    Raises:
        UserError: there is no plan, or not the same key-frames have plans of every kind.
    """
    by_kind: dict[str, dict[str, Record]] = {kind: {} for kind in ROWS}
    for record in records:
        if record["kind"] in by_kind:
            by_kind[record["kind"]][record["sample_token"]] = record
    if not by_kind["plan"]:
        raise UserError(
            "the planning stage wrote no plan: its predictions hold no record of kind 'plan'"
        )
    everything = PlanningTruth.of(data)
    rows = [r for r, token in enumerate(everything.split.tokens) if token in by_kind["plan"]]
    truth = everything.rows(rows)
    cards = protocols_of((*OWN, *protocols))
    repair = any(card.parse == "repair" for card in cards.values())
    model = [
        model_plans(ROWS[kind], found, truth.split.tokens, kind)
        for kind, found in by_kind.items()
        if found
    ]
    planners = [*model, *blind_planners(data, truth, baseline)]
    found = score_planners(truth, planners, {n: c for n, c in cards.items() if c.parse == "strict"})
    if repair:
        mended = [
            model_plans(ROWS[kind], kept, truth.split.tokens, kind, repair=True)
            for kind, kept in by_kind.items()
            if kept
        ]
        others = planners[len(model) :]
        lenient = {n: c for n, c in cards.items() if c.parse == "repair"}
        for name, scored in score_planners(truth, [*mended, *others], lenient).items():
            found[name] |= scored
    readable: dict[str, float | None] = {p.name: p.readable_percent for p in model}
    tables = planning_tables(found, readable)
    numbers = {name: _numbers(scored, readable.get(name)) for name, scored in found.items()}
    tests = paired_scores(found, MODEL, COMPARED)
    if tests:
        title = f"{MODEL} less the others, mean up to t: L2 in m, collisions in %"
        tables = (*tables, paired_table(MODEL, tests, title))
    for test in tests:
        numbers[test.other]["model_less_this"] = {
            "protocol": COMPARED,
            "l2_avg_m": asdict(test.l2_m),
            "collision_avg": asdict(test.collision),
        }
    samples = sample_records(truth, model[0], found[MODEL])
    result: dict[str, Any] = {"planning": numbers}
    if beyond:
        from experiments.driving_scores import score_driving

        table, driving, by_sample = score_driving(truth, planners)
        tables = (*tables, table)
        result["driving"] = driving
        for record in samples:
            record["driving"] = by_sample[MODEL].get(record["sample_token"])
    return PlanningResult(tables, result, samples)


def blind_planners(
    data: NuScenesDataModule, truth: PlanningTruth, baseline: EgoMLPConfig
) -> list[PlanSet]:
    """Planners that never see an image, for the key-frames of `truth`.

    Raises:
        UserError: there is no train split that the ego-state MLP could learn from.
    """
    frames = list(data.evaluation_frames("train"))
    if not frames:
        raise UserError(f"{data.config.folder} has no key-frame of the train split")
    training = planning_split(frames)
    mlp = EgoMLP(baseline)
    mlp.fit(training.ego, training.waypoints, training.mask, list(training.scenes))
    learned = PlanSet.complete("ego-state MLP", mlp.predict(truth.split.ego))
    return [learned, *extrapolations(truth)]


def extrapolations(truth: PlanningTruth) -> list[PlanSet]:
    """Planners that go on as the car moves, for the key-frames of `truth`."""
    ego = truth.split.ego
    return [
        PlanSet.complete("constant velocity", constant_velocity(ego)),
        PlanSet.complete("constant acceleration", constant_acceleration(ego)),
        PlanSet.complete("constant turn rate", constant_turn_rate(ego)),
    ]


def model_plans(
    name: str,
    found: Mapping[str, Record],
    tokens: Sequence[str],
    kind: str,
    *,
    repair: bool = False,
) -> PlanSet:
    """Plans of one kind in the order of tokens.

    Args:
        name: of the planner.
        found: its records by sample token.
        tokens: key-frames.
        kind: of the records.
        repair: mend texts that could not be read, as the released code does (only where texts
            write positions).

    Raises:
        UserError: a key-frame has no plan of this kind.
    """
    missing = [token for token in tokens if token not in found]
    if missing:
        raise UserError(
            f"there is no {kind} for sample {missing[0]} ({len(missing)} in all), but other plans"
        )
    points, failures = [], {}
    for row, token in enumerate(tokens):
        record = found[token]
        plan = record["waypoints"]
        if plan is None and repair and record.get("meta", {}).get("form", "points") == "points":
            mended = reference_repair(record.get("text") or "")
            plan = None if isinstance(mended, ParseFailure) else mended.xy.tolist()
        if plan is None:
            failures[row] = record.get("failure") or "the text is no plan"
        points.append(plan if plan is not None else STANDING_STILL)
    status = "hidden" if kind == KIND_OF["no_ego"] else "used"
    return PlanSet(name, torch.tensor(points, dtype=torch.float64), failures, status)


def _numbers(by_protocol: Mapping[str, Scored], parsed_percent: float | None) -> dict[str, Any]:
    """One planner's entry in results.json."""
    own = {}
    for protocol, name in OWN.items():
        scores = by_protocol[protocol].scores
        own[name] = {
            "card": scores.card.as_dict(),
            "l2_m": scores.l2_m,
            "l2_average_m": scores.l2_average_m,
            "collision_percent": scores.collision_percent,
            "collision_average_percent": 100 * scores.collision_average,
        }
    return {
        **own,
        "protocols": {name: scored.as_dict() for name, scored in by_protocol.items()},
        "parsed_percent": parsed_percent,
        "samples": by_protocol["odvla_stp3"].scores.samples,
    }
