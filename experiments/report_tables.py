"""Tables of a report beside those of plans: driving, answers, captions, boxes, maps, forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.driving_scores import NAMES, NOTE
from experiments.report import ResultTable
from experiments.result_files import Result
from odvla.metrics.drivelm import DriveLMProtocol
from odvla.metrics.object_captions import METRICS

_KINDS = ("exist", "count", "object", "status", "comparison")
_CAPTIONS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
_ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
_BOXES = ("mAP", "NDS", "mATE (m)", "mASE", "mAOE (rad)", "mAVE (m/s)", "mAAE")
_MAP = ("divider", "ped_crossing", "boundary", "drivable", "mean")
_TRACKS = {"amota": "AMOTA", "amotp": "AMOTP (m)", "ids": "id switches", "recall": "recall"}
Cells = tuple[float | str | None, ...]
Rows = list[tuple[str, Cells]]


def other_tables(results: Sequence[Result]) -> list[ResultTable]:
    """All results side by side, a table for each thing that any of them was scored on."""
    return [
        *_driving_table(results),
        *_language_tables(results),
        *_object_caption_table(results),
        *_perception_tables(results),
        *_forecast_table(results),
    ]


def _driving_table(results: Sequence[Result]) -> list[ResultTable]:
    rows = []
    for result in results:
        if result.driving:
            values: list[Any] = [result.driving.get(name) for name in NAMES]
            rows.append(
                (result.name, tuple(None if value is None else 100 * value for value in values))
            )
    if not rows:
        return []
    title = "Beyond L2: what closed-loop benchmarks ask (%)"
    return [ResultTable(title, tuple(NAMES.values()), tuple(rows), note=NOTE, digits=1)]


def _language_tables(results: Sequence[Result]) -> list[ResultTable]:
    """Answers and captions of all results side by side."""
    answers, captions, drivelm = [], [], []
    for result in results:
        content = result.other or {}
        for part in (content.get(name, {}) for name in ("language", "alignment", "instruction")):
            scores = part.get("question_answering")
            if scores:
                kinds = scores["by_type"]
                cells = [kinds.get(kind) for kind in _KINDS]
                cells += [scores["by_hop"].get(hop) for hop in ("0", "1")]
                answers.append((result.name, (*cells, scores["accuracy"])))
            terms = part.get("drivelm")
            if terms:
                known = (terms[name] for name in ("accuracy", "match_f1", "language"))
                drivelm.append((result.name, (*known, "missing")))
            for kind, found in (part.get("captions") or {}).items():
                cells = [*found["bleu"], found["meteor"], found["rouge_l"], found["cider"]]
                captions.append((f"{result.name}, {kind}", tuple(cells)))
    tables = []
    if answers:
        kinds = (*_KINDS, "H0", "H1", "all")
        tables.append(ResultTable("NuScenes-QA (%)", kinds, tuple(answers), digits=1))
    if drivelm:
        columns = ("accuracy", "match F1", "language", "ChatGPT and final")
        note = DriveLMProtocol().sentence()
        tables.append(ResultTable("DriveLM", columns, tuple(drivelm), note, digits=1))
    if captions:
        tables.append(ResultTable("Captions", _CAPTIONS, tuple(captions), digits=1))
    return tables


def _object_caption_table(results: Sequence[Result]) -> list[ResultTable]:
    rows: Rows = []
    for result in results:
        for threshold, found in (result.other or {}).get("object_captions", {}).items():
            cells = [found["scores"].get(name) for name in METRICS]
            counts = (str(found["kept"]), str(found["predictions"]))
            rows.append((f"{result.name}, @{threshold}", (*cells, *counts)))
    if not rows:
        return []
    note = "TOD3Cap's m@kIoU: IoU of sizes, scores times kept / all predictions."
    columns = (*METRICS, "kept", "of")
    return [ResultTable("Captions of objects", columns, tuple(rows), note, digits=1)]


def _perception_tables(results: Sequence[Result]) -> list[ResultTable]:
    """Detection and tracking by the devkit, and the map's IoU."""
    boxes: Rows = []
    tracks: Rows = []
    maps: Rows = []
    for result in results:
        content = result.other or {}
        for part in (content, content.get("perception", {})):
            found: dict[str, Any] = part.get("detection") or {}
            if found:
                errors = [found["tp_errors"][name] for name in _ERRORS]
                boxes.append((result.name, (found["mean_ap"], found["nd_score"], *errors)))
            found = part.get("tracking") or {}
            if found:
                tracks.append((result.name, tuple(found.get(name) for name in _TRACKS)))
            found = part.get("map_iou") or {}
            if found:
                cells = (found.get(name) for name in _MAP)
                maps.append((result.name, tuple(c if c is None else 100 * c for c in cells)))
    tables = []
    if boxes:
        note = "nuscenes-devkit, detection_cvpr_2019."
        tables.append(ResultTable("Detection", _BOXES, tuple(boxes), note, digits=3))
    if tracks:
        note = "nuscenes-devkit, tracking_nips_2019."
        columns = tuple(_TRACKS.values())
        tables.append(ResultTable("Tracking", columns, tuple(tracks), note, digits=3))
    if maps:
        note = "on each model's own grid, instances of a class joined."
        tables.append(ResultTable("Map, IoU (%)", _MAP, tuple(maps), note, digits=1))
    return tables


def _forecast_table(results: Sequence[Result]) -> list[ResultTable]:
    rows: Rows = []
    for result in results:
        forecasts = (result.other or {}).get("interaction", {}).get("forecasts", {})
        for name, found in forecasts.items():
            for which in ("all", "movers"):
                score = found[which]
                missed = None if score["missed"] is None else 100 * score["missed"]
                cells = (score["min_ade_m"], score["min_fde_m"], missed, str(score["agents"]))
                label = name if name == result.name else f"{result.name}: {name}"
                rows.append((f"{label}, {which}", cells))
    if not rows:
        return []
    columns = ("minADE (m)", "minFDE (m)", "missed (%)", "n")
    note = "one hypothesis, in each agent's own frame; missed: last point more than 2 m off."
    return [ResultTable("Agent forecasts", columns, tuple(rows), note)]
