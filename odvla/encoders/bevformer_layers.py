"""The layers of BEVFormer (Li et al. 2022): attention to the past and to the cameras.

What is unusual: every row of a batch has its own visible cells, where the reference takes those of
the first row for all; a camera's queries are gathered exactly instead of padded to the longest.

Shape legend: B rows, N cameras, L image levels, H x W BEV cells, Q = H * W, Z heights, C channels,
A heads, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla.ops.deformable_attention import deformable_attention, ring_offsets
from odvla.ops.transformer import FeedForward, Size, as_maps
from odvla.types import Cameras

if TYPE_CHECKING:  # the encoder, which has the config, is made of these layers
    from odvla.encoders.bevformer import BEVFormerConfig

NEAREST_M = 1e-5  # a point must be so far in front of a camera


@dataclass(frozen=True)
class Projection:
    """Where the pillars' points lie in the images."""

    uv: Tensor  # [B, N, Q, Z, 2] fractions of the padded image; finite everywhere
    visible: Tensor  # bool [B, N, Q, Z]


def project_pillars(points: Tensor, cameras: Cameras, size: Size) -> Projection:
    """Project pillar points, in float32 whatever the model runs in.

    Args:
        points: [Q, Z, 3] metres, lidar frame.
        cameras: calibration of B rows.
        size: (height, width) of the padded images, pixels.
    """
    with torch.autocast(points.device.type, enabled=False):
        to_image = cameras.intrinsics.float() @ cameras.lidar_to_cam.float()[..., :3, :]
        rotation, offset = to_image[..., :3].transpose(-1, -2), to_image[..., 3]
        flat = points.float().flatten(0, 1) @ rotation + offset.unsqueeze(-2)  # B, N, Q*Z, 3
        depth = flat[..., 2:]
        uv = flat[..., :2] / depth.clamp(min=NEAREST_M)
        uv = uv / uv.new_tensor([size[1], size[0]])
        inside = (depth[..., 0] > NEAREST_M) & (uv > 0).all(-1) & (uv < 1).all(-1)
    shape = points.shape[:2]
    return Projection(uv.unflatten(2, shape), inside.unflatten(2, shape))


