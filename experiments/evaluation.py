"""From the predictions of every stage to the tables of an experiment.

Evaluation reads only files (predictions.jsonl of each stage) and the data root, so it can be run
again at any time, and gives the same numbers however many processes wrote the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.nuscenes import EvaluationFrame, NuScenesDataModule
from datamodules.occupancy import metric_orientation
from experiments.baselines import EgoMLP, EgoMLPConfig, constant_velocity
from experiments.report import Planner, Report, ResultTable, planning_tables
from odvla.errors import UserError
from odvla.metrics.captions import score_captions
from odvla.metrics.forecasting import score_forecasts
from odvla.metrics.planning import PlanningScores, ProtocolCard, score_plans
from odvla.metrics.question_answering import Answer, score_answers
from odvla.types import WAYPOINTS, EgoState

Record = dict[str, Any]
CARDS = (ProtocolCard(l2="mean_up_to_t"), ProtocolCard(l2="value_at_t"))
CAPTION_KINDS = {
    "caption_object": "object caption (TOD3Cap)",
    "caption_map": "map caption",
    "caption_scene": "scene caption (nuCaption)",
    "caption": "scene questions (nuCaption)",
    "narration": "narration and reasoning (nuX)",
}


def read_predictions(path: Path) -> list[Record]:
    """Records of a predictions.jsonl.

    Raises:
        UserError: the file is missing, or a line of it is not JSON.
    """
    if not path.is_file():
        raise UserError(f"there are no predictions at {path}; run the stage first")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path} is not JSON: {error.msg}") from error
    return records


@dataclass(frozen=True)
class PlanningSplit:
    """Key-frames side by side: ego states [S], driven paths [S, 6, 2], masks [S, 6]."""

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    ego: EgoState
    waypoints: torch.Tensor
    mask: torch.Tensor


def planning_split(frames: Iterable[EvaluationFrame]) -> PlanningSplit:
    """Stack the key-frames of a split."""
    rows = list(frames)
    fields = {
        name: torch.cat([getattr(row.ego, name) for row in rows])
        for name in EgoState.__dataclass_fields__
    }
    return PlanningSplit(
        tokens=tuple(row.sample_token for row in rows),
        scenes=tuple(row.scene_name for row in rows),
        ego=EgoState(**fields),
        waypoints=torch.cat([row.plan.waypoints for row in rows]),
        mask=torch.cat([row.plan.mask for row in rows]),
    )


def evaluate_planning(
    data: NuScenesDataModule, records: Sequence[Record], baseline: EgoMLPConfig
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """Planning tables: the model, itself with vision zeroed, and two planners that are blind."""
    truth = planning_split(data.evaluation_frames("val"))
    by_kind = {
        kind: {record["sample_token"]: record for record in records if record["kind"] == kind}
        for kind in ("plan", "plan_blind")
    }
    if not by_kind["plan"]:
        raise UserError(
            "the planning stage wrote no plan: its predictions hold no record of kind 'plan'"
        )
    rows = [row for row, token in enumerate(truth.tokens) if token in by_kind["plan"]]
    tokens = [truth.tokens[row] for row in rows]
    driven = truth.waypoints[rows].double().numpy()
    mask = truth.mask[rows].numpy()
    occupancy = np.stack([metric_orientation(data.occupancy(token).numpy()) for token in tokens])

    def score(plans: NDArray[np.float64]) -> tuple[PlanningScores, ...]:
        return tuple(score_plans(plans, driven, mask, occupancy, card) for card in CARDS)

    planners = []
    for name, kind in (("OpenDriveVLA", "plan"), ("OpenDriveVLA, vision zeroed", "plan_blind")):
        if by_kind[kind]:
            plans, parsed = _plans(by_kind[kind], tokens)
            planners.append(Planner(name, score(plans), parsed))
    training = planning_split(data.evaluation_frames("train"))
    mlp = EgoMLP(baseline)
    mlp.fit(training.ego, training.waypoints, training.mask, list(training.scenes))
    planners.append(Planner("ego-state MLP", score(mlp.predict(truth.ego)[rows]), None))
    planners.append(Planner("constant velocity", score(constant_velocity(truth.ego)[rows]), None))
    numbers = {
        planner.name: {
            **{
                scores.card.l2: {
                    "card": scores.card.as_dict(),
                    "l2_m": scores.l2_m,
                    "l2_average_m": scores.l2_average_m,
                    "collision_percent": scores.collision_percent,
                    "collision_average_percent": scores.collision_average_percent,
                }
                for scores in planner.scores
            },
            "parsed_percent": planner.parsed_percent,
            "samples": planner.scores[0].samples,
        }
        for planner in planners
    }
    return planning_tables(planners), {"planning": numbers}


def evaluate_language(
    records: Sequence[Record], stage: str
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """NuScenes-QA accuracy and caption scores, whichever the records hold."""
    tables: list[ResultTable] = []
    numbers: dict[str, Any] = {}
    asked = [record for record in records if record["kind"] == "qa"]
    if asked:
        scores = score_answers(
            [
                Answer(
                    record["text"],
                    record["reference"],
                    record["meta"]["template_type"],
                    int(record["meta"]["num_hop"]),
                )
                for record in asked
            ]
        )
        numbers["question_answering"] = asdict(scores)
        columns = (*scores.by_type, *(f"H{hop}" for hop in scores.by_hop), "all")
        cells = (*scores.by_type.values(), *scores.by_hop.values(), scores.accuracy)
        # What one gets by always giving the most common answer of the question's type.
        floor = _majority_answers(asked)
        tables.append(
            ResultTable(
                title="NuScenes-QA accuracy (%)",
                columns=columns,
                rows=(
                    ("OpenDriveVLA", cells),
                    ("most common answer", _floor_cells(columns, floor)),
                ),
                note=f"{scores.questions} questions, raw string equality.",
                digits=1,
            )
        )
    rows = []
    for kind, name in CAPTION_KINDS.items():
        said = [record for record in records if record["kind"] == kind]
        if said:
            caption = score_captions(
                [record["text"] for record in said], [record["reference"] for record in said]
            )
            numbers.setdefault("captions", {})[kind] = asdict(caption)
            scored = (*caption.bleu, caption.rouge_l, caption.cider)
            rows.append((name, (*scored, str(caption.captions))))
    if rows:
        tables.append(
            ResultTable(
                title=f"Captions after {stage}",
                columns=("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "n"),
                rows=tuple(rows),
                note="pycocoevalcap with a pure-Python tokenizer, one reference each, x 100.",
                digits=1,
            )
        )
    return tuple(tables), numbers


def evaluate_forecasts(records: Sequence[Record]) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """Errors (minADE, minFDE) of agent trajectories, beside those of standing still."""
    agents = [record for record in records if record["kind"] == "agent" and any(record["mask"])]
    if not agents:
        return (), {}
    mask = np.array([record["mask"] for record in agents], bool)
    driven = np.where(mask[..., None], _points(record["target"] for record in agents), 0.0)
    readable = np.array([record["waypoints"] is not None for record in agents])
    standing = [[[0.0, 0.0]] * WAYPOINTS] * len(agents)
    said = _points(
        record["waypoints"] or still for record, still in zip(agents, standing, strict=True)
    )
    forecasts = {"OpenDriveVLA": (np.nan_to_num(said), readable)}
    forecasts["standing still"] = (np.zeros_like(driven), np.ones(len(agents), bool))
    scores = {
        name: score_forecasts(points, driven, mask, read)
        for name, (points, read) in forecasts.items()
    }
    moving = np.linalg.norm(driven, axis=-1).max(-1) > 1.0
    on_movers = {
        name: score_forecasts(points[moving], driven[moving], mask[moving], read[moving])
        for name, (points, read) in forecasts.items()
    }
    table = ResultTable(
        title="Agent forecasts",
        columns=("minADE (m)", "minFDE (m)", "missed (%)", "movers' minADE", "movers' minFDE"),
        rows=tuple(
            (
                name,
                (
                    score.min_ade_m,
                    score.min_fde_m,
                    100 * score.missed,
                    on_movers[name].min_ade_m,
                    on_movers[name].min_fde_m,
                ),
            )
            for name, score in scores.items()
        ),
        note=f"{len(agents)} agents that a track token was matched to, {int(moving.sum())} of them "
        "move more than 1 m; one hypothesis; missed: last point more than 2 m off.",
    )
    return (table,), {
        "forecasts": {
            name: {"all": asdict(scores[name]), "movers": asdict(on_movers[name])}
            for name in scores
        }
    }


def evaluate_detection(
    data: NuScenesDataModule, records: Sequence[Record], folder: Path
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """Detection scores (mAP, NDS) by nuscenes-devkit's own evaluator."""
    from nuscenes.nuscenes import NuScenes

    from datamodules.records import SPLITS
    from experiments.detection import evaluate_detections, global_detections

    results = {
        record["sample_token"]: global_detections(
            record["sample_token"],
            np.asarray(record["boxes"], float).reshape(-1, 9),
            record["labels"],
            record["scores"],
            data.index.frame(record["sample_token"]).lidar_to_global,
        )
        for record in records
        if record["kind"] == "detection"
    }
    if not results:
        return (), {}
    version = data.config.version
    nuscenes = NuScenes(version, dataroot=str(data.config.folder), verbose=False)
    summary = evaluate_detections(nuscenes, SPLITS[version]["val"], results, folder)
    present = {name: ap for name, ap in summary["mean_dist_aps"].items() if ap > 0}
    best = dict(sorted(present.items(), key=lambda item: -item[1])[:4])
    table = ResultTable(
        title="Detection (nuscenes-devkit)",
        columns=("mAP", "NDS", "mATE (m)", "mASE", "mAOE (rad)", *(f"AP {name}" for name in best)),
        rows=(
            (
                "OpenDriveVLA",
                (
                    summary["mean_ap"],
                    summary["nd_score"],
                    *(
                        summary["tp_errors"][key]
                        for key in ("trans_err", "scale_err", "orient_err")
                    ),
                    *best.values(),
                ),
            ),
        ),
        note=f"{len(results)} key-frames, configuration detection_cvpr_2019; the mean runs over "
        "all ten classes, those that this data lacks included.",
        digits=3,
    )
    return (table,), {"detection": summary}


