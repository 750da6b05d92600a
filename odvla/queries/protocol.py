"""What a query module is: scene features in, tokens of one stream out."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from odvla.types import BevGrid, Frames, SceneFeatures, Stream, TokenSet

Need = Literal["bev", "levels"]


@runtime_checkable
class QueryModule(Protocol):
    """An nn.Module that asks the scene for the tokens of one stream.

    Built by its config's `build(dim, grid)` from the encoder's `dim` and `grid`.
    """

    stream: Stream
    dim: int  # width of its tokens
    needs: Need

    def forward(self, features: SceneFeatures, frames: Frames, state: Any) -> tuple[TokenSet, Any]:
        """Tokens of B scenes, and the state for the next key-frame (None: no memory).

        Args:
            features: of this key-frame.
            frames: the same key-frame, for poses, times and scene starts.
            state: what the previous call returned; None at the start. Rows with
                frames.scene_start forget theirs.

        Raises:
            ValueError: `features` lacks what this module needs.
        """
        ...


def require_grid(grid: BevGrid | None, who: str) -> BevGrid:
    """The grid, for a module that cannot do without.

    Raises:
        ValueError: the encoder has no bird's-eye view.
    """
    if grid is None:
        raise ValueError(f"{who} need the feature 'bev', which this encoder does not give")
    return grid


def require_bev(features: SceneFeatures, who: str) -> tuple[Tensor, BevGrid]:
    """BEV as a map [B, C, H, W] and its grid.

    Raises:
        ValueError: the features hold no BEV.
    """
    if features.bev is None or features.grid is None:
        raise ValueError(f"{who} need the feature 'bev', which the scene features do not hold")
    return features.bev.permute(0, 3, 1, 2), features.grid


def fake_features(
    batch: int, dim: int, grid: BevGrid | None, *, levels: int = 1, seed: int = 0
) -> SceneFeatures:
    """Noise features of six cameras, for tests of query modules without an encoder."""
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(
        torch.randn(batch, 6, dim, 12 // 2**level, 20 // 2**level, generator=generator)
        for level in range(levels)
    )
    if grid is None:
        return SceneFeatures(levels=maps)
    bev = torch.randn(batch, grid.rows, grid.columns, dim, generator=generator)
    return SceneFeatures(levels=maps, bev=bev, grid=grid)
