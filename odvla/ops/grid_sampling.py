"""Both operations with torch's grid_sample: short, runs on every device, hungry for memory.

The fastest pure formulation for small sizes, and the one that the others are checked against.

Shape legend: B batch, Q queries, A heads, L levels, P points a level, E channels a head, C channels
in, S places, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """See odvla.ops.deformable_attention."""
    batch, queries, heads = locations.shape[:3]
    grids = locations.permute(3, 0, 2, 1, 4, 5).mul(2).sub(1).flatten(1, 2)  # L, B*A, Q, P, 2
    head_weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # L, B*A, 1, Q, P
    total: Tensor | None = None
    for value, grid, weight in zip(values, grids, head_weights, strict=True):
        by_head = value.reshape(batch * heads, -1, *value.shape[-2:])  # B*A, E, h, w
        sampled = F.grid_sample(by_head, grid, padding_mode="zeros", align_corners=False)
        term = (sampled * weight).sum(-1)  # B*A, E, Q
        total = term if total is None else total + term
    assert total is not None
    return total.view(batch, -1, queries).transpose(1, 2)


def convolution(x: Tensor, y_at: Tensor, x_at: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """See odvla.ops.weighted_bags.convolution."""
    height, width = x.shape[-2:]
    # grid_sample counts from the outer edge of the first pixel (-1) to that of the last (1).
    grid = torch.stack([(2 * x_at + 1) / width - 1, (2 * y_at + 1) / height - 1], -1)
    sampled = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)  # B, C, S, K
    columns = (sampled * mask.unsqueeze(1)).permute(0, 2, 1, 3).flatten(2)  # B, S, C * K
    return columns @ weight.flatten(1).T
