"""Multi-scale deformable attention: every query reads a few points of a few feature maps.

Deformable DETR's operation (Zhu et al. 2021). There is one backend so far, torch's grid_sample;
others may follow behind the same function. On a CPU it is the fastest of those tried (a weighted
embedding_bag is as fast forward, but nearly twice as slow backward).

Shape legend: B batch, Q queries, N heads, L levels, P points a level, E channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples; what lies outside a map counts as zero.

    Args:
        values: L maps [B, N * E, h, w] (channels of a head stand together).
        locations: [B, Q, N, L, P, 2], (x, y) as fractions of a map's width and height: (0, 0) is
            its outer top left corner, (1, 1) its outer bottom right one.
        weights: [B, Q, N, L, P]; usually a softmax over L * P.

    Returns:
        [B, Q, N * E].
    """
    batch, queries, heads, levels = locations.shape[:4]
    assert len(values) == levels
    grids = locations.permute(3, 0, 2, 1, 4, 5).mul(2).sub(1).flatten(1, 2)  # L, B*N, Q, P, 2
    head_weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # L, B*N, 1, Q, P
    total: Tensor | None = None
    for value, grid, weight in zip(values, grids, head_weights, strict=True):
        by_head = value.reshape(batch * heads, -1, *value.shape[-2:])  # B*N, E, h, w
        sampled = F.grid_sample(by_head, grid, padding_mode="zeros", align_corners=False)
        term = (sampled * weight).sum(-1)  # B*N, E, Q
        total = term if total is None else total + term
    assert total is not None
    return total.view(batch, -1, queries).transpose(1, 2)


def bilinear(value: Tensor, locations: Tensor) -> Tensor:
    """Plain bilinear samples.

    Args:
        value: [B, C, h, w].
        locations: [B, Q, 2], fractions as in `deformable_attention`.

    Returns:
        [B, Q, C]; zero outside.
    """
    grid = (locations * 2 - 1).unsqueeze(2)
    sampled = F.grid_sample(value, grid, padding_mode="zeros", align_corners=False)
    return sampled.squeeze(-1).transpose(1, 2)


def ring_offsets(heads: int, points: int, device: torch.device | None = None) -> Tensor:
    """Starting offsets [heads, points, 2]: each head looks its own way, each point one step on.

    Deformable DETR starts its learned offsets like this, so that heads differ from the first step.
    """
    angle = torch.arange(heads, device=device) * (2 * torch.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1, device=device)
    return direction.unsqueeze(1) * steps.view(1, -1, 1)
