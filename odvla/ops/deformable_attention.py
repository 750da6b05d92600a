"""Multi-scale deformable attention: every query reads a few points of a few feature maps.

Deformable DETR's operation (Zhu et al. 2021). Which implementation runs is decided in
odvla.ops.backends.

Shape legend: B batch, Q queries, N heads, L levels, P points a level, E channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from odvla.ops.backends import backend_for


def deformable_attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples; what lies outside a map counts as zero.

    Half-precision inputs are computed in float32, and so is the result: places in half precision
    would be several pixels off.

    Args:
        values: L maps [B, N * E, h, w] (channels of a head stand together). Channels-last memory is
            the fastest.
        locations: [B, Q, N, L, P, 2], (x, y) as fractions of a map's width and height: (0, 0) is
            its outer top left corner, (1, 1) its outer bottom right one.
        weights: [B, Q, N, L, P]; usually a softmax over L * P.

    Returns:
        [B, Q, N * E].

    Raises:
        UserError: the chosen backend cannot run on this device.
    """
    _, queries, _, levels, points = weights.shape
    assert len(values) == levels
    numbers = queries * points * values[0].shape[1]
    backend = backend_for(locations, weights, *values, numbers=numbers)
    with torch.autocast(weights.device.type, enabled=False):
        # One type for all: float32, or float64 where any of them is.
        full = torch.promote_types(torch.float32, locations.dtype)
        full = torch.promote_types(full, values[0].dtype)
        return backend.attention(
            [value.to(full) for value in values], locations.to(full), weights.to(full)
        )


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
