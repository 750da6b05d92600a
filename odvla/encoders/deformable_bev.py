"""A small BEVFormer: BEV queries gather image features where their pillars project to.

BEVFormer's three steps a layer (Li et al. 2022): spatial cross-attention reads the cameras,
temporal self-attention reads the current and the previous BEV, a feed-forward network mixes.
Unusual here:

- The cameras come before the past: with few layers, queries then know what they look for in it.
- The previous BEV stays as it is; each cell looks at the place where it was in the previous frame
  (exact for any ego motion), instead of at a rotated and shifted copy.
- Only (camera, pillar) pairs where the camera sees the pillar are computed: all cameras of all rows
  lie in one tall image, in which every pair samples its own place.
- The feed-forward network is a 3x3 convolution over the BEV, and head n starts out looking at
  height n, so that the ground contact of things is found within few steps of training.

Shape legend: B rows, N cameras, L image levels, Q = H * W pillars, Z heights, V visible pairs,
C = dim channels, A heads, P points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.image_backbone import (
    FeaturePyramid,
    ImageBackboneConfig,
    ResidualBlock,
    conv,
)
from odvla.encoders.pillars import PillarView, in_tall, places_before, tall_image, view_pillars
from odvla.encoders.protocol import EncoderState, fake_frames, require_images
from odvla.errors import check_sizes
from odvla.ops.deformable_attention import deformable_attention, ring_offsets
from odvla.types import BevGrid, Cameras, Frames, SceneFeatures


@dataclass(frozen=True)
class DeformableBEVConfig:
    """Sizes of DeformableBEV; the defaults are for learning within minutes on two CPU cores."""

    backbone: ImageBackboneConfig = field(default_factory=ImageBackboneConfig)
    dim: int = 48
    x_min_m: float = -32.0
    y_min_m: float = -32.0
    cell_m: float = 2.0
    rows: int = 32
    columns: int = 32
    strides: tuple[int, ...] = (4,)  # image levels the pillars read and the scene sampler gets
    # Lidar frame; the lidar hangs 1.84 m above the road.
    heights_m: tuple[float, ...] = (-1.84, -1.2, -0.4, 0.6)
    layers: int = 1
    heads: int = 4
    spatial_points: int = 2  # a head and image level
    temporal_points: int = 1  # a head and BEV
    bev_blocks: int = 2  # residual blocks on the finished BEV
    ray_embedding: bool = True  # tell image features where in space their pixel looks
    can_bus: bool = False  # BEVFormer adds CAN bus values to the queries; it leaks the ego's speed

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "dim", "rows", "columns", "layers", "heads")
        if self.dim % self.heads or self.dim % 8:
            raise ValueError(
                f"encoder.dim {self.dim} must be a multiple of 8 and of encoder.heads {self.heads}"
            )
        unknown = set(self.strides) - set(self.backbone.strides)
        if unknown or not self.strides:
            raise ValueError(
                f"encoder.strides {self.strides} must be some of the backbone's "
                f"{self.backbone.strides}"
            )

    @property
    def grid(self) -> BevGrid:
        """Where the BEV cells lie."""
        return BevGrid(self.x_min_m, self.y_min_m, self.cell_m, self.rows, self.columns)

    def build(self) -> DeformableBEV:
        """The encoder, freshly initialised."""
        return DeformableBEV(self)

    def fake_batch(self, batch: int = 2, *, seed: int = 0, step: int = 0) -> Frames:
        """Frames that fit this encoder, for tests and `check_encoder`."""
        return fake_frames(batch, seed=seed, step=step)


class TemporalAttention(nn.Module):
    """Each cell reads the current and the previous BEV around where it is and where it was."""

    def __init__(self, config: DeformableBEVConfig) -> None:
        super().__init__()
        self.heads, self.points = config.heads, config.temporal_points
        samples = config.heads * 2 * config.temporal_points  # A, (current, previous), P
        self.value = nn.Conv2d(config.dim, config.dim, 1)
        self.offsets = nn.Linear(config.dim, samples * 2)
        self.weights = nn.Linear(config.dim, samples)
        self.out = nn.Linear(config.dim, config.dim)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        nn.init.zeros_(self.offsets.weight)
        # The first point of a head starts on the spot, the others on a ring.
        ring = ring_offsets(self.heads, self.points) - ring_offsets(self.heads, 1)
        self.offsets.bias.data = ring.unsqueeze(1).expand(-1, 2, -1, -1).flatten()

    def forward(self, query: Tensor, positions: Tensor, previous: Tensor, where: Tensor) -> Tensor:
        """Attend.

        Args:
            query: [B, C, H, W], the current BEV.
            positions: [1, C, H, W], added to see where a query is.
            previous: [B, C, H, W], the previous BEV as it was.
            where: [B, Q, 2, 2]: (x, y) fractions in the current and in the previous BEV.

        Returns:
            [B, C, H, W].
        """
        batch, _, rows, columns = query.shape
        asking = (query + positions).flatten(2).transpose(1, 2)  # B, Q, C
        shape = (batch, rows * columns, self.heads, 2, self.points)
        offsets = self.offsets(asking).float().view(*shape, 2)
        weights = self.weights(asking).float().view(*shape[:3], -1).softmax(-1).view(shape)
        locations = where[:, :, None, :, None] + offsets / offsets.new_tensor([columns, rows])
        values = self.value(torch.cat([query, previous])).float().chunk(2)
        read = self.out(deformable_attention(values, locations, weights))  # B, Q, C
        return read.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


class SpatialAttention(nn.Module):
    """Each pillar reads the cameras that see it, around its projected points; the mean of them."""

    anchor: Tensor

    def __init__(self, config: DeformableBEVConfig) -> None:
        super().__init__()
        self.heads, self.levels = config.heads, len(config.strides)
        self.points, heights = config.spatial_points, len(config.heights_m)
        samples = self.heads * self.levels * self.points
        self.offsets = nn.Linear(config.dim, samples * 2)
        self.weights = nn.Linear(config.dim, samples)
        self.out = nn.Linear(config.dim, config.dim)
        # Point p of head n hangs on height (n + p) % Z, so that heads differ in height.
        anchor = (torch.arange(self.heads)[:, None] + torch.arange(self.points)) % heights
        self.register_buffer("anchor", anchor.flatten(), persistent=False)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # The first point, the head's own height, starts with most of the weight.
        with torch.no_grad():
            self.weights.bias.view(self.heads, self.levels, self.points)[..., 0] = 1.5

    def forward(self, query: Tensor, levels: tuple[Tensor, ...], view: PillarView) -> Tensor:
        """Attend.

        Args:
            query: [B, C, H, W].
            levels: L maps from tall_image; a head reads its channels.
            view: who sees whom.

        Returns:
            [B, C, H, W]; zero for pillars that no camera sees.
        """
        batch, channels, rows, columns = query.shape
        flat = query.flatten(2).transpose(1, 2).flatten(0, 1)  # B*Q, C
        pairs = len(view.pillar)
        shape = (pairs, self.heads, self.levels, self.points)
        offsets = self.offsets(flat).float().index_select(0, view.pillar).view(*shape, 2)
        weights = self.weights(flat).float().view(len(flat), self.heads, -1).softmax(-1)
        weights = weights.index_select(0, view.pillar).view(shape)
        start = view.uv[:, self.anchor].view(pairs, self.heads, self.points, 2)
        locations = []
        for level, value in enumerate(levels):
            height, width = value.shape[-2] // view.images - 1, value.shape[-1]
            uv = start + offsets[:, :, level] / start.new_tensor([width, height])
            locations.append(in_tall(uv, view.camera, view.images, height))
        read = deformable_attention(
            levels, torch.stack(locations, 2).unsqueeze(0), weights.unsqueeze(0)
        )  # 1, V, C
        read = self.out(read.squeeze(0) * view.share)
        gathered = read.new_zeros(len(flat), channels).index_add(0, view.pillar, read)
        return gathered.view(batch, rows, columns, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Past:
    """The previous BEV of B rows, and how to find today's cells in it."""

    bev: Tensor  # [B, C, H, W]
    known: Tensor  # bool [B]; False: a scene starts here
    where: Tensor  # [B, Q, 2, 2] (x, y) fractions of today's BEV and of the previous one


