"""PointPillars (Lang et al. 2019): the lidar sweep as a bird's-eye view, the way LiDAR-LLM sees.

Every point is described by where it lies, where it lies in its cell and how far it is from the mean
of the cell's points; a small network looks at each point, the cell keeps the largest of each
channel, and convolutions do the rest. No cameras are read; the previous BEV is not remembered.

Unusual here: points are pooled by cell in one scatter, so that there is no limit to pillars or to
points in one.

Shape legend: B rows, P points, V points that lie on the grid, C channels, H x W BEV cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.image_backbone import ResidualBlock, conv
from odvla.encoders.protocol import EncoderState, fake_frames
from odvla.errors import check_sizes
from odvla.types import BevGrid, Frames, LidarPoints, SceneFeatures

POINT_FEATURES = 9  # x, y, z, intensity; x, y, z from the mean; x, y from the cell's centre


@dataclass(frozen=True)
class LidarPillarsConfig:
    """Sizes of LidarPillars; the defaults are for learning within minutes on two CPU cores."""

    dim: int = 48
    x_min_m: float = -32.0
    y_min_m: float = -32.0
    cell_m: float = 2.0
    rows: int = 32
    columns: int = 32
    heights_m: tuple[float, float] = (-5.0, 3.0)  # points outside are left out
    fine: int = 2  # a cell is so many pillars wide; convolutions bring them together
    blocks: int = 3  # residual blocks on the BEV
    needs_lidar: bool = True  # read by the data modules: sweeps are loaded

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "dim", "rows", "columns")
        if self.dim % 8:
            raise ValueError(f"encoder.dim {self.dim} must be a multiple of 8")
        if self.fine not in (1, 2):
            raise ValueError(f"encoder.fine {self.fine} must be 1 or 2")

    @property
    def grid(self) -> BevGrid:
        """Where the BEV cells lie."""
        return BevGrid(self.x_min_m, self.y_min_m, self.cell_m, self.rows, self.columns)

    def build(self) -> LidarPillars:
        """The encoder, freshly initialised."""
        return LidarPillars(self)

    def fake_batch(self, batch: int = 2, *, seed: int = 0, step: int = 0) -> Frames:
        """Frames that fit this encoder, for tests and `check_encoder`."""
        return fake_frames(batch, seed=seed, step=step, lidar_points=500)


class LidarPillars(nn.Module):
    """A lidar sweep to a BEV; see the module's head."""

    def __init__(self, config: LidarPillarsConfig) -> None:
        super().__init__()
        self.config, self.dim, self.grid = config, config.dim, config.grid
        self.pillars = BevGrid(
            config.x_min_m,
            config.y_min_m,
            config.cell_m / config.fine,
            config.rows * config.fine,
            config.columns * config.fine,
        )
        self.point_net = nn.Sequential(
            nn.Linear(POINT_FEATURES, config.dim), nn.LayerNorm(config.dim), nn.ReLU()
        )
        self.mix = nn.Sequential(
            conv(config.dim, config.dim, stride=config.fine),
            *(ResidualBlock(config.dim) for _ in range(config.blocks)),
        )

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState | None]:
        """Encode one key-frame; nothing is remembered.

        Raises:
            ValueError: the frames hold no lidar.
        """
        if frames.lidar is None:
            raise ValueError("the lidar encoder needs frames with lidar, these have none")
        bev = self.mix(self.pool(frames.lidar)).permute(0, 2, 3, 1)
        return SceneFeatures(levels=(), bev=bev, grid=self.grid), None

    def pool(self, lidar: LidarPoints) -> Tensor:
        """Points to pillars [B, C, rows * fine, columns * fine]; an empty pillar is zero."""
        batch, grid = len(lidar.points), self.pillars
        cells = grid.rows * grid.columns
        points = lidar.points.float()
        unit = geometry.to_bev_unit(grid, points[..., :2])
        low, high = self.config.heights_m
        inside = lidar.mask & (unit >= 0).all(-1) & (unit < 1).all(-1)
        inside &= (points[..., 2] >= low) & (points[..., 2] < high)
        row, number = inside.nonzero(as_tuple=True)
        seen = points[row, number]  # V, 4
        place = (unit[row, number] * unit.new_tensor([grid.columns, grid.rows])).floor()
        cell = row * cells + place[:, 1].long() * grid.columns + place[:, 0].long()
        features = self._describe(seen, place, cell, batch * cells)
        pooled = features.new_zeros(batch * cells, self.dim)
        index = cell.unsqueeze(-1).expand_as(features)
        # ReLU's outputs are not below the zeros of empty pillars.
        pooled = pooled.scatter_reduce(0, index, features, "amax")
        return pooled.view(batch, grid.rows, grid.columns, -1).permute(0, 3, 1, 2)

    def _describe(self, seen: Tensor, place: Tensor, cell: Tensor, cells: int) -> Tensor:
        """Features [V, C] of points [V, 4] in cells [V]."""
        xyz, grid = seen[:, :3], self.pillars
        ones = xyz.new_ones(len(xyz), 1)
        sums = xyz.new_zeros(cells, 4).index_add(0, cell, torch.cat([xyz, ones], -1))
        mean = sums[:, :3] / sums[:, 3:].clamp(min=1)
        corner = xyz.new_tensor([grid.x_min_m, grid.y_min_m])
        centre = corner + (place + 0.5) * grid.cell_m
        extent = grid.columns * grid.cell_m / 2
        described = torch.cat(
            [
                xyz / extent,
                seen[:, 3:] / 255,
                xyz - mean[cell],
                (xyz[:, :2] - centre) / grid.cell_m,
            ],
            -1,
        )
        return self.point_net(described).float()