def evaluate(
    experiment: str,
    data: NuScenesDataModule,
    folder: Path,
    stages: Sequence[str],
    baseline: EgoMLPConfig | None = None,
) -> Report:
    """All tables that the stages run so far give.

    Args:
        experiment: name printed above the tables.
        data: the root that the predictions were made on.
        folder: the experiment's run folder, one folder a stage inside.
        stages: which of the stages have predictions, in order.
        baseline: settings of the ego-state MLP.
    """
    tables: list[ResultTable] = []
    numbers: dict[str, Any] = {}
    scorers: Mapping[
        str, Callable[[list[Record]], tuple[tuple[ResultTable, ...], dict[str, Any]]]
    ] = {
        "planning": lambda found: evaluate_planning(data, found, baseline or EgoMLPConfig()),
        "interaction": evaluate_forecasts,
        "instruction": lambda found: evaluate_language(found, "instruction"),
        "alignment": lambda found: evaluate_language(found, "alignment"),
        "perception": lambda found: evaluate_detection(
            data, found, folder / "perception" / "detection"
        ),
    }
    for stage, scorer in scorers.items():
        if stage in stages:
            new_tables, new_numbers = scorer(read_predictions(folder / stage / "predictions.jsonl"))
            tables += new_tables
            numbers[stage] = new_numbers
    return Report(experiment, tuple(tables), numbers)


