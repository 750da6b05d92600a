"""Bipartite matching of predictions to targets, in DETR's words (Carion et al. 2020).

Shape legend: B rows, Q queries, A targets (padded), P matched pairs of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Larger than any real cost: non-finite costs of an unstable step must not stop the matcher.
WORST_COST = 1e6


@dataclass(frozen=True)
class Matches:
    """Pairs of a query and a target."""

    row: Tensor  # int64 [P]
    query: Tensor  # int64 [P]
    target: Tensor  # int64 [P]


@torch.no_grad()
def hungarian(cost: Tensor, queries: Tensor, targets: Tensor) -> Matches:
    """The cheapest one-to-one matching of each row.

    Args:
        cost: [B, Q, A].
        queries: bool [B, Q], True for queries that may be matched.
        targets: bool [B, A], True for targets that want a match.

    Returns:
        min(queries, targets) pairs of each row; the rest stays unmatched.
    """
    bounded = torch.nan_to_num(cost.float(), nan=WORST_COST, posinf=WORST_COST, neginf=-WORST_COST)
    costs, query_masks = bounded.cpu().numpy(), queries.cpu().numpy()
    pairs: list[list[int]] = [[], [], []]
    for row, target_mask in enumerate(targets.cpu().numpy()):
        free, wanted = query_masks[row].nonzero()[0], target_mask.nonzero()[0]
        picked, matched = linear_sum_assignment(costs[row][free][:, wanted])
        pairs[0].extend([row] * len(picked))
        pairs[1].extend(free[picked].tolist())
        pairs[2].extend(wanted[matched].tolist())
    row_index, query_index, target_index = (
        torch.tensor(items, dtype=torch.int64, device=cost.device) for items in pairs
    )
    return Matches(row_index, query_index, target_index)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), elementwise.

    Args:
        logits: [...].
        targets: [...], 0 or 1.
        alpha: weight of positives.
        gamma: how much easy elements are discounted.
    """
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * miss**gamma * loss


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What it would cost to call a query class k instead of background (Deformable DETR).

    Args:
        logits: [..., K].
        alpha: weight of positives.
        gamma: how much easy elements are discounted.

    Returns:
        [..., K].
    """
    positive = focal_loss(logits, torch.ones_like(logits), alpha, gamma)
    return positive - focal_loss(logits, torch.zeros_like(logits), alpha, gamma)


def gaussian_focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's focal loss on a heatmap, elementwise: 1 is a peak, what lies near it is mild.

    Args:
        logits: [...].
        heat: [...] in 0..1, exactly 1 at peaks.
    """
    probability = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    at_peak = (1 - probability) ** 2 * -probability.log()
    elsewhere = (1 - heat) ** 4 * probability**2 * -(1 - probability).log()
    return torch.where(heat == 1, at_peak, elsewhere)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - Dice coefficient of masks.

    Args:
        logits: [..., S] flattened masks.
        targets: [..., S], 0 or 1; leading dimensions broadcast.

    Returns:
        [...].
    """
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)
