"""BEVFormer (Li et al. 2022) as UniAD runs it, at full fidelity.

A layer: temporal self-attention over the previous and the current BEV, spatial cross-attention to
the cameras that see a cell's pillar, a feed-forward network; each added and normalised. The CAN bus
vector is embedded into every query; the previous BEV is turned by the change of heading and read at
places shifted by the way driven.

What is unusual: `compat="uniad"` reproduces what released weights were trained with (docs/parity.md
lists it); every row of a batch has its own visible cells, where the reference takes those of the
first row for all; a camera's queries are gathered exactly instead of padded to the longest.

Shape legend: B rows, N cameras, L image levels, H x W BEV cells, Q = H * W, Z heights, C channels,
A heads, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odvla.encoders.bev_motion import motion_of, turn_bev
from odvla.encoders.protocol import EncoderState, fake_frames, require_images
from odvla.encoders.resnet import FPN, MULTIPLE, ResNetConfig, padded_size
from odvla.ops.deformable_attention import deformable_attention, ring_offsets
from odvla.ops.transformer import FeedForward, Size, as_maps
from odvla.types import BevGrid, Cameras, Frames, SceneFeatures

Compat = Literal["none", "uniad"]
NEAREST_M = 1e-5  # a point must be so far in front of a camera
PIXELS_AT_ONCE = 1 << 21  # of images that go through the backbone together on a CPU


@dataclass(frozen=True)
class BEVFormerConfig:
    """Sizes of BEVFormer; the defaults are UniAD's and OpenDriveVLA's."""

    backbone: Any = field(default_factory=ResNetConfig)  # anything with build() and channels
    dim: int = 256
    rows: int = 200
    columns: int = 200
    # x_min, y_min, z_min, x_max, y_max, z_max in the lidar frame
    range_m: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    cameras: int = 6
    levels: int = 4
    layers: int = 6
    heads: int = 8
    hidden: int = 512  # of the feed-forward network
    heights: int = 4  # points a pillar
    spatial_points: int = 8  # a head and image level, shared out among the heights
    temporal_points: int = 4
    dropout: float = 0.1
    # Recompute what a layer keeps in the backward pass, as ResNetConfig.checkpoint does for blocks.
    checkpoint: bool = False
    # "uniad": the shift moves the places in the current BEV, too, as it did when UniAD's weights
    # were trained; "none": only those in the previous one, as the paper has it.
    compat: Compat = "none"
    # (x, y) cell about which the previous BEV turns; () is the middle.
    rotate_center: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(
                f"encoder.dim {self.dim} must be even and a multiple of encoder.heads {self.heads}"
            )
        if self.spatial_points % self.heights:
            raise ValueError(
                f"encoder.spatial_points {self.spatial_points} must be a multiple of "
                f"encoder.heights {self.heights}"
            )
        if self.levels < len(self.backbone.channels):
            raise ValueError(
                f"encoder.levels {self.levels} must be at least the backbone's "
                f"{len(self.backbone.channels)}"
            )
        x0, y0, z0, x1, y1, z1 = self.range_m
        if not (x0 < x1 and y0 < y1 and z0 < z1):
            raise ValueError(f"encoder.range_m {self.range_m} must be mins, then larger maxs")
        if not math.isclose((x1 - x0) / self.columns, (y1 - y0) / self.rows, rel_tol=1e-6):
            raise ValueError(
                f"encoder: {self.rows} rows and {self.columns} columns of range_m {self.range_m} "
                "give cells that are not square"
            )

    @property
    def grid(self) -> BevGrid:
        """Where the BEV cells lie."""
        x_min, y_min, _, x_max = self.range_m[:4]
        cell = (x_max - x_min) / self.columns
        return BevGrid(x_min, y_min, cell, self.rows, self.columns)

    def build(self) -> BEVFormer:
        """The encoder, freshly initialised."""
        return BEVFormer(self)

    def fake_batch(self, batch: int = 2, *, seed: int = 0, step: int = 0) -> Frames:
        """Frames that fit this encoder, for tests and `check_encoder`."""
        return fake_frames(batch, seed=seed, step=step)


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


class BEVFormer(nn.Module):
    """Images, CAN bus and the previous BEV to the current BEV; see the module's head."""

    pillars: Tensor
    centres: Tensor

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config, self.dim, self.grid = config, config.dim, config.grid
        dim, half = config.dim, config.dim // 2
        self.backbone = config.backbone.build()
        self.neck = FPN(config.backbone.channels, dim, config.levels)
        self.bev_embedding = nn.Embedding(config.rows * config.columns, dim)
        self.row_embed = nn.Embedding(config.rows, half)
        self.col_embed = nn.Embedding(config.columns, half)
        self.level_embeds = nn.Parameter(torch.empty(config.levels, dim))
        self.cams_embeds = nn.Parameter(torch.empty(config.cameras, dim))
        self.can_bus_mlp = nn.Sequential(
            nn.Linear(18, half),
            nn.ReLU(),
            nn.Linear(half, dim),
            nn.ReLU(),
            nn.LayerNorm(dim),
        )
        self.layers = nn.ModuleList(BEVFormerLayer(config) for _ in range(config.layers))
        nn.init.normal_(self.level_embeds)
        nn.init.normal_(self.cams_embeds)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)
        self.register_buffer("pillars", pillar_points(config), persistent=False)
        self.register_buffer("centres", cell_fractions(config), persistent=False)

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState]:
        """Encode one key-frame; see odvla.encoders.protocol.Encoder.

        Raises:
            UserError: there are not as many cameras as this encoder was built for, or the images
                are too small.
        """
        levels = self.image_levels(frames)
        bev = self.encode_bev(levels, frames, state)
        bev = bev.unflatten(1, (self.config.rows, self.config.columns))  # B, H, W, C
        features = SceneFeatures(levels=levels, bev=bev, grid=self.grid)
        known = torch.ones_like(frames.scene_start)
        return features, EncoderState(bev, frames.lidar_to_global, known)

    def image_levels(self, frames: Frames) -> tuple[Tensor, ...]:
        """Feature maps [B, N, C, h, w], fine to coarse."""
        require_images(frames.images, self.config.cameras, MULTIPLE)
        images = frames.images.flatten(0, 1)
        at_once = len(images)
        if images.device.type == "cpu" and not torch.is_grad_enabled():
            # Full-size cameras one after the other: a sixth of the memory, and no slower.
            at_once = max(1, min(at_once, PIXELS_AT_ONCE // images[0, 0].numel()))
        parts = [self.neck(self.backbone(part)) for part in images.split(at_once)]
        maps = [torch.cat(levels) for levels in zip(*parts, strict=True)]
        return tuple(level.unflatten(0, frames.images.shape[:2]) for level in maps)

    def encode_bev(
        self, levels: Sequence[Tensor], frames: Frames, state: EncoderState | None
    ) -> Tensor:
        """Image features [B, N, C, h, w] and the past to the BEV [B, Q, C]."""
        bev, given = self.prepare(levels, frames, state)
        recompute = self.config.checkpoint and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                bev = checkpoint(layer, bev, given, use_reentrant=False)
            else:
                bev = layer(bev, given)
        return bev

    def prepare(
        self, levels: Sequence[Tensor], frames: Frames, state: EncoderState | None
    ) -> tuple[Tensor, LayerInputs]:
        """Queries [B, Q, C] before the first layer, and what all layers share."""
        batch, size = len(frames.scene_start), (self.config.rows, self.config.columns)
        can_bus = frames.can_bus.to(self.level_embeds.dtype)
        queries = self.bev_embedding.weight + self.can_bus_mlp(can_bus).unsqueeze(1)  # B, Q, C
        motion = motion_of(frames.can_bus, self.grid)
        known = torch.zeros_like(frames.scene_start)
        previous = None
        if state is not None:
            known = state.valid & ~frames.scene_start
            turned = turn_bev(
                state.bev.permute(0, 3, 1, 2), motion.turn_deg, self.config.rotate_center
            )
            previous = turned.flatten(2).transpose(1, 2).to(queries.dtype)
        image_size = padded_size(*frames.images.shape[-2:])
        given = LayerInputs(
            positions=self.positions().expand(batch, -1, -1),
            previous=previous,
            known=known,
            first=queries,
            at=self.places(motion.shift),
            image=self.image_tokens(levels),
            sizes=tuple((level.shape[-2], level.shape[-1]) for level in levels),
            seen=project_pillars(self.pillars, frames.cameras, image_size),
            size=size,
        )
        return queries, given

    def positions(self) -> Tensor:
        """Learned positions [Q, C]: a column's embedding, then a row's."""
        rows, columns = self.config.rows, self.config.columns
        by_column = self.col_embed.weight.expand(rows, -1, -1)
        by_row = self.row_embed.weight.unsqueeze(1).expand(-1, columns, -1)
        return torch.cat([by_column, by_row], -1).flatten(0, 1)

    def places(self, shift: Tensor) -> Tensor:
        """Where cells are looked for in the previous and in the current BEV: [B, 2, Q, 2]."""
        before = self.centres + shift.unsqueeze(1)
        # UniAD adds the shift to both halves: its shifted points are the very tensor of the others.
        now = before if self.config.compat == "uniad" else self.centres.expand_as(before)
        return torch.stack([before, now], 1)

    def image_tokens(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, N, C, h, w] as [B, N, sum of h * w, C], with camera and level embeddings."""
        tokens = [
            level.flatten(3).transpose(2, 3) + (self.cams_embeds.unsqueeze(1) + embedding)
            for level, embedding in zip(levels, self.level_embeds, strict=True)
        ]
        return torch.cat(tokens, 2)


def cell_fractions(config: BEVFormerConfig) -> Tensor:
    """Centres of the BEV cells [Q, 2], (x, y) as fractions of the BEV."""
    x = (torch.arange(config.columns) + 0.5) / config.columns
    y = (torch.arange(config.rows) + 0.5) / config.rows
    grid = torch.stack([x.expand(config.rows, -1), y.unsqueeze(1).expand(-1, config.columns)], -1)
    return grid.flatten(0, 1)


def pillar_points(config: BEVFormerConfig) -> Tensor:
    """Points of the pillars [Q, Z, 3], metres in the lidar frame.

    The heights run from half a metre above the lower end of the range to half a metre below the
    upper one, evenly (BEVFormer's get_reference_points).
    """
    x0, y0, z0, x1, y1, z1 = config.range_m
    fractions = cell_fractions(config)
    xy = fractions * torch.tensor([x1 - x0, y1 - y0]) + torch.tensor([x0, y0])
    # Not torch.linspace: once transformers has made a model, that ignores torch.device("meta").
    step = (z1 - z0 - 1) / max(config.heights - 1, 1)
    z = torch.arange(config.heights) * step + (z0 + 0.5)
    return torch.cat(
        [
            xy.unsqueeze(1).expand(-1, config.heights, -1),
            z.view(1, -1, 1).expand(len(xy), -1, 1),
        ],
        -1,
    )