def _plans(found: Mapping[str, Record], tokens: Sequence[str]) -> tuple[NDArray[np.float64], float]:
    """Plans [S, 6, 2] in the order of tokens, and the percentage that could be read."""
    missing = [token for token in tokens if token not in found]
    if missing:
        raise UserError(f"there is no plan for sample {missing[0]} ({len(missing)} in all)")
    waypoints = [found[token]["waypoints"] for token in tokens]
    plans = np.array([w if w is not None else [[0.0, 0.0]] * WAYPOINTS for w in waypoints], float)
    return plans, 100.0 * sum(w is not None for w in waypoints) / len(waypoints)


def _points(paths: Iterable[Sequence[Sequence[float | None]]]) -> NDArray[np.float64]:
    """Paths as [S, 6, 2]; unknown coordinates (None) become NaN."""
    return np.array(
        [[[np.nan if v is None else v for v in point] for point in path] for path in paths], float
    )


def _majority_answers(asked: Sequence[Record]) -> dict[str, list[bool]]:
    """Whether the most common answer of its type would have been right, for every bucket."""
    by_type: dict[str, list[str]] = {}
    for record in asked:
        by_type.setdefault(record["meta"]["template_type"], []).append(record["reference"])
    common = {kind: max(sorted(set(said)), key=said.count) for kind, said in by_type.items()}
    right: dict[str, list[bool]] = {}
    for record in asked:
        kind = record["meta"]["template_type"]
        hit = record["reference"] == common[kind]
        for bucket in (kind, f"H{record['meta']['num_hop']}", "all"):
            right.setdefault(bucket, []).append(hit)
    return right


def _floor_cells(columns: Sequence[str], right: Mapping[str, list[bool]]) -> tuple[float, ...]:
    return tuple(100.0 * float(np.mean(right[column])) for column in columns)
