"""The open-loop approximations of closed-loop scores, for planners side by side.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.map_raster import drivable_area
from datamodules.occupancy import OCCUPANCY_GRID, VEHICLES
from experiments.planning_scores import PlanSet
from experiments.planning_truth import CHUNK, PlanningTruth
from experiments.report import ResultTable
from odvla.errors import UserError
from odvla.metrics.driving import Surroundings, judge
from odvla.types import DETECTION_CLASSES

NAMES = {
    "no_fault_collision": "no fault",
    "drivable_area": "on road",
    "time_to_collision": "distance",
    "comfort": "comfort",
    "progress": "progress",
    "composite": "composite",
}
NOTE = (
    "open-loop approximations of nuPlan's and NAVSIM's scores, per cent: others drive as recorded, "
    "plans are taken as driven; 2 Hz; unusable plans are left out."
)
ROAD_USERS = [DETECTION_CLASSES.index(name) for name in (*VEHICLES, "pedestrian")]
PerSample = dict[str, dict[str, dict[str, float]]]


def score_driving(
    truth: PlanningTruth, planners: Sequence[PlanSet], *, with_map: bool = True
) -> tuple[ResultTable, dict[str, Any], PerSample]:
    """Scores of every planner, and of the driven path itself.

    Returns:
        The table; planner -> score -> mean; planner -> sample token -> score -> value.
    """
    driven = PlanSet.complete("driven path", truth.split.waypoints)
    everybody = [*planners, driven]
    rows: dict[str, dict[str, list[float]]] = {p.name: {} for p in everybody}
    for start in range(0, len(truth.split.tokens), CHUNK):
        here = slice(start, min(start + CHUNK, len(truth.split.tokens)))
        around = surroundings(truth, here, with_map=with_map)
        for planner in everybody:
            found = judge(planner.points[here].double(), around)
            for name, values in found.as_rows().items():
                rows[planner.name].setdefault(name, []).extend(values.tolist())
    numbers: dict[str, Any] = {}
    per_sample: PerSample = {}
    for planner in everybody:
        used = [row for row in range(len(truth.split.tokens)) if row not in planner.failures]
        kept = {name: np.array(scores)[used] for name, scores in rows[planner.name].items()}
        means = {
            name: None if np.isnan(scores).all() else float(np.nanmean(scores))
            for name, scores in kept.items()
        }
        numbers[planner.name] = {**means, "n_samples": len(used), "note": NOTE}
        per_sample[planner.name] = {
            truth.split.tokens[row]: {
                name: float(scores[place])
                for name, scores in kept.items()
                if not np.isnan(scores[place])
            }
            for place, row in enumerate(used)
        }
    table = ResultTable(
        title="Beyond L2: what closed-loop benchmarks ask (%)",
        columns=tuple(NAMES.values()),
        rows=tuple(
            (
                planner.name,
                tuple(
                    None if numbers[planner.name][key] is None else 100 * numbers[planner.name][key]
                    for key in NAMES
                ),
            )
            for planner in everybody
        ),
        note=f"{numbers[everybody[0].name]['n_samples']} samples; {NOTE}",
        digits=1,
    )
    return table, numbers, per_sample


def surroundings(truth: PlanningTruth, here: slice, *, with_map: bool = True) -> Surroundings:
    """Road users, road and past of some key-frames."""
    split = truth.split
    everybody = [truth.users(token) for token in split.tokens[here]]
    # Barriers, cones and whatever has no detection class are not road users.
    kept = [one.mask & np.isin(one.label, ROAD_USERS) for one in everybody]
    width = max(int(mask.sum(1).max(initial=0)) for mask in kept)
    steps = kept[0].shape[0]
    boxes = np.zeros((len(kept), steps, width, 7), dtype=np.float32)
    instance = np.full(boxes.shape[:3], -1, dtype=np.int64)
    mask = np.zeros(boxes.shape[:3], dtype=bool)
    for row, (one, counts) in enumerate(zip(everybody, kept, strict=True)):
        mask[row] = np.arange(width)[None] < counts.sum(1)[:, None]
        boxes[row][mask[row]] = one.boxes[counts]
        instance[row][mask[row]] = one.instance[counts]
    history = split.ego.history[here]
    last_steps = torch.stack([history[:, -1] - history[:, -2], -history[:, -1]], dim=1)
    return Surroundings(
        boxes=torch.from_numpy(boxes),
        mask=torch.from_numpy(mask),
        instance=torch.from_numpy(instance),
        driven=split.waypoints[here].double(),
        recorded=split.mask[here],
        last_steps=last_steps.double(),
        drivable=_drivable(truth, here) if with_map else None,
    )


def _drivable(truth: PlanningTruth, here: slice) -> torch.Tensor | None:
    """Drivable cells; None where the root has no map expansion."""
    index = truth.data.index
    frames = [index.frame(token) for token in truth.split.tokens[here]]
    try:
        areas = [drivable_area(index, frame, OCCUPANCY_GRID) for frame in frames]
    except UserError:
        return None
    return torch.from_numpy(np.stack(areas))
