"""Agents as tokens: detection from heatmap peaks, tracking by queries that live on.

UniAD's TrackFormer keeps 900 learned queries and lets the surviving ones live on. Here newborn
queries start at the peaks of a class heatmap on the BEV instead (as TransFusion does), which takes
minutes to learn, not days; tracks are carried on as queries all the same.

A token is the final embedding of its query and, with `box_in_token`, fixed features of the decoded
box beside it: a language model then need not guess positions from an embedding that was never
trained to spell them.

Shape legend: B rows, K classes, H x W BEV cells, C = dim channels,
Q = newborn + carried queries (in this order), D token width, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.image_backbone import conv
from odvla.errors import check_sizes
from odvla.ops.deformable_attention import bilinear
from odvla.queries.decoder import AgentDecoderLayer, PositionEncoding, mlp
from odvla.queries.protocol import Need, fake_features, require_bev, require_grid
from odvla.queries.tracks import AgentState, TrackRules, carry, empty_state, expect, give_ids
from odvla.types import (
    DETECTION_CLASSES,
    AgentPredictions,
    BevGrid,
    Frames,
    SceneFeatures,
    Stream,
    TokenSet,
)

CLASSES = len(DETECTION_CLASSES)
# Small things may stand in neighbouring cells: no peak of them suppresses another (TransFusion).
CROWDED = tuple(
    DETECTION_CLASSES.index(name) for name in ("barrier", "bicycle", "pedestrian", "traffic_cone")
)
CAR_WLH = (1.9, 4.6, 1.7)  # metres; sizes are learned from there
START_Z_M = -1.0  # box centres lie about a metre under the lidar
PRIOR = 0.02  # start probability of every class, so that the background does not drown the start
EMPTY_LOGIT = -20.0  # of slots without a track
BOX_CODE = 10  # numbers of geometry.box_code
# What a network output of 1 means in each: metres, log sizes, sine and cosine, m/s.
CODE_SCALE = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0)
BOX_WAVES = 12
BOX_FEATURES = 2 * BOX_WAVES + 2 + BOX_CODE - 2 + CLASSES


@dataclass(frozen=True)
class AgentQueriesConfig:
    """Sizes of AgentQueries and the rules of a track's life."""

    queries: int = 20  # newborn a key-frame
    carried: int = 20  # tracks carried on at most
    max_tokens: int = 24
    score_threshold: float = 0.3  # of tokens (the reference: 0.35)
    birth_threshold: float = 0.3  # a query becomes a track (the reference: 0.4)
    training_birth_threshold: float = 0.2  # lower, so that carrying on is trained from early on
    keep_threshold: float = 0.2  # below it a track counts as missed (the reference: 0.35)
    max_misses: int = 2  # in a row that a track survives (the reference: 4)
    duplicate_m: float = 2.0  # newborns closer than this to a track are the same thing
    layers: int = 2
    heads: int = 4
    points: int = 4
    box_in_token: bool = True

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "queries", "max_tokens", "layers", "heads", "points")

    def build(self, dim: int, grid: BevGrid | None) -> AgentQueries:
        """The module for an encoder's features.

        Raises:
            ValueError: the encoder has no BEV.
        """
        return AgentQueries(self, dim, require_grid(grid, "agent queries"))

    def fake_features(self, batch: int, dim: int, grid: BevGrid | None) -> SceneFeatures:
        """Features that fit, for tests."""
        return fake_features(batch, dim, grid)


def box_features(boxes: Tensor, logits: Tensor) -> Tensor:
    """What a token says about its box, as numbers near one: place, size, heading, velocity, class.

    Args:
        boxes: [..., 9].
        logits: [..., K].

    Returns:
        [..., BOX_FEATURES].
    """
    xy, yaw = boxes[..., :2], boxes[..., 6:7]
    waves = geometry.sinusoids(xy, BOX_WAVES, 128.0).flatten(-2)  # periods 128 m .. 4 m
    size = boxes[..., 3:6].clamp(min=0.05).log()
    rest = [xy / 32, boxes[..., 2:3], size, yaw.sin(), yaw.cos(), boxes[..., 7:9] / 5]
    return torch.cat([waves, *rest, logits.sigmoid()], -1)


