"""UniAD's panoptic map head at full fidelity: dividers, crossings, boundaries, drivable area.

A deformable encoder refines the BEV, a decoder with box refinement finds 300 things as in
Deformable DETR; the best (query, class) pairs get a mask each, a further learned query paints the
drivable area, and merging decides what is on the map (Panoptic SegFormer on a BEV; UniAD section
3.1). Tokens are the mask decoder's embeddings of the elements on the map, by falling score, and of
the drivable area.

What is unusual: any number of scenes run side by side; `compat="uniad"` reproduces what the
released weights and the published numbers came with (docs/parity.md, "Map").

Shape legend: B rows, Q thing queries, N candidates (query, class), C channels, K classes of things,
H x W BEV cells, S = H * W, D decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla.errors import check_sizes
from odvla.ops.transformer import (
    DecoderLayer,
    DeformableAttention,
    FeedForward,
    Size,
    inverse_sigmoid,
)
from odvla.queries.mask_head import MaskHead
from odvla.queries.panoptic_merge import Merged, MergeRules, merge
from odvla.queries.protocol import Need, fake_features, require_bev, require_grid
from odvla.queries.track_life import take
from odvla.types import (
    MAP_CLASSES,
    BevGrid,
    Frames,
    MapDecoding,
    MapPredictions,
    SceneFeatures,
    Stream,
    TokenSet,
)

# UniAD gives its deformable attentions weights for four levels and lets them read one.
UNIAD_ATTENTION_LEVELS = 4
LEVEL_EMBEDDINGS = 4  # rows that exist; the one level there is uses the first
PRIOR = 0.01  # start probability of every class
START_SIZE = -2.0  # logit of a box's width and height before anything is learned
# Masks are values >= 0 with 0.5 as the border; as logits, 0 and 1 then mean 0.12 and 0.88.
MASK_LOGIT_SLOPE = 4.0


@dataclass(frozen=True)
class PanopticMapConfig:
    """Sizes of the map head; the defaults are UniAD's and OpenDriveVLA's."""

    queries: int = 300  # things
    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    hidden: int = 512
    points: int = 4
    classes: int = len(MAP_CLASSES)
    thing_mask_layers: int = 4
    stuff_mask_layers: int = 6
    mask_heads: int = 8
    dropout: float = 0.1
    max_candidates: int = 100  # (query, class) pairs that get a mask
    score_threshold: float = 0.1  # see MergeRules
    overlap_threshold: float = 0.4
    # Levels the deformable attentions have weights for; None: 4 with compat="uniad", else 1. More
    # than 1 means the reference's walk through its buffers (see ops.transformer), which every
    # checkpoint with such shapes was trained with: `attention_levels` reads it off the weights.
    attention_levels: int | None = None
    # "uniad": tokens are rows of the unsorted candidates at places counted in sorted order, so not
    # those of the elements on the map; merging as in MergeRules. "none": what was meant.
    compat: Literal["none", "uniad"] = "none"

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        layers = ("encoder_layers", "decoder_layers")
        check_sizes(self, "queries", *layers, "heads", "points", "mask_heads")

    @property
    def stored_levels(self) -> int:
        """Levels the deformable attentions have weights for."""
        if self.attention_levels is not None:
            return self.attention_levels
        return UNIAD_ATTENTION_LEVELS if self.compat == "uniad" else 1

    def build(self, dim: int, grid: BevGrid | None) -> PanopticMap:
        """The module for an encoder's features.

        Raises:
            ValueError: the encoder has no BEV, or its width does not fit the heads.
        """
        for name, heads in (("heads", self.heads), ("mask_heads", self.mask_heads)):
            if dim % heads or dim % 4:
                raise ValueError(f"map.{name}={heads} and 4 must divide the encoder's dim {dim}")
        return PanopticMap(self, dim, require_grid(grid, "map queries"))

    def fake_features(self, batch: int, dim: int, grid: BevGrid | None) -> SceneFeatures:
        """Features that fit, for tests."""
        return fake_features(batch, dim, grid)


def attention_levels(weights: Mapping[str, Tensor], heads: int = 8, points: int = 4) -> int:
    """Levels that a checkpoint's map head has attention weights for, off their shape.

    Args:
        weights: by the names of PanopticMap.
        heads: of the deformable attention.
        points: of the deformable attention, a level.

    Raises:
        ValueError: the weights are not those of a map head with so many heads and points.
    """
    name = "encoder.0.attention.attention_weights.bias"
    rows = weights[name].shape[0] if name in weights else 0
    if rows == 0 or rows % (heads * points):
        raise ValueError(f"{name} with {rows} rows is not of {heads} heads with {points} points")
    return rows // (heads * points)


@dataclass(frozen=True)
class Candidates:
    """(query, class) pairs that get a mask, by falling probability."""

    query: Tensor  # int64 [B, N]
    labels: Tensor  # int64 [B, N]
    scores: Tensor  # [B, N]
    boxes: Tensor  # [B, N, 4] x1, y1, x2, y2 in cells


@dataclass(frozen=True)
class Drawing:
    """Masks of the candidates and of the drivable area, and the queries that painted them."""

    things: Tensor  # [B, N, H, W]
    thing_queries: Tensor  # [B, N, C]
    drivable: Tensor  # [B, H, W]
    drivable_query: Tensor  # [B, C]


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward; each added and normalised."""

    def __init__(self, dim: int, config: PanopticMapConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            dim,
            config.heads,
            1,
            config.points,
            dropout=config.dropout,
            uniad_levels=config.stored_levels,
        )
        self.ffn = FeedForward(dim, config.hidden, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def attend(self, x: Tensor, positions: Tensor, size: Size, at: Tensor) -> Tensor:
        """The first half before its norm: [B, S, C]."""
        return x + self.attention(x + positions, x, [size], at)

    def forward(self, x: Tensor, positions: Tensor, size: Size, at: Tensor) -> Tensor:
        """Cells [B, S, C] in and out; `at` [B, S, 2] are their centres as fractions."""
        x = self.norms[0](self.attend(x, positions, size, at))
        return self.norms[1](self.ffn(x))


class PanopticMap(nn.Module):
    """BEV to map elements; see the module's head."""

    stream: Stream = "map"
    needs: Need = "bev"
    sine: Tensor
    centres: Tensor

    def __init__(self, config: PanopticMapConfig, dim: int, grid: BevGrid) -> None:
        super().__init__()
        self.config, self.grid, self.dim = config, grid, dim
        self.size: Size = (grid.rows, grid.columns)
        self.rules = MergeRules(
            score=config.score_threshold, overlap=config.overlap_threshold, compat=config.compat
        )
        self.level_embeds = nn.Parameter(torch.randn(LEVEL_EMBEDDINGS, dim))
        self.query_embedding = nn.Embedding(config.queries, 2 * dim)
        self.stuff_query = nn.Embedding(1, 2 * dim)
        self.reference_points = nn.Linear(dim, 2)
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, config) for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(
                dim,
                config.heads,
                config.hidden,
                config.points,
                dropout=config.dropout,
                uniad_levels=config.stored_levels,
            )
            for _ in range(config.decoder_layers)
        )
        layers, masks = config.decoder_layers, config.thing_mask_layers
        self.cls_branches = _linears(layers, dim, config.classes)
        self.reg_branches = _box_branches(layers, dim)
        # Of the mask decoder. UniAD multiplies the losses of the first two by 0: they never learn.
        self.mask_reg_branches = _box_branches(masks, dim)
        self.thing_branches = _linears(masks, dim, config.classes)
        self.stuff_branches = _linears(config.stuff_mask_layers, dim, 1)
        self.thing_masks = MaskHead(dim, config.mask_heads, masks)
        self.stuff_masks = MaskHead(
            dim, config.mask_heads, config.stuff_mask_layers, self_attention=True
        )
        self.register_buffer("sine", sine_positions(dim, self.size), persistent=False)
        self.register_buffer("centres", cell_fractions(self.size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """UniAD's start: rare classes, small boxes that no layer moves yet."""
        bias = -math.log((1 - PRIOR) / PRIOR)
        for branch in (*self.cls_branches, *self.thing_branches, *self.stuff_branches):
            assert isinstance(branch, nn.Linear)
            nn.init.constant_(branch.bias, bias)
        for branch in (*self.reg_branches, *self.mask_reg_branches):
            assert isinstance(branch, nn.Sequential)
            last = branch[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        first = self.reg_branches[0]
        assert isinstance(first, nn.Sequential)
        assert isinstance(first[-1], nn.Linear)
        with torch.no_grad():
            first[-1].bias[2:] = START_SIZE
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(
        self, features: SceneFeatures, frames: Frames, state: None = None
    ) -> tuple[TokenSet, None]:
        """Decode map elements.

        Returns:
            Tokens [B, T + 1, C] with MapPredictions: the elements by falling score, padded to the
            scene with the most (T), then the drivable area, which is always there.

        Raises:
            ValueError: the features hold no BEV.
        """
        bev, _ = require_bev(features, "map queries")
        decoding = self.decode(bev)
        candidates = self.candidates(decoding)
        drawing = self.draw(decoding, candidates)
        merged = merge(drawing.things, candidates.scores, candidates.labels, self.rules)
        predictions = self.predictions(decoding, candidates, drawing, merged)
        return self.tokens(drawing, merged, predictions), None

    # -- finding things ---------------------------------------------------------------------------

    def encode(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """BEV [B, C, H, W] to memory [B, S, C]; and the cells' positions [S, C]."""
        assert bev.shape[2:] == self.size
        x = bev.flatten(2).transpose(1, 2)
        positions = self.sine + self.level_embeds[0]
        at = self.centres.expand(len(x), -1, -1)
        for layer in self.encoder:
            x = layer(x, positions, self.size, at)
        return x, positions

    def decode(self, bev: Tensor) -> MapDecoding:
        """BEV [B, C, H, W] to classes and boxes of the thing queries, layer by layer."""
        memory, _ = self.encode(bev)
        positions, x = self.query_embedding.weight.expand(len(bev), -1, -1).chunk(2, -1)
        at = self.reference_points(positions).float().sigmoid()
        logits, boxes, embeddings = [], [], []
        for number, layer in enumerate(self.decoder):
            x = layer(x, positions, memory, self.size, at)
            start = inverse_sigmoid(at)  # of the last layer: where mask_reg_branches start, too
            box = self.boxes(self.reg_branches[number], x, start)
            logits.append(self.cls_branches[number](x).float())
            boxes.append(box)
            embeddings.append(x)
            at = box.detach()
        return MapDecoding(tuple(logits), tuple(boxes), tuple(embeddings), start, memory)

    @staticmethod
    def boxes(branch: nn.Module, x: Tensor, start: Tensor) -> Tensor:
        """Boxes [..., 4] as fractions (cx, cy, w, h).

        Args:
            branch: one of the box branches.
            x: queries [..., C].
            start: logits of a point [..., 2] or a box [..., 4] that the branch's output moves.
        """
        with torch.autocast(x.device.type, enabled=False):
            moved = branch(x.float())
            count = start.shape[-1]
            return torch.cat([moved[..., :count] + start, moved[..., count:]], -1).sigmoid()

    def candidates(self, decoding: MapDecoding) -> Candidates:
        """The best (query, class) pairs; a query can stand under several classes."""
        scores = decoding.layer_logits[-1].sigmoid().flatten(1)
        best = scores.topk(min(self.config.max_candidates, scores.shape[1]), dim=1)
        return self.pairs(decoding, best.indices)

    def pairs(self, decoding: MapDecoding, pairs: Tensor) -> Candidates:
        """Candidates of pairs int64 [B, N], which count query * K + class."""
        scores = decoding.layer_logits[-1].sigmoid().flatten(1).gather(1, pairs)
        query = pairs // self.config.classes
        return Candidates(
            query=query,
            labels=pairs % self.config.classes,
            scores=scores,
            boxes=in_cells(corners(take(decoding.layer_boxes[-1], query)).clamp(0, 1), self.size),
        )

    # -- painting them ----------------------------------------------------------------------------

    def draw(self, decoding: MapDecoding, candidates: Candidates) -> Drawing:
        """Masks of the candidates and of the drivable area."""
        memory = decoding.memory
        things = self.thing_masks(memory, take(decoding.layer_queries[-1], candidates.query))
        drivable = self.stuff_masks(memory, *self.stuff(len(memory)))
        return Drawing(
            things=things.mask.unflatten(2, self.size),
            thing_queries=things.queries,
            drivable=drivable.mask[:, 0].unflatten(1, self.size),
            drivable_query=drivable.queries[:, 0],
        )

    def stuff(self, rows: int) -> tuple[Tensor, Tensor]:
        """Query and position [B, 1, C] of the drivable area."""
        query, position = self.stuff_query.weight.expand(rows, -1, -1).chunk(2, -1)
        return query, position

    # -- what comes out ---------------------------------------------------------------------------

    def predictions(
        self, decoding: MapDecoding, candidates: Candidates, drawing: Drawing, merged: Merged
    ) -> MapPredictions:
        """Candidates in their own order, as everyone outside knows them."""
        covered = self.rules.covered
        # Independent sigmoids as one softmax: "no object" has logit 0.
        logits = take(decoding.layer_logits[-1], candidates.query)
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1)
        kept = torch.zeros_like(merged.kept).scatter(1, merged.order, merged.kept)
        return MapPredictions(
            layer_logits=(logits,),
            layer_masks=((drawing.things - covered) * MASK_LOGIT_SLOPE,),
            drivable=(drawing.drivable - covered) * MASK_LOGIT_SLOPE,
            labels=candidates.labels,
            kept=kept,
            lanes=merged.lanes(self.config.classes),
            decoding=decoding,
        )

    def tokens(self, drawing: Drawing, merged: Merged, predictions: MapPredictions) -> TokenSet:
        """Tokens of the map elements and of the drivable area."""
        first = (~merged.kept).to(torch.int8).argsort(dim=1, stable=True)
        places = first[:, : int(merged.kept.sum(1).max())]
        kept = merged.kept.gather(1, places)
        rows = places if self.config.compat == "uniad" else merged.order.gather(1, places)
        things = take(drawing.thing_queries, rows) * kept.unsqueeze(-1)
        feats = torch.cat([things, drawing.drivable_query.unsqueeze(1)], 1)
        return TokenSet("map", feats, F.pad(kept, (0, 1), value=True), predictions)


def _linears(layers: int, dim: int, out: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(dim, out) for _ in range(layers))


def _box_branches(layers: int, dim: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4)
        )
        for _ in range(layers)
    )


def corners(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] from (cx, cy, w, h) to (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def in_cells(fractions: Tensor, size: Size) -> Tensor:
    """Boxes [..., 4] (x, y, x, y), or points [..., 2], from fractions to cells."""
    rows, columns = size
    scale = fractions.new_tensor([columns, rows])
    return fractions * scale.repeat(fractions.shape[-1] // 2)


def cell_fractions(size: Size) -> Tensor:
    """Centres of cells [S, 2], row by row, (x, y) as fractions of the map."""
    rows, columns = size
    x = (torch.arange(columns) + 0.5) / columns
    y = (torch.arange(rows) + 0.5) / rows
    return torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], -1).flatten(0, 1)


def sine_positions(dim: int, size: Size, temperature: float = 10000.0) -> Tensor:
    """DETR's sine encoding of cell centres [S, C]: first half y, second half x.

    Coordinates run over 0..2 pi; sine and cosine take turns, frequencies fall by `temperature`.
    """
    half = dim // 2
    exponent = 2 * (torch.arange(half) // 2) / half
    parts = []
    for cells in size:
        # DETR's 1e-6 against maps without a cell is kept: it shows in the sixth digit.
        place = (torch.arange(cells) + 0.5) / (cells + 1e-6) * 2 * math.pi
        angle = place[:, None] / temperature**exponent  # cells, C / 2
        wave = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)
        parts.append(wave)
    rows, columns = size
    y = parts[0][:, None].expand(-1, columns, -1)
    x = parts[1][None].expand(rows, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)
