"""From many overlapping masks to one map: who keeps which cell.

Candidates come by falling score; each takes the cells of its mask that are still free, unless too
many are taken already (Panoptic SegFormer's mask-wise merging, Li et al. 2022, algorithm 1).

What is unusual: any number of scenes are merged side by side, a candidate of each at a time.

Shape legend: B rows, N candidates, K classes, H x W cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# UniAD adds a cell to a mask's area when it takes the mean of its values, so that small masks lose
# score (half of it squared at one cell).
UNIAD_AREA_OFFSET = 1.0
# UniAD asks "is the label of this cell above 0?" to see whether it is taken: class 0 (dividers)
# takes nothing away from others, not even from other dividers.
UNIAD_FREE_LABEL = 0


@dataclass(frozen=True)
class MergeRules:
    """When a candidate is a map element."""

    covered: float = 0.5  # a cell belongs to a mask above this value
    score: float = 0.1  # candidates below are dropped (hard-coded in UniAD, whose config says 0.25)
    overlap: float = 0.4  # share of a mask's cells that may be taken already
    # "uniad": with both constants above, and scores that may exceed 1 because mask values may.
    # "none": mean of the values, at most 1; every element takes its cells from later ones.
    compat: Literal["none", "uniad"] = "none"


@dataclass(frozen=True)
class Merged:
    """The map. "Place" counts candidates by falling score."""

    order: Tensor  # int64 [B, N] the candidate at each place
    scores: Tensor  # [B, N] by place
    labels: Tensor  # int64 [B, N] by place
    kept: Tensor  # bool [B, N] by place
    cells: Tensor  # bool [B, N, H, W] by place: what each element got; empty where not kept

    def lanes(self, classes: int) -> Tensor:
        """Cells of each class, bool [B, K, H, W]."""
        batch, _, height, width = self.cells.shape
        lanes = torch.zeros(
            batch, classes, height, width, dtype=torch.uint8, device=self.cells.device
        )
        index = self.labels[..., None, None].expand_as(self.cells)
        return lanes.scatter_reduce(1, index, self.cells.to(torch.uint8), "amax").bool()


def quality(masks: Tensor, rules: MergeRules) -> Tensor:
    """How sure a mask [..., H, W] is of the cells it covers: [...], 0 if it covers none."""
    inside = masks > rules.covered
    area = inside.sum((-2, -1))
    total = (masks * inside).sum((-2, -1))
    if rules.compat == "uniad":
        return total / (area + UNIAD_AREA_OFFSET)
    return (total / area.clamp(min=1)).clamp(max=1)


@torch.no_grad()
def merge(
    masks: Tensor, scores: Tensor, labels: Tensor, rules: MergeRules, order: Tensor | None = None
) -> Merged:
    """Merge.

    Args:
        masks: [B, N, H, W], values >= 0.
        scores: [B, N], probability of the class.
        labels: int64 [B, N].
        rules: see MergeRules.
        order: int64 [B, N], candidates in the order they are served; None: by falling score.

    Returns:
        The map; scores are class probability x quality squared.
    """
    scores = scores * quality(masks, rules) ** 2
    if order is None:
        order = scores.argsort(dim=1, descending=True, stable=True)
    scores, labels = scores.gather(1, order), labels.gather(1, order)
    inside = (masks > rules.covered).gather(1, order[..., None, None].expand_as(masks))
    area = inside.sum((2, 3))
    good = (scores >= rules.score) & (area > 0)
    takes = torch.ones_like(good)
    if rules.compat == "uniad":
        takes = labels != UNIAD_FREE_LABEL
    taken = torch.zeros_like(inside[:, 0])
    kept, cells = torch.zeros_like(good), torch.zeros_like(inside)
    # Scores fall: behind the last good candidate there is none.
    places = int((good.any(0) * torch.arange(1, masks.shape[1] + 1, device=good.device)).amax())
    for place in range(places):
        own = inside[:, place]
        overlap = (own & taken).sum((1, 2)).double() / area[:, place].clamp(min=1)
        kept[:, place] = good[:, place] & (overlap <= rules.overlap)
        cells[:, place] = own & ~taken & kept[:, place, None, None]
        taken |= cells[:, place] & takes[:, place, None, None]
    return Merged(order, scores, labels, kept, cells)