class BEVLayer(nn.Module):
    """Spatial attention, temporal attention, convolution; each added and normalised."""

    def __init__(self, config: DeformableBEVConfig) -> None:
        super().__init__()
        self.spatial = SpatialAttention(config)
        self.temporal = TemporalAttention(config)
        self.mix = nn.Sequential(conv(config.dim, config.dim), nn.Conv2d(config.dim, config.dim, 1))
        groups = config.dim // 8
        self.norms = nn.ModuleList(nn.GroupNorm(groups, config.dim) for _ in range(3))

    def forward(
        self,
        bev: Tensor,
        positions: Tensor,
        levels: tuple[Tensor, ...],
        view: PillarView,
        past: Past,
    ) -> Tensor:
        """See SpatialAttention and TemporalAttention; [B, C, H, W] in and out."""
        bev = self.norms[0](bev + self.spatial(bev + positions, levels, view))
        # Rows without a past read the present twice, as BEVFormer does.
        previous = torch.where(past.known[:, None, None, None], past.bev, bev)
        bev = self.norms[1](bev + self.temporal(bev, positions, previous, past.where))
        return self.norms[2](bev + self.mix(bev))


class DeformableBEV(nn.Module):
    """Six images and the previous BEV to the current BEV; see the module's head."""

    pillars: Tensor
    centres: Tensor
    positions: Tensor

    def __init__(self, config: DeformableBEVConfig) -> None:
        super().__init__()
        self.config, self.dim, self.grid = config, config.dim, config.grid
        widths = config.backbone.widths[1:]
        outputs = [config.backbone.strides.index(stride) for stride in config.strides]
        self.backbone = config.backbone.build()
        self.neck = FeaturePyramid(widths, config.dim, outputs)
        self.ray = nn.Linear(6, config.dim) if config.ray_embedding else None
        self.can_bus = nn.Linear(18, config.dim) if config.can_bus else None
        self.bev_queries = nn.Parameter(
            torch.randn(1, config.dim, config.rows, config.columns) * 0.1
        )
        self.layers = nn.ModuleList(BEVLayer(config) for _ in range(config.layers))
        self.refine = nn.Sequential(*(ResidualBlock(config.dim) for _ in range(config.bev_blocks)))
        centres = geometry.cell_centres(self.grid).flatten(0, 1)  # Q, 2
        heights = torch.tensor(config.heights_m)
        points = torch.cat(
            [
                centres.unsqueeze(1).expand(-1, len(heights), -1),
                heights.view(1, -1, 1).expand(len(centres), -1, -1),
            ],
            -1,
        )
        extent = max(config.rows, config.columns) * config.cell_m
        waves = geometry.sinusoids(centres, config.dim // 4 * 2, 2 * extent).flatten(1)
        waves = F.pad(waves, (0, config.dim - waves.shape[1]))[:, : config.dim]
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("pillars", points.flatten(0, 1), persistent=False)
        self.register_buffer(
            "positions",
            waves.T.reshape(1, config.dim, config.rows, config.columns) / math.sqrt(2),
            persistent=False,
        )

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState]:
        """Encode one key-frame; see odvla.encoders.protocol.Encoder.

        Raises:
            UserError: the images are too small.
        """
        batch, cameras, _, height, width = frames.images.shape
        require_images(frames.images, cameras, self.config.backbone.strides[-1])
        levels = self._image_levels(frames)  # L x [B*N, C, h, w]
        view = view_pillars(self.pillars, frames.cameras, (width, height), len(self.centres))
        bev = self.bev_queries.expand(batch, -1, -1, -1)
        bev = bev.contiguous(memory_format=torch.channels_last)
        if self.can_bus is not None:
            bev = bev + self.can_bus(frames.can_bus)[:, :, None, None]
        past = self._past(frames, state)
        tall = tuple(tall_image(level.float()) for level in levels)
        for layer in self.layers:
            bev = layer(bev, self.positions, tall, view, past)
        bev = self.refine(bev).permute(0, 2, 3, 1)  # B, H, W, C
        features = SceneFeatures(
            levels=tuple(level.unflatten(0, (batch, cameras)) for level in levels),
            bev=bev,
            grid=self.grid,
        )
        valid = torch.ones_like(frames.scene_start)
        return features, EncoderState(bev, frames.lidar_to_global, valid)

    def _image_levels(self, frames: Frames) -> tuple[Tensor, ...]:
        height, width = frames.images.shape[-2:]
        levels = self.neck(self.backbone(frames.images.flatten(0, 1)))
        if self.ray is None:
            return levels
        return tuple(
            level + self.ray(self._rays(frames.cameras, level, (width, height))).movedim(-1, 1)
            for level in levels
        )

    def _rays(self, cameras: Cameras, level: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Direction and camera position (metres) of every pixel of a level: [B * N, h, w, 6]."""
        rows, columns = level.shape[-2:]
        v, u = torch.meshgrid(
            (torch.arange(rows, device=level.device) + 0.5) * (image_size[1] / rows),
            (torch.arange(columns, device=level.device) + 0.5) * (image_size[0] / columns),
            indexing="ij",
        )
        pixels = torch.stack([u, v], -1).flatten(0, 1)
        with torch.autocast(level.device.type, enabled=False):
            to_cam = cameras.lidar_to_cam.float().flatten(0, 1)
            rays = geometry.pixel_rays(cameras.intrinsics.float().flatten(0, 1), to_cam, pixels)
            place = geometry.invert_rigid(to_cam)[:, None, :3, 3].expand_as(rays)
        return torch.cat([rays, place], -1).unflatten(1, (rows, columns))

    def _past(self, frames: Frames, state: EncoderState | None) -> Past:
        rows = len(frames.scene_start)
        now = geometry.to_bev_unit(self.grid, self.centres).expand(rows, -1, -1)
        if state is None:
            nothing = self.positions.new_zeros(rows, *self.positions.shape[1:])
            known = torch.zeros_like(frames.scene_start)
            return Past(nothing, known, torch.stack([now, now], 2))
        known = state.valid & ~frames.scene_start
        before = places_before(self.grid, frames.lidar_to_global, state.lidar_to_global)
        # The bound keeps places of rows from elsewhere finite for the gradient of where().
        before = torch.where(known[:, None, None], before.clamp(-4, 5), now)
        return Past(state.bev.permute(0, 3, 1, 2), known, torch.stack([now, before], 2))
