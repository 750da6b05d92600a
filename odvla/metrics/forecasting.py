"""Agent forecasting: average and final displacement, with k = 1 hypothesis a forecast.

The convention of stage 2.5: positions in the agent's own frame at t0, six steps of 0.5 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ForecastScores:
    """Displacement errors in metres.

    `agents` forecasts were scored, `unreadable` of them had no six points. With one hypothesis,
    minADE and minFDE are ADE and FDE. `missed` is the share of scored forecasts whose last known
    point is more than 2 m off (the nuScenes prediction task's miss rate).
    """

    min_ade_m: float
    min_fde_m: float
    missed: float
    agents: int
    unreadable: int


MISS_DISTANCE_M = 2.0


def score_forecasts(
    predicted: NDArray[np.floating],
    driven: NDArray[np.floating],
    mask: NDArray[np.bool_],
    readable: NDArray[np.bool_],
) -> ForecastScores:
    """Score forecasts [S, 6, 2] against [S, 6, 2] where `mask` [S, 6] says the future is known.

    Forecasts that could not be read (`readable` [S] False) are counted, and scored as standing
    still, so that a model gains nothing by being unreadable. Agents without any known future point
    must be left out by the caller.
    """
    if not mask.any(-1).all():
        raise ValueError("an agent without any known future point cannot be scored")
    if len(predicted) == 0:
        return ForecastScores(float("nan"), float("nan"), float("nan"), 0, 0)
    used = np.where(readable[:, None, None], predicted, 0.0)
    distance = np.linalg.norm(used - driven, axis=-1)
    ade = (distance * mask).sum(-1) / mask.sum(-1)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(-1)
    fde = distance[np.arange(len(distance)), last]
    return ForecastScores(
        min_ade_m=float(ade.mean()),
        min_fde_m=float(fde.mean()),
        missed=float((fde > MISS_DISTANCE_M).mean()),
        agents=len(distance),
        unreadable=int((~readable).sum()),
    )


def score_by_class(
    predicted: NDArray[np.floating],
    driven: NDArray[np.floating],
    mask: NDArray[np.bool_],
    readable: NDArray[np.bool_],
    classes: Sequence[str],
) -> dict[str, ForecastScores]:
    """The same for the agents of every class [S], by name; see `score_forecasts`."""
    names = np.asarray(classes)
    found = {}
    for name in sorted(set(classes)):
        own = names == name
        found[name] = score_forecasts(predicted[own], driven[own], mask[own], readable[own])
    return found
