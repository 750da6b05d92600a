"""What a regressed plan pays for driving into others (Hu et al. 2023, UniAD: section 2.4).

For each inflation of the car's box, the area that it shares with the boxes of others at the time of
each waypoint is added up. What differs from UniAD's planning_loss.py: areas are those of the boxes,
not of the upright rectangles around them, which touch in bends where the boxes do not; the box
stands where the evaluation has it, with its middle half a metre ahead of the lidar; and the
gradient reaches the plan (the released code copies the waypoints into a new tensor, so that it
reaches nothing).

Shape legend: B rows, T = 6 steps, A boxes of all steps together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odvla.errors import UserError
from odvla.metrics.collisions import corners, ego_boxes, headings
from odvla.types import TrafficTargets

# One of two boxes is larger by so much, so that no sides lie on one another.
HAIR_M = 1e-7
PARALLEL_M = 1e-9  # a side that comes no nearer to a line than this never meets it


@dataclass(frozen=True)
class CollisionLossConfig:
    """How much overlap costs, beside the distance from the driven path.

    Args:
        weight: of the whole, a square metre beside a metre of distance; 0: off. UniAD has 2.5.
        inflations_m: what is added to the car's width and length.
        inflation_weights: of each of them. Multiplied by 2.5, these are the weights of UniAD's
            configuration.
    """

    weight: float = 0.0
    inflations_m: tuple[float, ...] = (0.0, 0.5, 1.0)
    inflation_weights: tuple[float, ...] = (1.0, 0.4, 0.1)

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: a negative one, or not one weight an inflation.
        """
        for value in (self.weight, *self.inflations_m, *self.inflation_weights):
            if not value >= 0:
                raise UserError(f"planning.regression.collision has a negative number, {value}")
        if len(self.inflations_m) != len(self.inflation_weights):
            raise UserError(
                f"planning.regression.collision has {len(self.inflations_m)} inflations_m and "
                f"{len(self.inflation_weights)} inflation_weights"
            )


def collision_loss(
    plans: Tensor,
    driven: Tensor,
    known: Tensor,
    traffic: TrafficTargets,
    config: CollisionLossConfig,
) -> Tensor:
    """Weighted overlap, added up over steps and boxes; a mean over the rows that count.

    Args:
        plans: [B, T, 2] metres.
        driven: [B, T, 2] the path that was driven; the planned box has its headings, as in UniAD.
        known: bool [B, T] which steps count.
        traffic: the others.
        config: inflations and their weights; `weight` is not applied here.

    Returns:
        Square metres, with a gradient for `plans`.
    """
    heading = headings(torch.where(known[..., None], driven, 0.0))
    ego = ego_boxes(plans, heading)  # B, T, 5
    there = ego.gather(1, traffic.step[..., None].expand(-1, -1, 5))  # B, A, 5
    counts = traffic.mask & known.gather(1, traffic.step)
    there, others = there[counts], traffic.boxes[counts].double()  # pairs, 5
    total = plans.sum() * 0.0
    for inflation_m, weight in zip(config.inflations_m, config.inflation_weights, strict=True):
        larger = there.new_tensor([0.0, 0.0, inflation_m, inflation_m, 0.0])
        total = total + weight * overlap_areas(there + larger, others).sum().to(plans.dtype)
    return total / max(1, int(known.any(1).sum()))


def overlap_areas(one: Tensor, other: Tensor) -> Tensor:
    """Area that two rectangles share.

    Its border is what lies of each one's sides in the other, so that its area is an integral along
    them (Green's theorem).

    Args:
        one: [..., 5] x, y, width, length, yaw, in double precision.
        other: the same.

    Returns:
        [...], with gradients for all sizes and places.
    """
    origin = other[..., :2].detach()  # near both, where it matters
    one = torch.cat([one[..., :2] - origin, one[..., 2:5]], -1)
    other = torch.cat([other[..., :2] - origin, other[..., 2:5]], -1)
    other = other + other.new_tensor([0.0, 0.0, HAIR_M, HAIR_M, 0.0])
    return _integral(one, other) + _integral(other, one)


def _integral(path: Tensor, box: Tensor) -> Tensor:
    """Integral of (x dy - y dx) / 2 along those parts of a rectangle's sides that lie in a box."""
    start = corners(path)  # ..., 4, 2, clockwise
    side = start.roll(-1, -2) - start
    half = box[..., None, [3, 2]] / 2  # along, across
    at, along = _turned(start - box[..., None, :2], box), _turned(side, box)
    # Far less than a hair: such a side is in or out from its start to its end.
    along = torch.where(along.abs() < PARALLEL_M, PARALLEL_M * 1e-3, along)
    low, high = (-half - at) / along, (half - at) / along
    enters = torch.minimum(low, high).amax(-1).clamp(0.0, 1.0)[..., None]
    leaves = torch.maximum(low, high).amin(-1).clamp(0.0, 1.0)[..., None]
    first, last = start + enters * side, start + leaves * side
    area = first[..., 1] * last[..., 0] - first[..., 0] * last[..., 1]  # positive clockwise
    return torch.where((leaves > enters)[..., 0], area, 0.0).sum(-1) / 2


def _turned(vectors: Tensor, box: Tensor) -> Tensor:
    """Vectors [..., 4, 2] along and across a box [..., 5]."""
    cos, sin = box[..., 4].cos()[..., None], box[..., 4].sin()[..., None]
    x, y = vectors.unbind(-1)
    return torch.stack([x * cos + y * sin, y * cos - x * sin], -1)
