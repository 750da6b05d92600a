"""BEVFormer (Li et al. 2022) as UniAD runs it, at full fidelity.

A layer: temporal self-attention over the previous and the current BEV, spatial cross-attention to
the cameras that see a cell's pillar, a feed-forward network; each added and normalised. The CAN bus
vector is embedded into every query; the previous BEV is turned by the change of heading and read at
places shifted by the way driven.

What is unusual: `compat="uniad"` reproduces what released weights were trained with (docs/parity.md
lists it); the layers are in bevformer_layers.py.

Shape legend: B rows, N cameras, L image levels, H x W BEV cells, Q = H * W, Z heights, C channels,
A heads, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odvla.encoders.bev_motion import motion_of, turn_bev
from odvla.encoders.bevformer_layers import BEVFormerLayer, LayerInputs, project_pillars
from odvla.encoders.protocol import EncoderState, fake_frames, require_images
from odvla.encoders.resnet import FPN, MULTIPLE, ResNetConfig, padded_size
from odvla.errors import check_sizes
from odvla.types import BevGrid, Frames, SceneFeatures

Compat = Literal["none", "uniad"]
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
        check_sizes(self, "dim", "rows", "columns", "cameras", "layers", "heads", "heights")
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
