"""The transformer parts that BEVFormer, the track decoder and the map head have in common.

They compute what mmcv's and Deformable DETR's layers compute: post-norm, dropout before each sum,
positions added to what is compared and to what asks, never to what is read.

Shape legend: B rows, Q queries, C channels, A heads, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odvla.ops.deformable_attention import deformable_attention, ring_offsets

Size = tuple[int, int]  # height, width


class DeformableAttention(nn.Module):
    """Deformable DETR's multi-scale deformable attention, without the residual sum.

    Geometry and sampling are done in float32 whatever the autocast type is.

    Args:
        dim: C.
        heads: A.
        levels: L, maps a query reads.
        points: P, points a head reads of a level.
        dropout: of the output.
        uniad_levels: a number > 1 gives the layer weights for so many levels, although it reads
            one, and makes it use them as UniAD's map head does (see docs/parity.md, "map head
            stride"): the compiled op of mmcv walks through the buffers of offsets and weights with
            the stride of one level, so that query q and head h get what was computed for another
            query and head. Needed by every checkpoint that was trained that way.

    Raises:
        ValueError: `uniad_levels` with more than one level to read.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        levels: int = 1,
        points: int = 4,
        *,
        dropout: float = 0.1,
        uniad_levels: int = 1,
    ) -> None:
        super().__init__()
        if uniad_levels > 1 and levels > 1:
            raise ValueError(f"uniad_levels {uniad_levels} needs levels=1, not {levels}")
        self.heads, self.levels, self.points = heads, levels, points
        self.stored_levels = max(levels, uniad_levels)
        samples = heads * self.stored_levels * points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Deformable DETR's start: offsets on a ring, equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        ring = ring_offsets(self.heads, self.points).unsqueeze(1)  # A, 1, P, 2
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.stored_levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, sizes: Sequence[Size], at: Tensor) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C], positions added.
            value: [B, sum of h * w, C], the L maps one after the other, row by row.
            sizes: (h, w) of each.
            at: reference points [B, Q, 2], (x, y) fractions; or boxes [B, Q, 4], (x, y, w, h)
                fractions, whose size then scales the offsets.

        Returns:
            [B, Q, C].
        """
        maps = as_maps(self.value_proj(value), sizes)
        locations, weights = self._where(query, sizes, at)
        read = deformable_attention(maps, locations, weights).to(query.dtype)
        return self.dropout(self.output_proj(read))

    def _where(self, query: Tensor, sizes: Sequence[Size], at: Tensor) -> tuple[Tensor, Tensor]:
        """Locations [B, Q, A, L, P, 2] and weights [B, Q, A, L, P]."""
        batch, queries = query.shape[:2]
        if self.stored_levels > self.levels:
            # The walk with too short a stride ends in the first part of the buffers: what the other
            # queries would get there is never used.
            used = -(-queries * self.levels // self.stored_levels)
            query, at = query[:, :used], at[:, :used]
        shape = (batch, query.shape[1], self.heads, self.stored_levels, self.points)
        offsets = self.sampling_offsets(query).float().view(*shape, 2)
        weights = self.attention_weights(query).float().view(*shape[:3], -1).softmax(-1)
        weights = weights.view(shape)
        at = at.float()[:, :, None, None, None]
        if at.shape[-1] == 4:
            locations = at[..., :2] + offsets * (at[..., 2:] * (0.5 / self.points))
        else:
            size = offsets.new_tensor([(w, h) for h, w in sizes])  # L, 2
            locations = at + offsets / size[:, None]
        if self.stored_levels > self.levels:
            locations = _first(locations, (queries, self.heads, 1, self.points, 2))
            weights = _first(weights, (queries, self.heads, 1, self.points))
        return locations, weights


def _first(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first entries of each row's buffer, read as another shape."""
    return buffer.flatten(1)[:, : math.prod(shape)].view(-1, *shape)


def as_maps(value: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """[B, sum of h * w, C] as maps [B, C, h, w]."""
    parts = value.float().transpose(1, 2).split([h * w for h, w in sizes], -1)
    return [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]


class FeedForward(nn.Module):
    """Linear, ReLU, linear, with the residual sum."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] in and out."""
        return x + self.dropout(self.fc2(self.dropout(self.fc1(x).relu())))


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention, feed-forward; each added and normalised.

    Args:
        dim: C.
        heads: of both attentions.
        hidden: width inside the feed-forward network.
        points: of the deformable attention, which reads one level.
        dropout: everywhere.
        uniad_levels: see DeformableAttention.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        hidden: int = 512,
        points: int = 4,
        *,
        dropout: float = 0.1,
        uniad_levels: int = 1,
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.cross_attention = DeformableAttention(
            dim, heads, 1, points, dropout=dropout, uniad_levels=uniad_levels
        )
        self.ffn = FeedForward(dim, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        value: Tensor,
        size: Size,
        at: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: [B, Q, C].
            positions: [B, Q, C].
            value: [B, h * w, C], the one map that is read.
            size: (h, w).
            at: see DeformableAttention.
            padding: bool [B, Q], True for queries that nobody may read; None: all may be.

        Returns:
            [B, Q, C].
        """
        place = x + positions
        among, _ = self.self_attention(
            place, place, x, key_padding_mask=padding, need_weights=False
        )
        x = self.norms[0](x + self.dropout(among))
        x = self.norms[1](x + self.cross_attention(x + positions, value, [size], at))
        return self.norms[2](self.ffn(x))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x, with x and 1 - x kept above eps (Deformable DETR's)."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
