"""The whole scene as a fixed number of tokens: pooled image features or pooled BEV.

OpenDriveVLA's global scene sampler max-pools the last feature level of each camera to 3 x 5, which
makes 90 tokens, camera by camera. It has no parameters; neither has this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.errors import check_sizes
from odvla.queries.protocol import Need, fake_features, require_bev, require_grid
from odvla.types import BevGrid, Frames, SceneFeatures, Stream, TokenSet


@dataclass(frozen=True)
class SceneSamplerConfig:
    """What is pooled, and to how many tokens."""

    source: Literal["levels", "bev"] = "levels"
    rows: int = 3  # tokens per camera, or per BEV
    columns: int = 5
    pooling: Literal["max", "mean"] = "max"
    # source="bev" only: x_min, x_max, y_min, y_max of the cells to pool; () means the whole grid
    region_m: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting; region_m is empty or four ascending bounds.
        """
        check_sizes(self, "rows", "columns")
        region = self.region_m
        if region and (len(region) != 4 or region[0] >= region[1] or region[2] >= region[3]):
            raise ValueError(f"scene.region_m must be x_min, x_max, y_min, y_max, not {region}")

    def build(self, dim: int, grid: BevGrid | None) -> SceneSampler:
        """The sampler for an encoder's features.

        Raises:
            ValueError: source is "bev" and the encoder has no BEV.
        """
        if self.source == "bev":
            require_grid(grid, "scene tokens with source='bev'")
        return SceneSampler(self, dim)

    def fake_features(self, batch: int, dim: int, grid: BevGrid | None) -> SceneFeatures:
        """Features that fit, for tests."""
        return fake_features(batch, dim, grid)


class SceneSampler(nn.Module):
    """Pools features to tokens; see the module's head."""

    stream: Stream = "scene"
    needs: Need

    def __init__(self, config: SceneSamplerConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim, self.needs = config, dim, config.source

    def forward(
        self, features: SceneFeatures, frames: Frames, state: None = None
    ) -> tuple[TokenSet, None]:
        """Tokens [B, N * rows * columns, C] (levels) or [B, rows * columns, C] (bev), row-major.

        Raises:
            ValueError: the features lack the source.
        """
        if self.config.source == "levels":
            if not features.levels:
                raise ValueError(
                    "scene tokens need the feature 'levels', which the scene features do not hold"
                )
            maps = features.levels[-1]  # B, N, C, h, w
        else:
            bev, grid = require_bev(features, "scene tokens with source='bev'")
            maps = self._cut(bev, grid).unsqueeze(1)
        pool = F.adaptive_max_pool2d if self.config.pooling == "max" else F.adaptive_avg_pool2d
        size = (self.config.rows, self.config.columns)
        pooled = pool(maps.flatten(0, 1), size).unflatten(0, maps.shape[:2])  # B, N, C, r, c
        feats = pooled.permute(0, 1, 3, 4, 2).flatten(1, 3)
        mask = torch.ones(feats.shape[:2], dtype=torch.bool, device=feats.device)
        return TokenSet("scene", feats, mask), None

    def _cut(self, bev: Tensor, grid: BevGrid) -> Tensor:
        if not self.config.region_m:
            return bev
        x_min, x_max, y_min, y_max = self.config.region_m
        x, y = geometry.cell_centres(grid, bev.device).unbind(-1)
        columns, rows = (x[0] > x_min) & (x[0] < x_max), (y[:, 0] > y_min) & (y[:, 0] < y_max)
        if not (columns.any() and rows.any()):
            raise ValueError(f"scene.region_m {self.config.region_m} holds no cell of {grid}")
        return bev[:, :, rows][..., columns]
