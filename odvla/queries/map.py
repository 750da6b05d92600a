"""Map elements as tokens: a small mask decoder on the BEV.

Learned queries read the BEV and paint one mask each, as in MaskFormer (Cheng et al. 2021) and
UniAD's MapFormer: some for things (dividers, crossings, boundaries), the last one for the drivable
area. Attention to the BEV is masked by the previous layer's mask (Mask2Former).

With `mask_in_token` a token also holds its mask, pooled to a coarse picture, and its class
probabilities: the shape of the road in plain numbers.

Shape legend: B rows, Q thing queries, H x W BEV cells, C = dim channels, A heads, D token width,
N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.image_backbone import conv
from odvla.errors import check_sizes
from odvla.queries.decoder import PositionEncoding, QueryAttention, mlp
from odvla.queries.protocol import Need, fake_features, require_bev, require_grid
from odvla.types import (
    MAP_CLASSES,
    BevGrid,
    Frames,
    MapPredictions,
    SceneFeatures,
    Stream,
    TokenSet,
)

NO_OBJECT = len(MAP_CLASSES)


@dataclass(frozen=True)
class MapQueriesConfig:
    """Sizes of MapQueries."""

    queries: int = 16  # things
    max_tokens: int = 12  # things and the drivable area
    score_threshold: float = 0.3  # of things
    layers: int = 2
    heads: int = 4
    mask_in_token: bool = True
    mask_rows: int = 8  # a token's picture of its mask
    mask_columns: int = 8

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting; max_tokens leave room for the drivable area.
        """
        check_sizes(self, "queries", "max_tokens", "layers", "heads", "mask_rows", "mask_columns")

    def build(self, dim: int, grid: BevGrid | None) -> MapQueries:
        """The module for an encoder's features.

        Raises:
            ValueError: the encoder has no BEV.
        """
        return MapQueries(self, dim, require_grid(grid, "map queries"))

    def fake_features(self, batch: int, dim: int, grid: BevGrid | None) -> SceneFeatures:
        """Features that fit, for tests."""
        return fake_features(batch, dim, grid)


class MaskedAttention(nn.Module):
    """Multi-head attention from queries to the cells their masks cover."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cells: Tensor, positions: Tensor, covered: Tensor) -> Tensor:
        """Attend.

        Args:
            x: [B, Q, C].
            cells: [B, H * W, C].
            positions: [H * W, C], added to what is compared.
            covered: bool [B, Q, H * W]; a query that covers nothing reads everything.

        Returns:
            [B, Q, C].
        """
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(cells + positions).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.value(cells).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        readable = covered | ~covered.any(-1, keepdim=True)
        read = F.scaled_dot_product_attention(query, key, value, readable.unsqueeze(1))
        return self.out(read.transpose(1, 2).flatten(2))


class MapDecoderLayer(nn.Module):
    """Masked attention to the BEV, attention among queries, feed-forward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.bev = MaskedAttention(dim, heads)
        self.among = QueryAttention(dim, heads)
        self.feed = mlp(dim, 2 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self, x: Tensor, names: Tensor, cells: Tensor, positions: Tensor, covered: Tensor
    ) -> Tensor:
        """[B, Q, C] in and out; `names` [Q, C] tell queries apart."""
        x = self.norms[0](x + self.bev(x + names, cells, positions, covered))
        everyone = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x = self.norms[1](x + self.among(x, names.expand_as(x), everyone))
        return self.norms[2](x + self.feed(x))


class MapQueries(nn.Module):
    """BEV to map elements; see the module's head."""

    stream: Stream = "map"
    needs: Need = "bev"
    centres: Tensor

    def __init__(self, config: MapQueriesConfig, dim: int, grid: BevGrid) -> None:
        super().__init__()
        self.config = config
        picture = config.mask_rows * config.mask_columns + NO_OBJECT + 1
        self.dim = dim + (picture if config.mask_in_token else 0)
        self.start = nn.Parameter(torch.randn(config.queries + 1, dim) * 0.5)
        self.names = nn.Parameter(torch.randn(config.queries + 1, dim) * 0.5)
        self.positions = PositionEncoding(dim, grid)
        self.pixels = nn.Sequential(conv(dim, dim), nn.Conv2d(dim, dim, 1))
        self.layers = nn.ModuleList(
            MapDecoderLayer(dim, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.classes = nn.Linear(dim, NO_OBJECT + 1)
        self.masks = mlp(dim, dim, dim)
        self.register_buffer("centres", geometry.cell_centres(grid).flatten(0, 1), persistent=False)

    def forward(
        self, features: SceneFeatures, frames: Frames, state: None = None
    ) -> tuple[TokenSet, None]:
        """Decode map elements.

        Returns:
            Tokens [B, max_tokens at most, D] with MapPredictions: things by falling score, then the
            drivable area, which is always there.

        Raises:
            ValueError: the features hold no BEV.
        """
        bev, _ = require_bev(features, "map queries")
        cells = bev.flatten(2).transpose(1, 2)  # B, H*W, C
        positions = self.positions(self.centres)
        pixels = self.pixels(bev)
        x = self.start.expand(len(bev), -1, -1)
        logits, masks = self._decode(x, pixels)
        layer_logits, layer_masks = [], []
        for layer in self.layers:
            covered = masks.detach().flatten(2) > 0
            x = layer(x, self.names, cells, positions, covered)
            logits, masks = self._decode(x, pixels)
            layer_logits.append(logits)
            layer_masks.append(masks)
        predictions = MapPredictions(
            layer_logits=tuple(item[:, :-1] for item in layer_logits),
            layer_masks=tuple(item[:, :-1] for item in layer_masks),
            drivable=masks[:, -1],
        )
        return self._tokens(x, logits, masks, predictions), None

    def _decode(self, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q + 1, K] and mask logits [B, Q + 1, H, W]."""
        x = self.norm(x)
        scale = x.shape[-1] ** -0.5
        masks = torch.einsum("bqc,bchw->bqhw", self.masks(x), pixels) * scale
        return self.classes(x).float(), masks.float()

    def _tokens(
        self, x: Tensor, logits: Tensor, masks: Tensor, predictions: MapPredictions
    ) -> TokenSet:
        if self.config.mask_in_token:
            size = (self.config.mask_rows, self.config.mask_columns)
            # Things are thin lines: the highest cell says where they are, the mean would not.
            things = F.adaptive_max_pool2d(masks[:, :-1].sigmoid(), size)
            area = F.adaptive_avg_pool2d(masks[:, -1:].sigmoid(), size)
            picture = torch.cat([things, area], 1).flatten(2)
            probabilities = logits.softmax(-1)
            probabilities = torch.cat(
                [probabilities[:, :-1], torch.zeros_like(probabilities[:, -1:])], 1
            )
            x = torch.cat([x, picture, probabilities], -1)
        score = predictions.layer_logits[-1].softmax(-1)[..., :NO_OBJECT].amax(-1)
        count = min(self.config.max_tokens - 1, score.shape[1])
        top = score.topk(count, dim=1)
        things = x.gather(1, top.indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        feats = torch.cat([things, x[:, -1:]], 1)
        mask = F.pad(top.values >= self.config.score_threshold, (0, 1), value=True)
        return TokenSet("map", feats, mask, predictions)
