"""Panoptic SegFormer's mask decoder as UniAD uses it: attention scores are the masks.

Queries attend to all cells of the BEV; the raw scores of the heads, mixed by two tiny layers, are
also the mask a query paints (Li et al. 2022, section 3.4). Masks end with a ReLU, not a sigmoid:
values are >= 0, a cell counts as covered above 0.5, and nothing keeps them below 1.

What is unusual: with few queries (the one of the drivable area) keys and values of the cells are
never computed. q . (W m + b) = (W^T q) . m + q . b, so the small side is projected instead of
40,000 cells; and masks between the layers are computed only where a loss asks for them.

Shape legend: B rows, N queries, S cells, C channels, A heads, E = C / A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of this head's LayerNorms; 1e-5 elsewhere
WIDTH_RATIO = 4  # hidden width of the feed-forward network over C


@dataclass(frozen=True)
class Painted:
    """What a mask head makes of B x N queries."""

    mask: Tensor  # [B, N, S], >= 0
    layer_masks: tuple[Tensor, ...]  # the same after each layer; () unless asked for
    layer_queries: tuple[Tensor, ...]  # [B, N, C] after each layer

    @property
    def queries(self) -> Tensor:
        """Queries after the last layer [B, N, C]."""
        return self.layer_queries[-1]


class MaskScores(nn.Module):
    """Multi-head scores of queries on cells, and the mask they mean.

    Args:
        dim: C.
        heads: A.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.linear_l1 = nn.Sequential(nn.Linear(heads, heads), nn.ReLU())
        self.linear = nn.Sequential(nn.Linear(heads, 1), nn.ReLU())

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """The mask [B, N, S] of queries [B, N, C] on cells [B, S, C]."""
        return self.paint(self.scores(query, memory))

    def scores(self, query: Tensor, memory: Tensor) -> Tensor:
        """[B, A, N, S]."""
        asked = self.q(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, A, N, E
        if self._few(query):
            weight, bias = self._by_head(self.k)
            looks_for = (asked @ weight).flatten(1, 2)  # B, A * N, C
            score = (looks_for @ memory.transpose(1, 2)).unflatten(1, (self.heads, -1))
            score = score + (asked * bias.unsqueeze(1)).sum(-1, keepdim=True)
        else:
            score = asked @ self._split(self.k(memory)).transpose(2, 3)
        return score * self.scale

    def paint(self, scores: Tensor) -> Tensor:
        """Scores [B, A, N, S] to masks [B, N, S]: two layers over the heads, cell by cell."""
        hidden = _mix(self.linear_l1[0], scores).relu()
        return _mix(self.linear[0], hidden).relu().squeeze(1)

    def _few(self, query: Tensor) -> bool:
        """Whether projecting A * N query rows costs less than projecting the cells' C channels."""
        return query.shape[1] * (self.heads - 1) < query.shape[2]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, A, S, E

    def _by_head(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight [A, E, C] and bias [A, E]."""
        return (
            layer.weight.unflatten(0, (self.heads, -1)),
            layer.bias.unflatten(0, (self.heads, -1)),
        )


def _mix(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer over dimension 1, without moving it to the end and back."""
    assert isinstance(layer, nn.Linear)
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


class MaskAttention(MaskScores):
    """The same scores, and what is read with them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def attend(self, query: Tensor, memory: Tensor, *, paint: bool) -> tuple[Tensor, Tensor | None]:
        """What queries read [B, N, C], and their mask [B, N, S] if `paint`."""
        if paint:
            scores = self.scores(query, memory)
            read = self._read(scores.softmax(-1), memory)
            return self.proj(read), self.paint(scores)
        return self.proj(self._read_only(query, memory)), None

    def _read(self, share: Tensor, memory: Tensor) -> Tensor:
        """Shares [B, A, N, S] to what is read [B, N, C]."""
        if share.shape[2] * (self.heads - 1) < memory.shape[2]:
            weight, bias = self._by_head(self.v)
            cells = (share.flatten(1, 2) @ memory).unflatten(1, (self.heads, -1))  # B, A, N, C
            # Shares sum to 1: the bias counts once.
            return (cells @ weight.transpose(1, 2) + bias.unsqueeze(1)).transpose(1, 2).flatten(2)
        return (share @ self._split(self.v(memory))).transpose(1, 2).flatten(2)

    def _read_only(self, query: Tensor, memory: Tensor) -> Tensor:
        """The same without ever holding the scores of all cells."""
        if self._few(query):
            return self._read(self.scores(query, memory).softmax(-1), memory)
        asked, key, value = (
            self._split(x) for x in (self.q(query), self.k(memory), self.v(memory))
        )
        read = F.scaled_dot_product_attention(asked, key, value)
        return read.transpose(1, 2).flatten(2)


class QuerySelfAttention(nn.Module):
    """Plain self-attention among queries, without positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] in and out."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value)
        return self.proj(read.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, WIDTH_RATIO * dim)
        self.fc2 = nn.Linear(WIDTH_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] in and out."""
        return self.fc2(F.gelu(self.fc1(x)))


class MaskBlock(nn.Module):
    """One layer: self-attention if asked for, attention to the cells, feed-forward."""

    def __init__(self, dim: int, heads: int, *, self_attention: bool) -> None:
        super().__init__()
        self.attn = MaskAttention(dim, heads)
        self.mlp = Mlp(dim)
        self.head_norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head_norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.has_self_attention = self_attention
        if self_attention:
            self.self_attention = QuerySelfAttention(dim, heads)
            self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, memory: Tensor, *, paint: bool) -> tuple[Tensor, Tensor | None]:
        """Queries [B, N, C] in and out, and their mask [B, N, S] if `paint`."""
        if self.has_self_attention:
            x = self.norm3(x + self.self_attention(x))
        read, mask = self.attn.attend(x, memory, paint=paint)
        x = self.head_norm1(x + read)
        return self.head_norm2(x + self.mlp(x)), mask


class MaskHead(nn.Module):
    """Layers, and scores once more as the final mask.

    Args:
        dim: C.
        heads: A.
        layers: number of MaskBlocks.
        self_attention: among the queries, first thing in each layer.
    """

    def __init__(self, dim: int, heads: int, layers: int, *, self_attention: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MaskBlock(dim, heads, self_attention=self_attention) for _ in range(layers)
        )
        self.attnen = MaskScores(dim, heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, as in UniAD, but no mask starts dead.

        The last of the tiny layers gets weights >= 0: with an unlucky sign of all eight, its ReLU
        would give 0 everywhere and never learn.
        """
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MaskScores):
                last = module.linear[0]
                assert isinstance(last, nn.Linear)
                with torch.no_grad():
                    last.weight.abs_()
                nn.init.zeros_(last.bias)

    def forward(
        self,
        memory: Tensor,
        query: Tensor,
        positions: Tensor | None = None,
        *,
        paint_layers: bool = False,
    ) -> Painted:
        """Paint.

        Args:
            memory: cells [B, S, C].
            query: [B, N, C].
            positions: [B, N, C], added to the queries before every layer (and, as in UniAD, kept in
                what goes on: a layer's input holds the positions, so they pile up); None: none.
            paint_layers: also give the masks of every layer.

        Returns:
            Masks and queries.
        """
        masks, queries = [], []
        x = query
        for block in self.blocks:
            x, mask = block(x if positions is None else x + positions, memory, paint=paint_layers)
            queries.append(x)
            if mask is not None:
                masks.append(mask.float())
        final = self.attnen(x if positions is None else x + positions, memory)
        return Painted(final.float(), tuple(masks), tuple(queries))