class BoxHead(nn.Module):
    """Refines class logits and boxes: what it learns is added to what was believed before."""

    code_scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.classes = nn.Linear(dim, CLASSES)
        self.box = mlp(dim, dim, BOX_CODE)
        for layer in (self.classes, self.box[-1]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.register_buffer("code_scale", torch.tensor(CODE_SCALE), persistent=False)

    def forward(self, x: Tensor, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Refine.

        Args:
            x: [B, Q, C].
            logits: [B, Q, K], believed before.
            boxes: [B, Q, 9], believed before.

        Returns:
            Logits [B, Q, K] and boxes [B, Q, 9].
        """
        code = geometry.box_code(boxes) + self.box(x).float() * self.code_scale
        return logits + self.classes(x).float(), geometry.boxes_of(code)


class CellHead(nn.Module):
    """What every BEV cell proposes: class logits (the heatmap) and a box code."""

    code_scale: Tensor
    code_start: Tensor

    def __init__(self, dim: int, grid: BevGrid) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(dim, dim), nn.Conv2d(dim, CLASSES + BOX_CODE, 1))
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.constant_(last.bias[:CLASSES], -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(last.bias[CLASSES:])
        start = torch.zeros(BOX_CODE, grid.rows, grid.columns)
        start[:2] = geometry.cell_centres(grid).permute(2, 0, 1)
        start[2] = START_Z_M
        start[3:6] = torch.tensor(CAR_WLH).log().view(3, 1, 1)
        self.register_buffer("code_start", start, persistent=False)
        self.register_buffer(
            "code_scale", torch.tensor(CODE_SCALE).view(-1, 1, 1), persistent=False
        )

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """BEV [B, C, H, W] to heatmap logits [B, K, H, W] and box codes [B, 10, H, W]."""
        heatmap, code = self.layers(bev).float().split([CLASSES, BOX_CODE], 1)
        return heatmap, self.code_start + code * self.code_scale


class AgentQueries(nn.Module):
    """BEV and carried tracks to agents; see the module's head."""

    stream: Stream = "track"
    needs: Need = "bev"

    def __init__(self, config: AgentQueriesConfig, dim: int, grid: BevGrid) -> None:
        super().__init__()
        self.config, self.grid, self.inner = config, grid, dim
        self.dim = dim + (BOX_FEATURES if config.box_in_token else 0)
        self.cells = CellHead(dim, grid)
        self.value = nn.Conv2d(dim, dim, 1)
        self.class_embedding = nn.Embedding(CLASSES, dim)
        self.newborn = nn.Linear(dim, dim)
        self.carried = mlp(dim + BOX_FEATURES - CLASSES, dim, dim)
        self.carried_logits = nn.Parameter(torch.full((CLASSES,), -2.0))
        self.positions = PositionEncoding(dim, grid)
        self.layers = nn.ModuleList(
            AgentDecoderLayer(dim, config.heads, config.points) for _ in range(config.layers)
        )
        self.heads = nn.ModuleList(BoxHead(dim) for _ in range(config.layers))

    def forward(
        self, features: SceneFeatures, frames: Frames, state: AgentState | None
    ) -> tuple[TokenSet, AgentState]:
        """Detect and track.

        Returns:
            Tokens [B, max_tokens at most, D] by falling score with AgentPredictions, and the next
            state.

        Raises:
            ValueError: the features hold no BEV.
        """
        bev, grid = require_bev(features, "agent queries")
        if state is None:
            state = empty_state(frames, self.config.carried, self.inner)
        expected = expect(state, frames)
        heatmap, codes = self.cells(bev)
        x, logits, boxes, mask = self._start(bev, heatmap, codes, expected, grid)
        value = self.value(bev)
        layer_logits: list[Tensor] = []
        layer_boxes: list[Tensor] = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            centres = boxes[..., :2].detach()
            unit = geometry.to_bev_unit(grid, centres)
            x = layer(x, self.positions(centres), mask, value, unit)
            # Detached: each layer answers for its own step (deformable DETR's box refinement).
            logits, boxes = head(x, logits.detach() if layer_boxes else logits, boxes.detach())
            layer_logits.append(torch.where(mask.unsqueeze(-1), logits, EMPTY_LOGIT))
            layer_boxes.append(boxes)
        ids, misses, next_id = give_ids(
            expected,
            layer_logits[-1].sigmoid().amax(-1),
            layer_boxes[-1][..., :2],
            self.config.queries,
            self._rules(),
        )
        fresh = ids.new_full((len(ids), self.config.queries), -1)
        predictions = AgentPredictions(
            layer_logits=tuple(layer_logits),
            layer_boxes=tuple(layer_boxes),
            track_ids=ids,
            carried_from=torch.cat([fresh, expected.source], 1),
            heatmap=heatmap,
            mask=mask,
            cell_codes=codes,
        )
        scores = predictions.scores
        after = carry(expected, x, predictions.boxes, scores, ids, misses, next_id, grid)
        return self._tokens(x, predictions), after

    def _start(
        self, bev: Tensor, heatmap: Tensor, codes: Tensor, expected: AgentState, grid: BevGrid
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries before the first layer.

        Returns:
            x [B, Q, C], logits [B, Q, K] and boxes [B, Q, 9] believed so far, mask [B, Q].
        """
        cells, labels = self._peaks(heatmap, expected, grid)
        newborn = self.newborn(_at(bev, cells)) + self.class_embedding(labels)
        unit = geometry.to_bev_unit(grid, expected.boxes[..., :2])
        memory = box_features(expected.boxes, expected.boxes[..., :0])
        carried = self.newborn(bilinear(bev.float(), unit)) + self.carried(
            torch.cat([expected.embeddings, memory], -1)
        )
        mask = torch.cat([torch.ones_like(cells, dtype=torch.bool), expected.mask], 1)
        believed = self.carried_logits.expand(*carried.shape[:2], -1)
        return (
            torch.cat([newborn, carried], 1),
            torch.cat([_at(heatmap, cells).detach(), believed], 1),
            torch.cat([geometry.boxes_of(_at(codes, cells).detach()), expected.boxes], 1),
            mask,
        )

    @torch.no_grad()
    def _peaks(self, heatmap: Tensor, expected: AgentState, grid: BevGrid) -> tuple[Tensor, Tensor]:
        """Cells [B, newborn] and classes [B, newborn] of the highest peaks away from tracks."""
        score = heatmap.sigmoid()
        around = F.max_pool2d(score, 3, stride=1, padding=1)
        peak = score >= around
        peak[:, list(CROWDED)] = True
        centres = geometry.cell_centres(grid, heatmap.device).flatten(0, 1)
        distance = torch.cdist(centres.expand(len(score), -1, -1), expected.boxes[..., :2])
        taken = ((distance < self.config.duplicate_m) & expected.mask.unsqueeze(1)).any(-1)
        score = (score * peak).flatten(2).masked_fill(taken.unsqueeze(1), 0)  # B, K, H*W
        best = score.flatten(1).topk(self.config.queries, dim=1).indices
        return best % score.shape[-1], best // score.shape[-1]

    def _rules(self) -> TrackRules:
        config = self.config
        birth = config.training_birth_threshold if self.training else config.birth_threshold
        keep = min(birth, config.keep_threshold)
        return TrackRules(birth, keep, config.max_misses, config.duplicate_m)

    def _tokens(self, x: Tensor, predictions: AgentPredictions) -> TokenSet:
        scores = predictions.scores
        # A query without an id is not a track: a duplicate, or below the birth threshold.
        score = torch.where(predictions.track_ids >= 0, scores, 0)
        count = min(self.config.max_tokens, score.shape[1])
        top = score.topk(count, dim=1)
        index = top.indices
        if self.config.box_in_token:
            x = torch.cat([x, box_features(predictions.boxes, predictions.layer_logits[-1])], -1)
        feats = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        mask = top.values >= self.config.score_threshold
        return TokenSet("track", feats, mask, predictions, index)


def _at(maps: Tensor, cells: Tensor) -> Tensor:
    """Maps [B, C, H, W] at cell numbers [B, Q]: [B, Q, C]."""
    flat = maps.flatten(2)
    index = cells.unsqueeze(1).expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).transpose(1, 2)
