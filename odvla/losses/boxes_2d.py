"""Boxes in the plane, edges along the axes: (x1, y1, x2, y2).

Shape legend: M masks, H x W cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # least area of a union and of an enclosing box, as in mmdet


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union (Rezatofighi et al. 2019), in -1..1.

    Args:
        a: [..., 4].
        b: [..., 4]; leading dimensions broadcast.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = _area(low, high)
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - overlap
    union = union.clamp(min=EPS)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    around = _area(low, high).clamp(min=EPS)
    return overlap / union - (around - union) / around


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


def boxes_of_masks(masks: Tensor, *, far_edge: bool = True) -> Tensor:
    """The smallest box around each mask, in cells.

    Args:
        masks: bool [..., H, W].
        far_edge: x2 and y2 are the far edges of the last cells; False: their indices, as in UniAD,
            so that boxes are a cell too small and those of straight lines have no area.

    Returns:
        [..., 4]; zeros for masks without a cell.
    """
    more = 1 if far_edge else 0
    sides = []
    for along in (masks.any(-2), masks.any(-1)):  # columns that are used: x; rows: y
        count = along.shape[-1]
        first = along.to(torch.uint8).argmax(-1)
        last = count - 1 - along.flip(-1).to(torch.uint8).argmax(-1)
        sides.append((first, last + more))
    (x1, x2), (y1, y2) = sides
    boxes = torch.stack([x1, y1, x2, y2], -1).float()
    return boxes * masks.any(-1).any(-1).unsqueeze(-1)
