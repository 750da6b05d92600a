"""Lift-Splat-Shoot (Philion and Fidler 2020): another road from images to a bird's-eye view.

Lift: every pixel of a feature map predicts a distribution over depths, and its feature stands at
each of them, weighted. Splat: what falls into a BEV cell is added up. Then convolutions. Queries
never look back into the images, as BEVFormer's do; in return nothing has to be learned about where
to look.

Unusual here: the previous BEV, moved to where the car is now, is stacked beside the current one
before the convolutions (BEVDet4D's way of having a memory), where `temporal` is on.

Shape legend: B rows, N cameras, C channels, D depths, h x w pixels of the map, H x W BEV cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.image_backbone import FeaturePyramid, ImageBackboneConfig, ResidualBlock, conv
from odvla.encoders.pillars import places_before
from odvla.encoders.protocol import EncoderState, fake_frames
from odvla.errors import check_sizes
from odvla.ops.deformable_attention import bilinear
from odvla.types import BevGrid, Cameras, Frames, SceneFeatures


@dataclass(frozen=True)
class LiftSplatConfig:
    """Sizes of LiftSplat; the defaults are for learning within minutes on two CPU cores."""

    backbone: Any = field(default_factory=ImageBackboneConfig)  # with build(), channels, strides
    dim: int = 48
    x_min_m: float = -32.0
    y_min_m: float = -32.0
    cell_m: float = 2.0
    rows: int = 32
    columns: int = 32
    level: int = 0  # which of the backbone's maps is lifted
    depths_m: tuple[float, float, float] = (2.0, 46.0, 1.0)  # first, end, step
    # What lies outside is no part of the scene: sky, and what the ground plane cannot hold.
    heights_m: tuple[float, float] = (-4.0, 3.0)
    bev_blocks: int = 2
    temporal: bool = True

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "dim", "rows", "columns")
        if self.dim % 8:
            raise ValueError(f"encoder.dim {self.dim} must be a multiple of 8")
        first, end, step = self.depths_m
        if not (0 < first < end and step > 0):
            raise ValueError(f"encoder.depths_m {self.depths_m} must be 0 < first < end, step > 0")
        if not 0 <= self.level < len(self.backbone.strides):
            raise ValueError(
                f"encoder.level {self.level} must be one of the backbone's "
                f"{len(self.backbone.strides)} maps"
            )

    @property
    def grid(self) -> BevGrid:
        """Where the BEV cells lie."""
        return BevGrid(self.x_min_m, self.y_min_m, self.cell_m, self.rows, self.columns)

    def build(self) -> LiftSplat:
        """The encoder, freshly initialised."""
        return LiftSplat(self)

    def fake_batch(self, batch: int = 2, *, seed: int = 0, step: int = 0) -> Frames:
        """Frames that fit this encoder, for tests and `check_encoder`."""
        return fake_frames(batch, seed=seed, step=step)


class LiftSplat(nn.Module):
    """Six images to a BEV; see the module's head."""

    depths: Tensor
    centres: Tensor

    def __init__(self, config: LiftSplatConfig) -> None:
        super().__init__()
        self.config, self.dim, self.grid = config, config.dim, config.grid
        self.backbone = config.backbone.build()
        self.neck = FeaturePyramid(config.backbone.channels, config.dim, [config.level])
        first, end, step = config.depths_m
        self.register_buffer("depths", torch.arange(first, end, step), persistent=False)
        centres = geometry.cell_centres(config.grid).flatten(0, 1)
        self.register_buffer("centres", centres, persistent=False)
        self.depth = nn.Conv2d(config.dim, len(self.depths), 1)
        self.context = nn.Conv2d(config.dim, config.dim, 1)
        parts = 2 if config.temporal else 1
        self.mix = nn.Sequential(
            conv(parts * config.dim, config.dim),
            *(ResidualBlock(config.dim) for _ in range(config.bev_blocks)),
        )

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState | None]:
        """Encode one key-frame; see odvla.encoders.protocol.Encoder."""
        batch, cameras, _, height, width = frames.images.shape
        (level,) = self.neck(self.backbone(frames.images.flatten(0, 1)))  # B*N, C, h, w
        points = self.places(frames.cameras, (level.shape[-2], level.shape[-1]), (height, width))
        pooled = self.splat(level, points, batch)  # B, C, H, W
        if self.config.temporal:
            pooled = torch.cat([pooled, self.before(pooled, frames, state)], 1)
        bev = self.mix(pooled).permute(0, 2, 3, 1)
        features = SceneFeatures(
            levels=(level.unflatten(0, (batch, cameras)),), bev=bev, grid=self.grid
        )
        if not self.config.temporal:
            return features, None
        # What is remembered is this frame alone: a memory of memories would smear.
        own = pooled[:, : self.dim].permute(0, 2, 3, 1)
        known = torch.ones_like(frames.scene_start)
        return features, EncoderState(own, frames.lidar_to_global, known)

    def places(self, cameras: Cameras, size: tuple[int, int], image: tuple[int, int]) -> Tensor:
        """Where in space the pixels of a map lie at every depth, in float32.

        Args:
            cameras: calibration of B rows.
            size: (h, w) of the map.
            image: (height, width) of the images, pixels.

        Returns:
            [B * N, D, h * w, 3] metres, lidar frame.
        """
        rows, columns = size
        device = self.depths.device
        v, u = torch.meshgrid(
            (torch.arange(rows, device=device) + 0.5) * (image[0] / rows),
            (torch.arange(columns, device=device) + 0.5) * (image[1] / columns),
            indexing="ij",
        )
        pixels = torch.stack([u, v, torch.ones_like(u)], -1).flatten(0, 1)  # h*w, 3
        with torch.autocast(device.type, enabled=False):
            inverse = torch.linalg.inv(cameras.intrinsics.float().flatten(0, 1))
            rays = pixels @ inverse.transpose(1, 2)  # B*N, h*w, 3 with depth 1
            in_camera = rays.unsqueeze(1) * self.depths.view(1, -1, 1, 1)
            to_lidar = geometry.invert_rigid(cameras.lidar_to_cam.float().flatten(0, 1))
            flat = geometry.transform_points(to_lidar, in_camera.flatten(1, 2))
        return flat.view(len(rays), len(self.depths), rows * columns, 3)

    def splat(self, level: Tensor, points: Tensor, batch: int) -> Tensor:
        """Add weighted features up in the cells where they lie.

        Args:
            level: [B * N, C, h, w].
            points: [B * N, D, h * w, 3].
            batch: B.

        Returns:
            [B, C, H, W].
        """
        config, cells = self.config, self.config.rows * self.config.columns
        chance = self.depth(level).float().softmax(1).flatten(2)  # B*N, D, S
        context = self.context(level).float().flatten(2).transpose(1, 2)  # B*N, S, C
        unit = geometry.to_bev_unit(self.grid, points[..., :2])
        place = (unit * unit.new_tensor([config.columns, config.rows])).floor().long()
        low, high = config.heights_m
        z = points[..., 2]
        inside = (z >= low) & (z < high) & (unit >= 0).all(-1) & (unit < 1).all(-1)
        image, depth, pixel = inside.nonzero(as_tuple=True)
        column, row = place[image, depth, pixel].unbind(-1)
        scene = image // (len(points) // batch)
        cell = scene * cells + row * config.columns + column
        lifted = chance[image, depth, pixel].unsqueeze(-1) * context[image, pixel]
        pooled = lifted.new_zeros(batch * cells, config.dim).index_add(0, cell, lifted)
        return pooled.view(batch, config.rows, config.columns, -1).permute(0, 3, 1, 2)

    def before(self, pooled: Tensor, frames: Frames, state: EncoderState | None) -> Tensor:
        """The previous BEV where its places are now [B, C, H, W]; at a start today's own."""
        if state is None:
            return pooled
        known = state.valid & ~frames.scene_start
        where = places_before(self.grid, frames.lidar_to_global, state.lidar_to_global)
        where = torch.where(known[:, None, None], where.clamp(-4, 5), 0.5)
        moved = bilinear(state.bev.permute(0, 3, 1, 2).float(), where)
        moved = moved.transpose(1, 2).unflatten(2, (self.config.rows, self.config.columns))
        return torch.where(known.view(-1, 1, 1, 1), moved, pooled)
