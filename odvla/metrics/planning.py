"""Open-loop planning: L2 and collision rate under any protocol of the field.

The two published tables differ in how six steps become a number: UniAD reads the value AT 1, 2 and
3 s, ST-P3 (and VAD) the mean UP TO 1, 2 and 3 s; see protocol.py for all other choices. Everything
is computed for all samples at once.

Shape legend: S samples, T = 6 steps 0.5 s apart.
Frame: LIDAR_TOP at t0, x right, y forward, metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from odvla.metrics.collisions import Traffic, collisions
from odvla.metrics.protocol import ProtocolCard
from odvla.metrics.samples import SampleMetric
from odvla.types import WAYPOINTS

SECONDS = (1, 2, 3)
STEPS_PER_SECOND = 2


@dataclass(frozen=True)
class PlanningSamples:
    """Numbers of every scored sample, sorted by name."""

    names: tuple[str, ...]  # [S]
    l2_m: Tensor  # [S, T] not masked
    hits: Tensor  # bool [S, T] the plan collides and the driven path does not
    driven_hits: Tensor  # bool [S, T]
    mask: Tensor  # bool [S, T] the future was recorded


@dataclass(frozen=True)
class PlanningScores:
    """Scores of one planner under one card: metres and fractions for 1, 2 and 3 s.

    A number is NaN where no sample has a recorded step for it.
    """

    card: ProtocolCard
    l2_m: tuple[float, float, float]
    collision: tuple[float, float, float]
    l2_steps_m: tuple[float, ...]  # of each of the six steps, before they are put together
    collision_steps: tuple[float, ...]
    samples: int  # that the averages are over
    driven_collisions: int  # samples whose driven path itself collides at some step

    @property
    def l2_average_m(self) -> float:
        """Mean of the values for 1, 2 and 3 s (of those that are known), as papers print it."""
        return _mean_of_known(self.l2_m)

    @property
    def collision_average(self) -> float:
        """Mean of the values for 1, 2 and 3 s (of those that are known), as papers print it."""
        return _mean_of_known(self.collision)

    @property
    def collision_percent(self) -> tuple[float, ...]:
        """As papers print it."""
        return tuple(100 * value for value in self.collision)

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        numbers: dict[str, Any] = {}
        for second, l2, collision in zip(SECONDS, self.l2_m, self.collision, strict=True):
            numbers[f"l2_{second}s_m"] = l2
            numbers[f"{self.card.shape}_collision_{second}s"] = collision
        return {
            **numbers,
            "l2_avg_m": self.l2_average_m,
            f"{self.card.shape}_collision_avg": self.collision_average,
            "l2_steps_m": list(self.l2_steps_m),
            "collision_steps": list(self.collision_steps),
            "n_samples": self.samples,
            "ground_truth_collisions": self.driven_collisions,
            "card": self.card.as_dict(),
        }


class PlanningMetric(SampleMetric):
    """L2 and collision rate of a planner under one protocol.

    Args:
        card: the protocol.
    """

    def __init__(self, card: ProtocolCard, **kwargs: Any) -> None:
        super().__init__(width=4 * WAYPOINTS, **kwargs)
        self.card = card
        self._found: tuple[PlanningSamples, PlanningScores] | None = None

    def update(
        self,
        names: Sequence[str],
        predicted: Tensor,
        driven: Tensor,
        mask: Tensor,
        traffic: Traffic,
    ) -> None:
        """Add samples.

        A collision counts where the plan touches somebody and the driven path does not: the raster
        is coarse, and a path that a person drove without harm shows that the raster, not the plan,
        is wrong there.

        Args:
            names: of the samples.
            predicted: [S, 6, 2] metres.
            driven: [S, 6, 2] metres.
            mask: bool [S, 6], True where the future was recorded.
            traffic: where others will be.

        Raises:
            ValueError: a shape is wrong, or a plan is not finite.
        """
        for what, plans in (("predicted", predicted), ("driven", driven)):
            if plans.ndim != 3 or plans.shape[1:] != (WAYPOINTS, 2):
                raise ValueError(f"{what} must be [samples, 6, 2], got {list(plans.shape)}")
            if not plans.isfinite().all():
                raise ValueError(f"{what} plans must be finite")
        if len(predicted) == 0:
            return
        # The driven path is judged by its box, also where plans are judged by their points.
        driven_hits = collisions(driven, traffic, replace(self.card, shape="box"))
        hits = collisions(predicted, traffic, self.card) & ~driven_hits
        columns = [l2_per_step(predicted, driven), hits, driven_hits, mask]
        self.keep(names, torch.cat([column.double() for column in columns], dim=1))

    def compute(self) -> dict[str, Any]:
        """Scores of all samples of all processes, as a dict (torchmetrics takes no dataclass)."""
        names, table = self.table()
        l2, hits, driven_hits, mask = table.split(WAYPOINTS, dim=1)
        samples = PlanningSamples(names, l2, hits > 0, driven_hits > 0, mask > 0)
        self._found = samples, aggregate(samples, self.card)
        return self._found[1].as_dict()

    def scores(self) -> PlanningScores:
        """What `compute` puts into its dict."""
        self.compute()
        assert self._found is not None
        return self._found[1]

    def samples(self) -> PlanningSamples:
        """Numbers of every sample of all processes."""
        self.compute()
        assert self._found is not None
        return self._found[0]


def l2_per_step(predicted: Tensor, driven: Tensor) -> Tensor:
    """Distance of every planned point to the driven one: [S, 6, 2] twice -> [S, 6] metres."""
    return (predicted.double() - driven.double()).square().sum(-1).sqrt()


def aggregate(samples: PlanningSamples, card: ProtocolCard) -> PlanningScores:
    """Put the numbers of all samples together as the card says.

    Raises:
        ValueError: the card counts none of the samples.
    """
    l2_counted, hits_counted = counted_steps(samples.mask, card)
    if not hits_counted.any():
        raise ValueError(f"no sample counts under the policy {card.samples!r}")
    hits = judged_hits(samples, card)
    reference = card.samples == "reference"
    denominator = torch.full((hits.shape[1],), float(len(hits))) if reference else None
    l2_steps = _step_means(samples.l2_m, l2_counted, denominator)
    hit_steps = _step_means(hits, hits_counted, denominator)
    l2 = over_time(l2_steps, card.l2).tolist()
    collision = over_time(hit_steps, card.collision).tolist()
    return PlanningScores(
        card=card,
        l2_m=(l2[0], l2[1], l2[2]),
        collision=(collision[0], collision[1], collision[2]),
        l2_steps_m=tuple(l2_steps.tolist()),
        collision_steps=tuple(hit_steps.tolist()),
        samples=int(hits_counted.any(1).sum()),
        driven_collisions=int(samples.driven_hits.any(1).sum()),
    )


def counted_steps(mask: Tensor, card: ProtocolCard) -> tuple[Tensor, Tensor]:
    """Which steps [S, 6] count for the L2, and which for collisions, given what was recorded."""
    if card.samples == "reference":
        # The reference judges collisions everywhere; steps without a future have empty rasters.
        return mask, torch.ones_like(mask)
    if card.samples == "complete_only":
        whole = mask.all(dim=1, keepdim=True).expand_as(mask)
        return whole, whole
    return mask, mask


def judged_hits(samples: PlanningSamples, card: ProtocolCard) -> Tensor:
    """1 where a plan collides at a step [S, 6], or has collided by then; 0 elsewhere."""
    hits = samples.hits.double()
    return hits.cummax(dim=1).values if card.collision == "any_up_to_t" else hits


def over_time(steps: Tensor, convention: str) -> Tensor:
    """Means of the steps [..., 6] -> a number for each of 1, 2 and 3 s [..., 3].

    Steps that are NaN are left out; where none remains, the number is NaN.
    """
    ends = [STEPS_PER_SECOND * second for second in SECONDS]
    if convention == "mean_up_to_t":
        return torch.stack([steps[..., :end].nanmean(-1) for end in ends], dim=-1)
    return steps[..., [end - 1 for end in ends]]


def _step_means(values: Tensor, counted: Tensor, denominator: Tensor | None) -> Tensor:
    """Mean [6] over the samples of values [S, 6], of the counted ones; NaN where none is."""
    total = torch.where(counted, values, 0.0).sum(0)
    if denominator is None:
        denominator = counted.sum(0).double()
    return total / denominator.to(total)


def _mean_of_known(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
