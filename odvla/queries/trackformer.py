"""UniAD's TrackFormer at full fidelity: agents as queries that are detected and tracked at once.

901 learned queries (the last stands for the car itself) and the tracks that live attend to the BEV;
every decoder layer refines reference points; scores decide about births and deaths; a memory bank
and the query interaction module prepare the next frame. Tokens are the decoder's embeddings of the
confident tracks, by falling score.

What is unusual: any number of scenes run side by side, padded to the one with the most tracks;
`compat="uniad"` reproduces what the released weights and the published numbers came with.

Shape legend: B rows, Q = fresh + carried queries (in this order), C channels, K classes, T past and
future steps, D decoder layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from odvla.errors import check_sizes
from odvla.losses.clip import ClipMatcher, ClipTargets, Lesson
from odvla.ops.transformer import DecoderLayer, inverse_sigmoid
from odvla.queries.box_codes import CODE, boxes_of_codes, codes_of_boxes
from odvla.queries.protocol import Need, fake_features, require_bev, require_grid
from odvla.queries.track_learning import Draws, TrackLearning, learn
from odvla.queries.track_life import (
    EGO,
    NOBODY,
    MemoryBank,
    QueryInteraction,
    Range,
    TrackRules,
    Tracks,
    give_ids,
    move_references,
    take,
)
from odvla.types import (
    DETECTION_CLASSES,
    AgentPredictions,
    AgentTargets,
    BevGrid,
    Frames,
    SceneFeatures,
    Stream,
    TensorFields,
    TokenSet,
)

EMPTY_LOGIT = -20.0  # of slots that are not in use
PRIOR = 0.01  # start probability of every class
# Deviation of fresh reference points' logits where no weights are loaded: nearly even over the
# ground (torch's own start puts seven of ten into the middle third). Heights start alike.
GROUND_SPREAD, HEIGHT_SPREAD = 1.7, 0.1
# Deviation of fresh queries' content: beside standard normal numbers, which say nothing, what a
# query reads from the BEV is not heard for a long time.
CONTENT_SPREAD = 0.02


@dataclass(frozen=True)
class TrackFormerConfig:
    """Sizes of TrackFormer; the defaults are UniAD's and OpenDriveVLA's."""

    queries: int = 900
    layers: int = 6
    heads: int = 8
    hidden: int = 512
    points: int = 4
    classes: int = len(DETECTION_CLASSES)
    past_steps: int = 4
    future_steps: int = 4
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    dropout: float = 0.1
    interaction_dropout: float = 0.0
    bank_length: int = 4
    rules: TrackRules = field(default_factory=TrackRules)
    learning: TrackLearning = field(default_factory=TrackLearning)
    max_tracks: int = 300  # decoded at most
    # Centres outside are no agents: x_min, y_min, z_min, x_max, y_max, z_max.
    centre_range_m: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    # "uniad": the last token is dropped, a single one makes none (meant to drop the car's own
    # query, which is not among them; it drops the least confident track), ids go on counting from
    # scene to scene, and the height in a code is that of a box's bottom. "none": every confident
    # track is a token, ids start from 0, heights are those of centres.
    compat: Literal["none", "uniad"] = "none"

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "queries", "layers", "heads", "points", "max_tracks")

    def build(self, dim: int, grid: BevGrid | None) -> TrackFormer:
        """The module for an encoder's features.

        Raises:
            ValueError: the encoder has no BEV.
        """
        return TrackFormer(self, dim, require_grid(grid, "agent queries"))

    def fake_features(self, batch: int, dim: int, grid: BevGrid | None) -> SceneFeatures:
        """Features that fit, for tests."""
        return fake_features(batch, dim, grid)


@dataclass(frozen=True)
class TrackState(TensorFields):
    """Tracks to carry on, as they were at their last frame."""

    tracks: Tracks
    slot: Tensor  # int64 [B, Q] query of the last step that each was
    next_id: Tensor  # int64 [B]
    lidar_to_global: Tensor  # float64 [B, 4, 4]
    timestamp_s: Tensor  # float64 [B]
    # [B, Q] logit of the next reference's height; None: asked from the query (see `move`).
    height: Tensor | None = None


@dataclass(frozen=True)
class Detections:
    """What the decoder says of B x Q queries, one item a layer, the last layer last."""

    logits: tuple[Tensor, ...]  # [B, Q, K]
    codes: tuple[Tensor, ...]  # [B, Q, 10] metres
    past: tuple[Tensor, ...]  # [B, Q, T, 2] metres a step
    embeddings: tuple[Tensor, ...]  # [B, Q, C]
    references: tuple[Tensor, ...]  # [B, Q, 3] fractions, refined by each layer
    reference: Tensor  # [B, Q, 3] logit of the last layer's centre


class TrackFormer(nn.Module):
    """BEV and carried tracks to agents; see the module's head."""

    stream: Stream = "track"
    needs: Need = "bev"
    code_size = CODE

    def __init__(self, config: TrackFormerConfig, dim: int, grid: BevGrid) -> None:
        super().__init__()
        self.config, self.grid, self.dim = config, grid, dim
        x0, x1, y0, y1 = grid.extent_m
        z0, z1 = config.z_range_m
        self.space = Range((x0, y0, z0), (x1, y1, z1))
        self.query_embedding = nn.Embedding(config.queries + 1, 2 * dim)
        self.reference_points = nn.Linear(dim, 3)
        steps = config.past_steps + config.future_steps
        self.layers = nn.ModuleList(
            DecoderLayer(dim, config.heads, config.hidden, config.points, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.cls_branches = branches(config.layers, dim, config.classes, normed=True)
        self.reg_branches = branches(config.layers, dim, CODE)
        self.past_branches = branches(config.layers, dim, steps * 2)
        self.memory_bank = MemoryBank(dim, config.heads)
        self.query_interaction = QueryInteraction(dim, config.heads, config.interaction_dropout)
        # The positional halves of the queries, which references are read from, are standard normal.
        for row, spread in zip(
            self.reference_points.weight, (GROUND_SPREAD, GROUND_SPREAD, HEIGHT_SPREAD), strict=True
        ):
            nn.init.normal_(row, std=spread / math.sqrt(dim))
        nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.query_embedding.weight[:, dim:], std=CONTENT_SPREAD)
        bias = -math.log((1 - PRIOR) / PRIOR)
        for branch in self.cls_branches:
            assert isinstance(branch, nn.Sequential)
            last = branch[-1]
            assert isinstance(last, nn.Linear)
            nn.init.constant_(last.bias, bias)

    # -- a frame ----------------------------------------------------------------------------------

    def forward(
        self, features: SceneFeatures, frames: Frames, state: TrackState | None
    ) -> tuple[TokenSet, TrackState]:
        """Detect and track.

        Returns:
            Tokens by falling score with AgentPredictions, and the state for the next frame.

        Raises:
            ValueError: the features hold no BEV.
        """
        require_bev(features, "agent queries")
        state = self.start(frames) if state is None else self.forget(state, frames)
        carried = self.move(state, frames)
        tracks = self.fresh(len(carried)).cat(carried)
        found = self.detect(features, tracks)
        tracks = self.update(tracks, found)
        tracks, next_id = give_ids(tracks, state.next_id, self.config.rules)
        good = (tracks.ids >= 0) & (tracks.scores >= self.config.rules.keep) & tracks.mask
        tokens = self.tokens(tracks, found, state, good)
        following = self.follow(tracks)
        slots = _order(tracks.ids >= 0, tracks.mask, following.ids.shape[1])
        return tokens, self.state_after(following, slots, next_id, frames)

    def learn(
        self,
        features: SceneFeatures,
        frames: Frames,
        state: TrackState | None,
        targets: AgentTargets | ClipTargets,
        matcher: ClipMatcher,
        draws: Draws | None = None,
    ) -> tuple[TokenSet, TrackState, Lesson]:
        """As `forward`, but with the ground truth of the frame: it says which query is which agent.

        Args:
            features: of this frame.
            frames: the same frame.
            state: what the previous call returned; None at the start.
            targets: annotated agents.
            matcher: finds the query of each agent.
            draws: which tracks are dropped and how many false ones are carried on; None: drawn in
                training mode, none otherwise.

        Returns:
            Tokens of the tracks that overlap their agent well enough, by falling score; the state
            for the next frame; and what the frame is judged by (odvla.losses.clip).

        Raises:
            ValueError: the features hold no BEV.
        """
        require_bev(features, "agent queries")
        return learn(self, features, frames, state, targets, matcher, draws)

    def state_after(
        self,
        tracks: Tracks,
        slots: Tensor,
        next_id: Tensor,
        frames: Frames,
        height: Tensor | None = None,
    ) -> TrackState:
        """What is carried on from this frame: tracks [B, S] that were queries `slots`."""
        return TrackState(
            tracks, slots, next_id, frames.lidar_to_global, frames.timestamp_s, height
        )

    def start(self, frames: Frames) -> TrackState:
        """No tracks yet."""
        none = self.fresh(len(frames.scene_start)).at(
            torch.zeros(len(frames.scene_start), 0, dtype=torch.int64, device=self._device)
        )
        return TrackState(
            tracks=none,
            slot=none.ids,
            next_id=torch.zeros(len(none), dtype=torch.int64, device=self._device),
            lidar_to_global=frames.lidar_to_global,
            timestamp_s=frames.timestamp_s,
        )

    def forget(self, state: TrackState, frames: Frames) -> TrackState:
        """Without the tracks of rows where a scene starts."""
        begins = frames.scene_start
        kept = state.tracks.pick(~begins.unsqueeze(1) & state.tracks.mask)
        count = kept.ids.shape[1]
        next_id = state.next_id
        if self.config.compat == "none":
            next_id = torch.where(begins, 0, next_id)
        return replace(
            state,
            tracks=kept,
            slot=state.slot[:, :count],
            height=state.height[:, :count] if state.height is not None else None,
            next_id=next_id,
            # A scene's first frame has no frame before it: no motion.
            lidar_to_global=torch.where(
                begins.view(-1, 1, 1), frames.lidar_to_global, state.lidar_to_global
            ),
            timestamp_s=torch.where(begins, frames.timestamp_s, state.timestamp_s),
        )

    def fresh(self, rows: int) -> Tracks:
        """The learned queries, for B rows."""
        weight = self.query_embedding.weight
        query = weight.expand(rows, -1, -1)
        count, dim, bank = len(weight), self.dim, self.config.bank_length
        reference = self.reference_points(weight[:, :dim]).expand(rows, -1, -1)

        def zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.zeros(rows, count, *shape, dtype=dtype, device=weight.device)

        none = torch.full((rows, count), NOBODY, dtype=torch.int64, device=weight.device)
        return Tracks(
            query=query,
            reference=reference,
            embedding=zeros(dim),
            logits=zeros(self.config.classes),
            codes=zeros(CODE),
            scores=zeros(),
            ids=none,
            missed=zeros(dtype=torch.int64),
            bank=zeros(bank, dim),
            bank_empty=torch.ones(rows, count, bank, dtype=torch.bool, device=weight.device),
            wait=zeros(),
            iou=zeros(),
            matched=none,
            mask=torch.ones(rows, count, dtype=torch.bool, device=weight.device),
        )

    def move(self, state: TrackState, frames: Frames) -> Tracks:
        """Tracks where they are expected now.

        x and y come from the last place and velocity; z is asked anew from the query, as in UniAD.
        """
        tracks = state.tracks
        if tracks.ids.shape[1] == 0:
            return tracks
        moved = move_references(
            tracks.reference,
            tracks.codes[..., -2:],
            state.lidar_to_global,
            frames.lidar_to_global,
            frames.timestamp_s - state.timestamp_s,
            self.space,
        )
        height = state.height
        if height is None:
            height = self.reference_points(tracks.query[..., : self.dim])[..., 2]
        reference = torch.cat([moved[..., :2], height.unsqueeze(-1)], -1)
        return replace(tracks, reference=reference)

    def detect(self, features: SceneFeatures, tracks: Tracks) -> Detections:
        """Run the decoder."""
        assert features.bev is not None
        size = (features.bev.shape[1], features.bev.shape[2])
        value = features.bev.flatten(1, 2)
        positions, x = tracks.query.chunk(2, -1)
        padding = None if bool(tracks.mask.all()) else ~tracks.mask
        at = tracks.reference.float().sigmoid()
        logits, codes, past, embeddings, references = [], [], [], [], []
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, value, size, at[..., :2], padding)
            with torch.autocast(x.device.type, enabled=False):
                code = self.reg_branches[number](x.float())
                start = inverse_sigmoid(at)
                centre = (start + torch.cat([code[..., :2], code[..., 4:5]], -1)).sigmoid()
            metres = self.space.to_metres(centre)
            codes.append(
                torch.cat([metres[..., :2], code[..., 2:4], metres[..., 2:], code[..., 5:]], -1)
            )
            logits.append(self.cls_branches[number](x).float())
            past.append(self.past_branches[number](x).float().unflatten(-1, (-1, 2)))
            embeddings.append(x)
            at = centre.detach()
            references.append(at)
        return Detections(
            tuple(logits),
            tuple(codes),
            tuple(past),
            tuple(embeddings),
            tuple(references),
            inverse_sigmoid(centre),
        )

    def update(self, tracks: Tracks, found: Detections) -> Tracks:
        """Tracks with what the last layer says of them."""
        ids = tracks.ids.clone()
        ids[:, self.config.queries] = EGO
        return replace(
            tracks,
            logits=found.logits[-1],
            codes=found.codes[-1],
            scores=found.logits[-1].sigmoid().amax(-1) * tracks.mask,
            embedding=found.embeddings[-1],
            reference=found.reference,
            ids=ids,
        )

    def follow(self, tracks: Tracks) -> Tracks:
        """The tracks that live on, with the queries of the next frame."""
        remembered = self.memory_bank(tracks)
        return self.query_interaction(remembered.pick(remembered.ids >= 0))

    # -- what comes out ---------------------------------------------------------------------------

    def confident(self, tracks: Tracks) -> tuple[Tensor, Tensor]:
        """Confident tracks by falling score: slots int64 [B, N] and which count, bool [B, N]."""
        good = (tracks.ids >= 0) & (tracks.scores >= self.config.rules.keep) & tracks.mask
        return self.best(tracks.scores, tracks.codes, good)

    def best(self, scores: Tensor, codes: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the good queries, `max_tracks` at most.

        Args:
            scores: [B, Q].
            codes: [B, Q, 10].
            good: bool [B, Q].

        Returns:
            Slots int64 [B, N] by falling score, and which are good and inside `centre_range_m`,
            bool [B, N].
        """
        count = min(int(good.sum(1).max()), self.config.max_tracks)
        slots = scores.masked_fill(~good, -1.0).argsort(dim=1, descending=True, stable=True)
        slots = slots[:, :count]
        centre = take(codes, slots)[..., [0, 1, 4]]
        low, high = centre.new_tensor(self.config.centre_range_m).split(3)
        inside = ((centre >= low) & (centre <= high)).all(-1)
        return slots, good.gather(1, slots) & inside

    def tokens(
        self, tracks: Tracks, found: Detections, state: TrackState, good: Tensor
    ) -> TokenSet:
        """Tokens of the good queries (bool [B, Q]) and predictions of all."""
        slots, counted = self.best(tracks.scores, tracks.codes, good)
        if self.config.compat == "uniad" and not self.training:
            counted = drop_last(counted)
        order = (~counted).to(torch.int8).argsort(dim=1, stable=True)
        order = order[:, : int(counted.sum(1).max())]
        slots, counted = slots.gather(1, order), counted.gather(1, order)
        fresh = self.config.queries + 1
        carried = torch.full_like(tracks.ids, -1)
        carried[:, fresh:] = state.slot
        hidden = (~tracks.mask).unsqueeze(-1)
        # The car's own query is no agent.
        mask = tracks.mask & (tracks.ids != EGO)
        predictions = AgentPredictions(
            layer_logits=tuple(x.masked_fill(hidden, EMPTY_LOGIT) for x in found.logits),
            layer_boxes=tuple(self.boxes_of(code) for code in found.codes),
            track_ids=torch.where(mask, tracks.ids.clamp(min=NOBODY), NOBODY),
            carried_from=carried,
            mask=mask,
        )
        feats = take(tracks.embedding, slots) * counted.unsqueeze(-1)
        return TokenSet("track", feats, counted, predictions, slots)

    def boxes_of(self, codes: Tensor) -> Tensor:
        """Codes [..., 10] as boxes [..., 9]."""
        return boxes_of_codes(codes, bottom=self.config.compat == "uniad")

    def codes_of(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 9] as codes [..., 10]."""
        return codes_of_boxes(boxes, bottom=self.config.compat == "uniad")

    @property
    def _device(self) -> torch.device:
        return self.query_embedding.weight.device


def branches(layers: int, dim: int, out: int, *, normed: bool = False) -> nn.ModuleList:
    """One head a decoder layer: two hidden layers with ReLU, with LayerNorm before it if asked."""

    def head() -> nn.Sequential:
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.Linear(dim, dim), *([nn.LayerNorm(dim)] if normed else []), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(dim, out))

    return nn.ModuleList(head() for _ in range(layers))


def drop_last(counted: Tensor) -> Tensor:
    """Without the last True of each row (bool [B, N])."""
    position = counted.cumsum(1)
    return counted & (position < position[:, -1:])


def _order(chosen: Tensor, mask: Tensor, count: int) -> Tensor:
    """Slots in the order in which Tracks.pick puts the chosen ones."""
    return (~(chosen & mask)).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
