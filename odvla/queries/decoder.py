"""The decoder layer of agent queries and the small parts that query modules share.

Shape legend: B rows, Q queries, C channels, H x W BEV cells, A heads, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odvla import geometry
from odvla.ops.deformable_attention import deformable_attention, ring_offsets
from odvla.types import BevGrid


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Two linear layers around a GELU (a ReLU here died within steps at high learning rates)."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class PositionEncoding(nn.Module):
    """Places on the BEV as learned vectors."""

    def __init__(self, dim: int, grid: BevGrid, waves: int = 16) -> None:
        super().__init__()
        self.waves, self.longest = waves, 2 * grid.cell_m * max(grid.rows, grid.columns)
        self.layers = mlp(2 * waves, dim, dim)

    def forward(self, xy: Tensor) -> Tensor:
        """Places [..., 2] in metres to [..., dim]."""
        return self.layers(geometry.sinusoids(xy, self.waves, self.longest).flatten(-2))


class QueryAttention(nn.Module):
    """Multi-head attention among queries; positions are added to what is compared only.

    The score matrix is small (tens of queries), so it is written out: masks stay readable.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.compare = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            x: [B, Q, C].
            positions: [B, Q, C].
            mask: bool [B, Q], True for queries that may be read; one a row at least.

        Returns:
            [B, Q, C].
        """
        query, key = self.compare(x + positions).unflatten(-1, (2, self.heads, -1)).unbind(2)
        value = self.value(x).unflatten(-1, (self.heads, -1))
        score = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
        score = score.masked_fill(~mask[:, None, None], float("-inf"))
        return self.out(torch.einsum("bhqk,bkhc->bqhc", score.softmax(-1), value).flatten(2))


class BevAttention(nn.Module):
    """Deformable attention from queries to the BEV around their reference points."""

    def __init__(self, dim: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.weights = nn.Linear(dim, heads * points)
        self.out = nn.Linear(dim, dim)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        ring = ring_offsets(heads, points) - ring_offsets(heads, 1)  # first point on the spot
        self.offsets.bias.data = ring.flatten()

    def forward(self, query: Tensor, value: Tensor, reference: Tensor) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C], with positions.
            value: [B, C, H, W].
            reference: [B, Q, 2] fractions of the BEV.

        Returns:
            [B, Q, C].
        """
        shape = (*query.shape[:2], self.heads, 1, self.points)
        size = value.new_tensor(value.shape[:1:-1]).float()  # W, H
        offsets = self.offsets(query).float().view(*shape, 2) / size
        weights = self.weights(query).float().view(shape).softmax(-1)
        locations = reference[:, :, None, None, None] + offsets
        return self.out(deformable_attention([value.float()], locations, weights))


class AgentDecoderLayer(nn.Module):
    """Self-attention, BEV attention, feed-forward; each added and normalised."""

    def __init__(self, dim: int, heads: int, points: int) -> None:
        super().__init__()
        self.among = QueryAttention(dim, heads)
        self.bev = BevAttention(dim, heads, points)
        self.feed = mlp(dim, 2 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, value: Tensor, reference: Tensor
    ) -> Tensor:
        """See QueryAttention and BevAttention; [B, Q, C] in and out."""
        x = self.norms[0](x + self.among(x, positions, mask))
        x = self.norms[1](x + self.bev(x + positions, value, reference))
        return self.norms[2](x + self.feed(x))
