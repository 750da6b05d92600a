"""From the predictions of every stage to the tables of an experiment.

Evaluation reads only files (predictions.jsonl of each stage) and the data root, so it can be run
again at any time, and gives the same numbers however many processes wrote the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.language_files import read_json_lines
from datamodules.nuscenes import NuScenesDataModule
from experiments.baselines import EgoMLPConfig
from experiments.planning_evaluation import MODEL, evaluate_planning
from experiments.report import Report, ResultTable
from experiments.score_drivelm import evaluate_drivelm
from experiments.score_omnidrive import evaluate_omnidrive_plans
from odvla.errors import UserError
from odvla.metrics.captions import score_captions, score_nux, start_meteor
from odvla.metrics.forecasting import score_by_class, score_forecasts
from odvla.metrics.map_segmentation import map_iou
from odvla.metrics.question_answering import Answer, score_answers
from odvla.types import WAYPOINTS

Record = dict[str, Any]
CAPTION_KINDS = {
    "caption_object": "object caption (TOD3Cap)",
    "caption_map": "map caption",
    "caption_scene": "scene caption (nuCaption)",
    "caption": "scene questions (nuCaption)",
    "narration": "narration and reasoning (nuX)",
    "drivelm": "questions (DriveLM)",
    "omnidrive": "descriptions and questions (OmniDrive)",
}


def read_predictions(path: Path) -> list[Record]:
    """Records of a predictions.jsonl.

    Raises:
        UserError: the file is missing, or a line of it is not JSON.
    """
    if not path.is_file():
        raise UserError(f"there are no predictions at {path}; run the stage first")
    return [record for _, record in read_json_lines(path)]


def evaluate_language(
    records: Sequence[Record], stage: str, *, planner: str = MODEL, meteor: bool = False
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """NuScenes-QA accuracy, DriveLM's and caption scores, whichever the records hold.

    Args:
        records: answers and captions with their references.
        stage: named above the captions.
        planner: whose answers they are.
        meteor: of all captions, where there is Java; else of nuX alone.
    """
    tables: list[ResultTable] = []
    numbers: dict[str, Any] = {}
    asked = [record for record in records if record["kind"] == "qa" and record["reference"]]
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
                    (planner, cells),
                    ("most common answer", _floor_cells(columns, floor)),
                ),
                note=f"{scores.questions} questions, raw string equality.",
                digits=1,
            )
        )
    drivelm, terms = evaluate_drivelm(records)
    tables += drivelm
    numbers |= terms
    rows = []
    for kind, name in CAPTION_KINDS.items():
        # DriveLM holds the answers of val back.
        said = [record for record in records if record["kind"] == kind and record["reference"]]
        if said:
            texts = [record["text"] for record in said]
            references = [record["reference"] for record in said]
            found = {name: score_captions(texts, references, meteor=meteor)}
            if kind == "narration":  # the one data set whose papers print METEOR
                parts = score_nux(texts, references)
                found = {
                    "nuX, narration": parts.narration,
                    "nuX, reasoning": parts.reasoning,
                    name: parts.joined,
                }
                numbers["nux"] = asdict(parts)
            numbers.setdefault("captions", {})[kind] = asdict(found[name])
            for part, caption in found.items():
                scored = (*caption.bleu, caption.meteor, caption.rouge_l, caption.cider)
                rows.append((part, (*scored, str(caption.captions))))
    if rows:
        tables.append(
            ResultTable(
                title=f"Captions after {stage}",
                columns=("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "n"),
                rows=tuple(rows),
                note="pycocoevalcap, its tokenizer in Python, one reference each, x 100; METEOR"
                + (" where there is Java." if meteor else ": nuX alone, where there is Java."),
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
    classes = [record.get("meta", {}).get("class", "any") for record in agents]
    by_class = {
        name: score_by_class(points, driven, mask, read, classes)
        for name, (points, read) in forecasts.items()
    }
    per_class = ResultTable(
        title="Agent forecasts by class",
        columns=(
            "minADE (m)",
            "minFDE (m)",
            "missed (%)",
            "standing minADE",
            "standing minFDE",
            "n",
        ),
        rows=tuple(
            (
                name,
                (
                    score.min_ade_m,
                    score.min_fde_m,
                    100 * score.missed,
                    by_class["standing still"][name].min_ade_m,
                    by_class["standing still"][name].min_fde_m,
                    str(score.agents),
                ),
            )
            for name, score in by_class["OpenDriveVLA"].items()
        ),
        note="in each agent's own frame at t0; six steps of 0.5 s.",
    )
    return (table, per_class), {
        "forecasts": {
            name: {
                "all": asdict(scores[name]),
                "movers": asdict(on_movers[name]),
                "by_class": {kind: asdict(score) for kind, score in by_class[name].items()},
            }
            for name in scores
        }
    }


def evaluate_perception(
    data: NuScenesDataModule, records: Sequence[Record], folder: Path, *, tracking: bool = False
) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
    """Detection (mAP, NDS) and tracking by nuscenes-devkit's own evaluators, and the map's IoU.

    Args:
        data: the root that the predictions were made on.
        records: of predictions.jsonl.
        folder: the evaluators write here.
        tracking: with tracking, which takes the evaluator minutes on large splits.
    """
    tables: list[ResultTable] = []
    numbers: dict[str, Any] = {}
    found = [record for record in records if record["kind"] == "detection"]
    if found:
        new_tables, numbers = _devkit_scores(data, found, folder, tracking=tracking)
        tables += new_tables
    cells = [record for record in records if record["kind"] == "map"]
    if cells:
        iou = map_iou(cells)
        numbers["map_iou"] = iou
        values = tuple(None if value is None else 100 * value for value in iou.values())
        tables.append(
            ResultTable(
                title="Map, IoU (%)",
                columns=tuple(iou),
                rows=(("OpenDriveVLA", values),),
                note=f"{len(cells)} key-frames, on the model's own grid, instances of a class "
                "joined.",
                digits=1,
            )
        )
    return tuple(tables), numbers


def _devkit_scores(
    data: NuScenesDataModule, found: Sequence[Record], folder: Path, *, tracking: bool
) -> tuple[list[ResultTable], dict[str, Any]]:
    from nuscenes.nuscenes import NuScenes

    from datamodules.records import SPLITS
    from experiments.detection import evaluate_detections, global_detections
    from experiments.tracking_scores import evaluate_tracks, global_tracks

    results, tracks = {}, {}
    for record in found:
        frame = data.index.frame(record["sample_token"])
        results[frame.token] = global_detections(
            frame.token,
            np.asarray(record["boxes"], float).reshape(-1, 9),
            record["labels"],
            record["scores"],
            frame.lidar_to_global,
        )
        order = np.argsort(-np.asarray(record["scores"]), kind="stable")
        ids = record.get("track_ids", [-1] * len(order))
        ordered = [ids[place] for place in order][: len(results[frame.token])]
        scene = data.index.scenes[frame.scene].name
        tracks[frame.token] = global_tracks(results[frame.token], ordered, scene)
    version = data.config.version
    nuscenes = NuScenes(version, dataroot=str(data.config.folder), verbose=False)
    split = SPLITS[version]["val"]
    summary = evaluate_detections(nuscenes, split, results, folder)
    tables, numbers = [detection_table(summary, len(results))], {"detection": summary}
    if tracking:
        scores = evaluate_tracks(nuscenes, split, tracks, folder / "tracking")
        numbers["tracking"] = scores
        tables.append(tracking_table(scores, len(tracks)))
    return tables, numbers


def detection_table(summary: Mapping[str, Any], frames: int, planner: str = MODEL) -> ResultTable:
    """The devkit's detection summary; four best classes."""
    present = {name: ap for name, ap in summary["mean_dist_aps"].items() if ap > 0}
    best = dict(sorted(present.items(), key=lambda item: -item[1])[:4])
    errors = (summary["tp_errors"][key] for key in ("trans_err", "scale_err", "orient_err"))
    return ResultTable(
        title="Detection (nuscenes-devkit)",
        columns=("mAP", "NDS", "mATE (m)", "mASE", "mAOE (rad)", *(f"AP {name}" for name in best)),
        rows=((planner, (summary["mean_ap"], summary["nd_score"], *errors, *best.values())),),
        note=f"{frames} key-frames, configuration detection_cvpr_2019; the mean runs over "
        "all ten classes, those that this data lacks included.",
        digits=3,
    )