class TemporalAttention(nn.Module):
    """Each cell reads the previous and the current BEV, and takes the mean of both."""

    QUEUE = 2  # previous, current

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        dim, self.heads, self.points = config.dim, config.heads, config.temporal_points
        samples = self.QUEUE * self.heads * self.points
        self.sampling_offsets = nn.Linear(self.QUEUE * dim, samples * 2)
        self.attention_weights = nn.Linear(self.QUEUE * dim, samples)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        ring = ring_offsets(self.heads, self.points).unsqueeze(1)
        start_attention(self, ring.expand(-1, self.QUEUE, -1, -1))

    def forward(
        self, query: Tensor, positions: Tensor, values: Sequence[Tensor], at: Tensor, size: Size
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C].
            positions: [B, Q, C].
            values: previous and current BEV, each [B, Q, C].
            at: [B, 2, Q, 2] places in either, fractions (x, y).
            size: H, W.

        Returns:
            [B, Q, C] with the residual sum.
        """
        asking = torch.cat([values[0], query + positions], -1)
        shape = (*query.shape[:2], self.heads, self.QUEUE, self.points)
        offsets = offset_fractions(self.sampling_offsets, asking, [size] * self.QUEUE, self.points)
        weights = self.attention_weights(asking).float().view(shape).softmax(-1)
        locations = at.transpose(1, 2)[:, :, None, :, None] + offsets.view(*shape, 2)
        # The mean over both maps is the sum with halved weights, in one call.
        maps = [as_maps(self.value_proj(values[0]), [size])[0]]
        same = values[1] is values[0]
        maps.append(maps[0] if same else as_maps(self.value_proj(values[1]), [size])[0])
        read = deformable_attention(maps, locations, weights / self.QUEUE).to(query.dtype)
        return query + self.dropout(self.output_proj(read))


class SpatialAttention(nn.Module):
    """Each cell reads the cameras that see its pillar, and takes the mean of them."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        dim, self.heads, self.points = config.dim, config.heads, config.spatial_points
        self.levels, self.heights = config.levels, config.heights
        samples = self.heads * self.levels * self.points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        ring = ring_offsets(self.heads, self.points).unsqueeze(1)
        start_attention(self, ring.expand(-1, self.levels, -1, -1))

    def forward(
        self, query: Tensor, value: Tensor, sizes: Sequence[Size], seen: Projection
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C].
            value: [B, N, sum of h * w, C], the L maps of each camera one after the other.
            sizes: (h, w) of each level.
            seen: where the pillars are.

        Returns:
            [B, Q, C] with the residual sum.
        """
        offsets = offset_fractions(self.sampling_offsets, query, sizes, self.points)
        weights = self.attention_weights(query).float()
        weights = weights.view(*query.shape[:2], self.heads, -1).softmax(-1).flatten(2)
        any_height = seen.visible.any(-1)  # B, N, Q
        rows = []
        for row in range(len(query)):
            total = query.new_zeros(query.shape[1:], dtype=torch.float32)
            for camera, visible in enumerate(any_height[row]):
                cells = visible.nonzero()[:, 0]
                if len(cells) == 0:
                    continue
                # Cells of one camera at a time: a map of all cameras' samples would take gigabytes.
                maps = as_maps(self.value_proj(value[row, camera][None]), sizes)
                read = self.read(
                    maps,
                    offsets[row].index_select(0, cells),
                    weights[row].index_select(0, cells),
                    seen.uv[row, camera].index_select(0, cells),
                )
                total = total.index_add(0, cells, read)
            rows.append(total)
        cameras = any_height.sum(1).clamp(min=1).unsqueeze(-1)  # B, Q, 1
        mean = (torch.stack(rows) / cameras).to(query.dtype)
        return query + self.dropout(self.output_proj(mean))

    def read(
        self, maps: Sequence[Tensor], offsets: Tensor, weights: Tensor, pillars: Tensor
    ) -> Tensor:
        """What V cells read in one camera.

        Args:
            maps: L levels [1, C, h, w].
            offsets: [V, A * L * P * 2] fractions.
            weights: [V, A * L * P].
            pillars: [V, Z, 2] fractions.

        Returns:
            [V, C].
        """
        # Point p belongs to height p % Z.
        repeats = self.points // self.heights
        places = offsets.unflatten(-1, (-1, repeats, self.heights, 2)) + pillars[:, None, None]
        shape = (1, len(offsets), self.heads, self.levels, self.points)
        return deformable_attention(maps, places.view(*shape, 2), weights.view(shape))[0]


def offset_fractions(layer: nn.Linear, x: Tensor, sizes: Sequence[Size], points: int) -> Tensor:
    """Offsets that a layer predicts in pixels of L levels, as fractions of the levels.

    Args:
        layer: C to A * L * P * 2, (x, y) fastest.
        x: [..., C].
        sizes: (h, w) of each level.
        points: P.

    Returns:
        [..., A * L * P * 2] float32.
    """
    # Dividing the layer's few weights is the same as dividing its many results.
    per_level = layer.weight.new_tensor([(1 / w, 1 / h) for h, w in sizes])  # L, 2
    scale = per_level.repeat_interleave(points, 0).flatten()  # L * P * 2
    scale = scale.repeat(layer.out_features // len(scale))
    return F.linear(x, layer.weight * scale.unsqueeze(-1), layer.bias * scale).float()


def start_attention(module: TemporalAttention | SpatialAttention, ring: Tensor) -> None:
    """BEVFormer's start: offsets on a ring, equal weights."""
    for layer in (module.sampling_offsets, module.attention_weights):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        module.sampling_offsets.bias.copy_(ring.flatten())
    for layer in (module.value_proj, module.output_proj):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class LayerInputs:
    """What all layers share."""

    positions: Tensor  # [B, Q, C]
    previous: Tensor | None  # [B, Q, C], turned; meaningless where `known` is False
    known: Tensor  # bool [B]
    first: Tensor  # [B, Q, C], the queries before the first layer
    at: Tensor  # [B, 2, Q, 2], see TemporalAttention
    image: Tensor  # [B, N, sum of h * w, C]
    sizes: tuple[Size, ...]  # of the image levels
    seen: Projection
    size: Size  # H, W


class BEVFormerLayer(nn.Module):
    """Temporal self-attention, spatial cross-attention, feed-forward."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.temporal_attention = TemporalAttention(config)
        self.spatial_attention = SpatialAttention(config)
        self.ffn = FeedForward(config.dim, config.hidden, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(3))

    def attend_past(self, bev: Tensor, given: LayerInputs) -> Tensor:
        """Temporal self-attention alone: [B, Q, C] in and out, before its norm."""
        # With a past, the "current" half is what the queries were before the first layer (BEVFormer
        # stacks it once); without, both halves are what they are now.
        values = (bev, bev)
        if given.previous is not None:
            known = given.known[:, None, None]
            values = (torch.where(known, given.previous, bev), torch.where(known, given.first, bev))
        return self.temporal_attention(bev, given.positions, values, given.at, given.size)

    def forward(self, bev: Tensor, given: LayerInputs) -> Tensor:
        """[B, Q, C] in and out."""
        bev = self.norms[0](self.attend_past(bev, given))
        bev = self.norms[1](self.spatial_attention(bev, given.image, given.sizes, given.seen))
        return self.norms[2](self.ffn(bev))
