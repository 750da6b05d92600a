"""Open-loop planning: L2 and collision in the two protocols of the field.

The two published tables differ in how six steps become a number: UniAD reads the value AT 1, 2 and
3 s, ST-P3 (and VAD) the mean UP TO 1, 2 and 3 s. Numbers of different protocols must never share a
column, so every result here carries a ProtocolCard.

Frame: LIDAR_TOP at t0, x right, y forward, metres; six steps 0.5 s apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from odvla.types import WAYPOINTS

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]

L2Convention = Literal["value_at_t", "mean_up_to_t"]
SECONDS = (1, 2, 3)
STEPS_PER_SECOND = 2

# The collision raster of ST-P3, which UniAD, VAD and OpenDriveVLA use: 200 x 200 cells of 0.5 m; a
# cell's coordinate is its centre, the first one at -49.75 m. Rows grow with y (forward), columns
# grow with -x (left).
GRID_CELLS = 200
CELL_M = 0.5
FIRST_CENTRE_M = -49.75
EGO_LENGTH_M = 4.084
EGO_WIDTH_M = 1.85
EGO_FORWARD_SHIFT_M = 0.5  # from LIDAR_TOP to the middle of the car


@dataclass(frozen=True)
class ProtocolCard:
    """What a planning number means; two numbers are comparable only when their cards are equal.

    Attributes:
        l2: the value at t seconds (UniAD's table) or the mean of all steps up to t (ST-P3's,
            VAD's).
        collision: how a collision is decided.
        occupancy: which classes fill the raster.
        samples: "valid_steps" averages over the annotated steps; "all_samples" is the reference's
            way, which
            divides by all samples although a step that is masked out adds zero.
        parse: what happens to a plan that cannot be read.
        ego_status: whether the planner saw velocity, CAN bus and history.
    """

    l2: L2Convention
    collision: str = (
        "ego box 4.084 x 1.85 m, never rotated; steps where the driven path collides are left out"
    )
    occupancy: str = "vehicles"
    samples: Literal["valid_steps", "all_samples"] = "valid_steps"
    parse: str = "an unreadable plan counts as standing still"
    ego_status: str = "used"

    def as_dict(self) -> dict[str, str]:
        """The card as plain strings, for JSON and run tags."""
        return asdict(self)


@dataclass(frozen=True)
class PlanningScores:
    """Scores of one planner under one card, in metres and percent, for 1, 2 and 3 s."""

    card: ProtocolCard
    l2_m: tuple[float, float, float]
    collision_percent: tuple[float, float, float]
    samples: int

    @property
    def l2_average_m(self) -> float:
        """Mean of the values for 1, 2 and 3 s, as papers print it."""
        return float(np.mean(self.l2_m))

    @property
    def collision_average_percent(self) -> float:
        """Mean of the values for 1, 2 and 3 s, as papers print it."""
        return float(np.mean(self.collision_percent))


def l2_per_step(predicted: FloatArray, driven: FloatArray) -> FloatArray:
    """Distance of every planned point to the driven one: [S, 6, 2] twice -> [S, 6] metres."""
    _require_plans("predicted", predicted)
    _require_plans("driven", driven)
    return np.linalg.norm(predicted.astype(np.float64) - driven.astype(np.float64), axis=-1)


def ego_box_cells() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the cells that the ego box covers with LIDAR_TOP at the origin."""
    centres = FIRST_CENTRE_M + CELL_M * np.arange(GRID_CELLS)
    rows = np.flatnonzero(np.abs(centres - EGO_FORWARD_SHIFT_M) <= EGO_LENGTH_M / 2)
    columns = np.flatnonzero(np.abs(centres) <= EGO_WIDTH_M / 2)
    row, column = np.meshgrid(rows, columns, indexing="ij")
    return row.ravel(), column.ravel()


def box_collisions(plans: FloatArray, occupancy: NDArray) -> BoolArray:
    """Whether the ego box, moved along a plan and never rotated, touches an occupied cell.

    Cells outside the raster are clipped to its border, as the reference does; a plan that leaves
    the 100 m square is therefore judged by what stands on the edge.

    Args:
        plans: [S, 6, 2] metres.
        occupancy: [S, 6, 200, 200], one raster a step, rows forward, columns left.

    Returns:
        [S, 6].

    Source: ST-P3's and UniAD's PlanningMetric.
    """
    _require_plans("plans", plans)
    rows, columns = ego_box_cells()
    forward = plans[..., 1, None].astype(np.float32) / np.float32(CELL_M) + rows
    left = -plans[..., 0, None].astype(np.float32) / np.float32(CELL_M) + columns
    row = np.clip(np.trunc(forward).astype(np.int64), 0, GRID_CELLS - 1)
    column = np.clip(np.trunc(left).astype(np.int64), 0, GRID_CELLS - 1)
    sample = np.arange(len(plans))[:, None, None]
    step = np.arange(WAYPOINTS)[None, :, None]
    return (occupancy[sample, step, row, column] > 0).any(-1)


def per_second(values: FloatArray, counted: BoolArray, card: ProtocolCard) -> tuple[float, ...]:
    """Reduce [S, 6] per-step values to one number for each of 1, 2 and 3 s.

    Args:
        values: [S, 6].
        counted: [S, 6], False where a step must not add to the sum.
        card: decides the aggregation and the denominator.
    """
    kept = np.where(counted, values, 0.0)
    count = np.full(WAYPOINTS, len(values)) if card.samples == "all_samples" else counted.sum(0)
    step_mean = kept.sum(0) / np.maximum(count, 1)
    if card.l2 == "value_at_t":
        return tuple(float(step_mean[STEPS_PER_SECOND * s - 1]) for s in SECONDS)
    return tuple(float(step_mean[: STEPS_PER_SECOND * s].mean()) for s in SECONDS)


def score_plans(
    predicted: FloatArray,
    driven: FloatArray,
    mask: BoolArray,
    occupancy: NDArray,
    card: ProtocolCard,
) -> PlanningScores:
    """L2 and collision rate of a planner.

    A collision counts where the plan's box touches an occupied cell and the driven path's box does
    not: the raster is coarse, and a path that a person drove without harm shows that the raster,
        not the plan, is wrong there.

    Args:
        predicted: [S, 6, 2] metres.
        driven: [S, 6, 2] metres.
        mask: [S, 6], True where the future was recorded.
        occupancy: [S, 6, 200, 200].
        card: the protocol.
    """
    if len(predicted) == 0:
        raise ValueError("score_plans needs at least one plan, got none")
    distance = l2_per_step(predicted, driven)
    driven_hits = box_collisions(driven, occupancy)
    hits = box_collisions(predicted, occupancy) & ~driven_hits
    # The reference excludes only the driven path's own hits; steps without a recorded future have
    # empty rasters.
    judged = np.ones_like(mask) if card.samples == "all_samples" else mask
    l2 = per_second(distance, mask, card)
    collision = per_second(hits.astype(np.float64), judged, card)
    return PlanningScores(
        card=card,
        l2_m=(l2[0], l2[1], l2[2]),
        collision_percent=(100 * collision[0], 100 * collision[1], 100 * collision[2]),
        samples=len(predicted),
    )


def _require_plans(name: str, plans: FloatArray) -> None:
    if plans.ndim != 3 or plans.shape[1:] != (WAYPOINTS, 2):
        raise ValueError(f"{name} must be [samples, 6, 2], got {list(plans.shape)}")
