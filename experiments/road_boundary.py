"""OmniDrive's boundary score of a planner and of the driven path.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

from typing import Any

import torch

from datamodules.map_raster import drivable_area
from experiments.planning_scores import PlanSet
from experiments.planning_truth import PlanningTruth
from experiments.report import ResultTable
from odvla.metrics.planning import SECONDS, STEPS_PER_SECOND
from odvla.metrics.road_boundary import leaves_road
from odvla.types import BevGrid

GRID = BevGrid(-50.0, -50.0, 0.1, 1000, 1000)  # OmniDrive's
BOUNDARY_OF = "omnidrive"  # the protocol that it goes with
DRIVEN = "driven path"


def score_boundary(
    truth: PlanningTruth, planner: PlanSet
) -> tuple[ResultTable | None, dict[str, Any]]:
    """Shares of samples in which the car leaves the road up to 1, 2 and 3 s.

    Samples are those with a usable plan, a whole recorded future and a map; the others are counted.

    Returns:
        A table, None where no sample has all three; and numbers for results.json.
    """
    index = truth.data.index
    whole = truth.split.mask.all(1).tolist()
    rows = [row for row, known in enumerate(whole) if known and row not in planner.failures]
    with_map = [
        row for row in rows if index.location(index.frame(truth.split.tokens[row])) in index.maps
    ]
    counts = {"samples": len(with_map), "without_map": len(rows) - len(with_map)}
    if not with_map:
        return None, counts
    paths = {planner.name: planner.points, DRIVEN: truth.split.waypoints}
    left = {name: torch.zeros(len(SECONDS), dtype=torch.float64) for name in paths}
    ends = [STEPS_PER_SECOND * second - 1 for second in SECONDS]
    for row in with_map:  # a raster takes a megabyte
        frame = index.frame(truth.split.tokens[row])
        road = torch.from_numpy(drivable_area(index, frame, GRID))[None]
        for name, path in paths.items():
            left[name] += leaves_road(path[row : row + 1].double(), road, GRID)[0, ends]
    shares = {name: (sums / len(with_map)).tolist() for name, sums in left.items()}
    numbers = {
        name: {f"boundary_{second}s": share for second, share in zip(SECONDS, found, strict=True)}
        for name, found in shares.items()
    }
    table = ResultTable(
        title="Off the drivable area, as OmniDrive counts it (%)",
        columns=("1s", "2s", "3s", "avg"),
        rows=tuple(
            (name, (*(100 * share for share in found), 100 * sum(found) / len(found)))
            for name, found in shares.items()
        ),
        note=f"{len(with_map)} samples with a plan, a whole future and a map "
        f"({counts['without_map']} more have no map); nothing is counted where a part of the "
        "car is off at t0.",
    )
    return table, {**counts, **numbers}
