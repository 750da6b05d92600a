"""The planning metric beside what the reference made of the same plans.

Everything comes from the recording: number of plans and steps, the raster and the car on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from experiments.parity.golden import Check, Golden
from odvla.metrics.collisions import CollisionRaster, box_hits, point_hits
from odvla.metrics.planning import PlanningSamples, aggregate, l2_per_step
from odvla.metrics.protocol import PRESETS, Shape

TABLES = {"uniad": "opendrivevla_uniad", "stp3": "opendrivevla_stp3"}
SHAPES: dict[str, Shape] = {"obj_col": "point", "obj_box_col": "box"}


def planning_metric(golden: Golden, stem: str) -> Iterator[Check]:
    """Per sample, per step, and both of the published aggregations."""
    arrays, facts = golden.arrays(stem), golden.facts(stem)
    plans, driven = arrays["pred"], arrays["gt"]
    mask = arrays["mask"].flatten(2).amin(-1) > 0 if arrays["mask"].ndim > 2 else arrays["mask"] > 0
    raster = arrays["occupancy"] > 0
    grid = CollisionRaster(
        first_centre_m=(facts["bx"][0], facts["bx"][1]),
        cell_m=(facts["dx"][0], facts["dx"][1]),
        ego_length_m=facts["ego_H"],
        ego_width_m=facts["ego_W"],
    )
    rows, columns = grid.ego_cells()
    yield _same_cells(rows, columns, arrays)
    l2 = l2_per_step(plans, driven)
    driven_hits = box_hits(driven, raster, grid)
    yield Check("L2", l2 * mask, arrays["L2"])
    yield Check("gt_box_coll", driven_hits, arrays["gt_box_coll"], "index")
    flagged = driven_hits.any(1)
    yield Check("gt_collision_flag", flagged, arrays["gt_collision_flag"], "index")
    yield _number("gt_collision_count", int(flagged.sum()), facts["gt_collision_count"], "index")
    for name, shape in SHAPES.items():
        hits = (box_hits if shape == "box" else point_hits)(plans, raster, grid) & ~driven_hits
        yield Check(name, hits, arrays[name], "index")
        samples = PlanningSamples(tuple(map(str, range(len(plans)))), l2, hits, driven_hits, mask)
        for table, preset in TABLES.items():
            scores = aggregate(samples, replace(PRESETS[preset], shape=shape))
            numbers = scores.as_dict()
            for end in ("1s", "2s", "3s", "avg"):
                ours = numbers[f"{shape}_collision_{end}"]
                yield _number(f"{table}/{name}_{end}", ours, facts[table][f"{name}_{end}"])
                if shape == "box":
                    ours = numbers["l2_avg_m" if end == "avg" else f"l2_{end}_m"]
                    yield _number(f"{table}/L2_{end}", ours, facts[table][f"L2_{end}"])
        steps = torch.tensor(scores.collision_steps)
        yield Check(f"agg_{name}", steps, arrays[f"agg_{name}"])
    yield Check("agg_L2", torch.tensor(scores.l2_steps_m), arrays["agg_L2"])


def _same_cells(rows: Tensor, columns: Tensor, arrays: dict[str, Tensor]) -> Check:
    """The cells that the car covers, whatever their order."""
    ours = torch.stack([rows, columns], dim=1).unique(dim=0)
    theirs = torch.stack([arrays["ego_box_rows"], arrays["ego_box_cols"]], dim=1).unique(dim=0)
    return Check("ego_box_cells", ours, theirs, "index")


def _number(name: str, ours: float, theirs: float, kind: str = "activation") -> Check:
    as_tensor = torch.tensor([ours], dtype=torch.float64)
    theirs_too = torch.tensor([theirs], dtype=torch.float64)
    return Check(name, as_tensor, theirs_too, "index" if kind == "index" else "activation")