def tracking_table(scores: Mapping[str, Any], frames: int, planner: str = MODEL) -> ResultTable:
    """The devkit's tracking summary."""
    columns = ("amota", "amotp", "ids", "recall", "mota")
    return ResultTable(
        title="Tracking (nuscenes-devkit)",
        columns=("AMOTA", "AMOTP (m)", "id switches", "recall", "MOTA"),
        rows=((planner, tuple(scores.get(name) for name in columns)),),
        note=f"{frames} key-frames, configuration tracking_nips_2019, mean over seven classes.",
        digits=3,
    )


def evaluate(
    experiment: str,
    data: NuScenesDataModule,
    folder: Path,
    stages: Sequence[str],
    baseline: EgoMLPConfig | None = None,
    protocols: Sequence[str] = (),
    *,
    beyond: bool = False,
) -> Report:
    """All tables that the stages run so far give.

    Args:
        experiment: name printed above the tables.
        data: the root that the predictions were made on.
        folder: the experiment's run folder, one folder a stage inside.
        stages: which of the stages have predictions, in order.
        baseline: settings of the ego-state MLP.
        protocols: further protocols for plans.
        beyond: plans with the open-loop approximations of closed-loop scores.
    """
    tables: list[ResultTable] = []
    numbers: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []

    def planning(found: list[Record]) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
        result = evaluate_planning(
            data, found, baseline or EgoMLPConfig(), protocols, beyond=beyond
        )
        samples.extend(result.samples)
        return result.tables, result.numbers

    def instruction(found: list[Record]) -> tuple[tuple[ResultTable, ...], dict[str, Any]]:
        told, numbers = evaluate_language(found, "instruction")
        plans, scores = evaluate_omnidrive_plans(data, found, paths["instruction"])
        return (*told, *plans), numbers | scores

    scorers: Mapping[
        str, Callable[[list[Record]], tuple[tuple[ResultTable, ...], dict[str, Any]]]
    ] = {
        "planning": planning,
        "interaction": evaluate_forecasts,
        "instruction": instruction,
        "alignment": lambda found: evaluate_language(found, "alignment"),
        "perception": lambda found: evaluate_perception(
            data, found, folder / "perception" / "detection", tracking=beyond
        ),
    }
    paths = {stage: folder / stage / "predictions.jsonl" for stage in stages}
    told = read_predictions(paths["instruction"]) if "instruction" in paths else []
    if any(record["kind"] == "narration" for record in told):
        start_meteor()  # it is ready when the plans are scored
    for stage, scorer in scorers.items():
        if stage in paths:
            found = told if stage == "instruction" else read_predictions(paths[stage])
            new_tables, new_numbers = scorer(found)
            tables += new_tables
            numbers[stage] = new_numbers
    return Report(experiment, tuple(tables), numbers, samples)


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
