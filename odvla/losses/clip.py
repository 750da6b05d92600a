"""UniAD's losses of tracks over a clip: who is who frame by frame, and what that costs.

A query that carries a track answers for the track's own object for as long as it lives; where that
object is not annotated now, the query must say "background". Queries that are no tracks are matched
by cost to the objects that nobody carries. Every decoder level is matched by itself, from the same
tracks; the last level's matches are the ones that live on. One further query stands for the car
itself.

What is unusual: rows of a batch are matched and normalised one by one, so that a batch costs the
mean of its clips; `compat="uniad"` reproduces what UniAD's ClipMatcher does by accident
(`Quirks` below; docs/parity.md).

Shape legend: B rows, Q queries, A annotated agents (padded), K classes, T steps of a path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from odvla.errors import UserError
from odvla.losses.matching import focal_cost, focal_loss, hungarian
from odvla.queries.track_life import EGO, NOBODY
from odvla.types import BevGrid, MapPredictions, MapTargets, TensorFields

Compat = Literal["none", "uniad"]
# "gradient" flows from frame to frame through the BEV; "detached": it does not; "uniad": the
# history is computed apart, in evaluation mode, and the first frame is its own history.
History = Literal["gradient", "detached", "uniad"]
NO_TARGET = -1
# What the boxes are compared by in matching: all of the code but the velocity.
MATCHED_NUMBERS = 8


@dataclass(frozen=True)
class Quirks:
    """What UniAD's ClipMatcher does by accident; what False means is our correction."""

    # The car's own query counts twice: among the others, where it is background, and once more with
    # its class. Otherwise with its class alone.
    ego_counts_twice: bool
    # Tracks whose object is gone are among the positives that the class loss is divided by.
    # Otherwise only objects that are there (and the car).
    gone_tracks_are_positives: bool
    # Overlaps are measured only in frames in which some object is new, and else stay as they were.
    # Otherwise always.
    overlap_only_with_births: bool


QUIRKS: dict[Compat, Quirks] = {
    "uniad": Quirks(True, True, True),
    "none": Quirks(False, False, False),
}


@dataclass(frozen=True)
class ClipTargets(TensorFields):
    """Ground truth of one frame in UniAD's terms."""

    codes: Tensor  # [B, A, 10] UniAD's box code, metres
    labels: Tensor  # int64 [B, A]
    ids: Tensor  # int64 [B, A] the object's number, the same through a clip
    mask: Tensor  # bool [B, A] False: padding
    paths: Tensor  # [B, A, T, 2] past, then future positions, metres from the object
    paths_mask: Tensor  # [B, A, T, 2] 0: unknown
    ego_code: Tensor  # [B, 10]
    ego_label: Tensor  # int64 [B]
    ego_known: Tensor  # bool [B] False: the car's own query learns nothing


@dataclass(frozen=True)
class LevelMatch(TensorFields):
    """Who is who for one decoder level."""

    ids: Tensor  # int64 [B, Q] object that each query stands for; negative: none
    target: Tensor  # int64 [B, Q] its place among the targets; NO_TARGET: it is not there
    iou: Tensor  # [B, Q] overlap with it
    inherited: Tensor  # bool [B, Q] the query came with its object


@dataclass(frozen=True)
class Lesson(TensorFields):
    """One frame of a clip as it is judged: predictions a level, matches a level, the truth."""

    logits: tuple[Tensor, ...]  # [B, Q, K]
    codes: tuple[Tensor, ...]  # [B, Q, 10]
    paths: tuple[Tensor, ...]  # [B, Q, T, 2]
    matches: tuple[LevelMatch, ...]
    targets: ClipTargets
    used: Tensor  # bool [B, Q] slots in use
    ego: int  # the car's own query


class MapCriterion(Protocol):
    """What judges the map of a clip's last frame: named losses, weighted, means over the rows."""

    def __call__(
        self, head: Any, predictions: MapPredictions, targets: MapTargets
    ) -> dict[str, Tensor]:
        """Losses by name; `head` is the query module that made the predictions."""
        ...


@dataclass(frozen=True)
class ClipLossConfig:
    """Weights of the losses and of the matching costs; the defaults are UniAD's."""

    agent_class: float = 2.0
    agent_box: float = 0.25
    past_trajectory: float = 0.0  # UniAD has the head, and gives it no weight
    cost_class: float = 2.0
    cost_box: float = 0.25
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    # cx, cy, log w, log l, cz, log h, sin, cos, vx, vy
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
    history: History = "detached"
    compat: Compat = "none"
    map: Any = None  # config of a MapCriterion, with build(); None: the map learns nothing

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting.
        """
        if len(self.code_weights) != 10:
            raise UserError(f"losses.code_weights must be 10 numbers, not {len(self.code_weights)}")

    def build(self, grid: BevGrid) -> ClipCriterion:
        """The criterion; the grid is whatever the predictions stand on."""
        return ClipCriterion(self, self.map.build() if self.map is not None else None)


class ClipMatcher:
    """Who is who in a frame; see the module's head.

    Args:
        config: costs.
    """

    def __init__(self, config: ClipLossConfig) -> None:
        self.config, self.quirks = config, QUIRKS[config.compat]

    @torch.no_grad()
    def match(
        self,
        logits: Tensor,
        codes: Tensor,
        ids: Tensor,
        iou: Tensor,
        used: Tensor,
        targets: ClipTargets,
    ) -> LevelMatch:
        """Match one decoder level.

        Args:
            logits: [B, Q, K].
            codes: [B, Q, 10].
            ids: int64 [B, Q] what each query stood for so far; NOBODY: it may be matched.
            iou: [B, Q] its last overlap.
            used: bool [B, Q].
            targets: of the frame.

        Source: UniAD's ClipMatcher.match_for_single_frame.
        """
        inherited = (ids >= 0) & used
        same = (ids.unsqueeze(-1) == targets.ids.unsqueeze(1)) & inherited.unsqueeze(-1)
        same &= targets.mask.unsqueeze(1)  # B, Q, A
        target = torch.full_like(ids, NO_TARGET)
        row, query, place = same.nonzero(as_tuple=True)
        target[row, query] = place
        free, unclaimed = (ids == NOBODY) & used, targets.mask & ~same.any(1)
        of_class, of_box = self.costs(logits, codes, targets)
        new = hungarian(of_class + of_box, free, unclaimed)
        ids = ids.clone()
        ids[new.row, new.query] = targets.ids[new.row, new.target]
        target[new.row, new.query] = new.target
        there = target >= 0
        if self.quirks.overlap_only_with_births:
            births = free.any(1) & unclaimed.any(1)
            there = there & births.unsqueeze(1)
        row, query = there.nonzero(as_tuple=True)
        iou = iou.clone()
        truth = targets.codes[row, target[row, query]]
        iou[row, query] = nearest_iou(codes[row, query].float(), truth).to(iou.dtype)
        return LevelMatch(ids, target, iou, inherited)

    def costs(self, logits: Tensor, codes: Tensor, targets: ClipTargets) -> tuple[Tensor, Tensor]:
        """What it costs to take a query for an object: of the class, of the box; both [B, Q, A]."""
        config = self.config
        index = targets.labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
        of_class = focal_cost(logits.float(), config.focal_alpha, config.focal_gamma)
        apart = torch.cdist(
            codes[..., :MATCHED_NUMBERS].float(), targets.codes[..., :MATCHED_NUMBERS], p=1
        )
        return config.cost_class * of_class.gather(-1, index), config.cost_box * apart


class ClipCriterion(nn.Module):
    """Losses of a clip; see the module's head.

    Args:
        config: weights.
        map_criterion: judges the map; None: nobody does.
    """

    code_weights: Tensor

    def __init__(self, config: ClipLossConfig, map_criterion: Any = None) -> None:
        super().__init__()
        self.config, self.quirks = config, QUIRKS[config.compat]
        self.matcher, self.map_criterion = ClipMatcher(config), map_criterion
        weights = torch.tensor(config.code_weights)
        self.register_buffer("code_weights", weights, persistent=False)

    def forward(
        self,
        lessons: tuple[Lesson, ...],
        map_head: Any = None,
        map_predictions: MapPredictions | None = None,
        map_targets: MapTargets | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; their sum is what is minimised.

        Args:
            lessons: one a frame. UniAD sums over frames and levels, and so do we.
            map_head: the query module of the map, or None.
            map_predictions: its predictions for the last frame, or None.
            map_targets: of the last frame, or None.

        Returns:
            agent_class, agent_box, past_trajectory (unless its weight is 0), and the map's.
        """
        levels = [losses for lesson in lessons for losses in self.levels(lesson)]
        losses = {
            name: torch.stack([level[name] for level in levels]).sum(0).mean()
            for name in (levels[0] if levels else ())
        }
        judged = map_predictions is not None and map_targets is not None
        if self.map_criterion is not None and judged:
            losses |= self.map_criterion(map_head, map_predictions, map_targets)
        return losses

    def levels(self, lesson: Lesson) -> list[dict[str, Tensor]]:
        """Weighted losses [B] of a frame, one dict a decoder level."""
        with torch.autocast(lesson.used.device.type, enabled=False):
            return [
                self._level(lesson, logits.float(), codes.float(), paths.float(), match)
                for logits, codes, paths, match in zip(
                    lesson.logits, lesson.codes, lesson.paths, lesson.matches, strict=True
                )
            ]

    def _level(
        self, lesson: Lesson, logits: Tensor, codes: Tensor, paths: Tensor, match: LevelMatch
    ) -> dict[str, Tensor]:
        config = self.config
        losses = {
            "agent_class": config.agent_class * self._classes(lesson, logits, match),
            "agent_box": config.agent_box * self._boxes(lesson, codes, match),
        }
        if config.past_trajectory:
            losses["past_trajectory"] = config.past_trajectory * _paths(lesson, paths, match)
        return losses

    def _classes(self, lesson: Lesson, logits: Tensor, match: LevelMatch) -> Tensor:
        """Focal loss of every query and the car's own [B]."""
        config, targets = self.config, lesson.targets
        wanted = torch.zeros_like(logits)
        row, query = (match.target >= 0).nonzero(as_tuple=True)
        wanted[row, query, targets.labels[row, match.target[row, query]]] = 1
        loss = focal_loss(logits, wanted, config.focal_alpha, config.focal_gamma).sum(-1)
        counted = lesson.used.clone()
        known = targets.ego_known
        counted[:, lesson.ego] &= known & self.quirks.ego_counts_twice
        car = torch.zeros_like(logits[:, lesson.ego])
        car[torch.arange(len(car), device=car.device), targets.ego_label] = 1
        own = focal_loss(logits[:, lesson.ego], car, config.focal_alpha, config.focal_gamma).sum(-1)
        total = torch.where(counted, loss, 0).sum(1) + torch.where(known, own, 0)
        gone_too = self.quirks.gone_tracks_are_positives
        positive = lesson.used & (match.ids >= 0) if gone_too else match.target >= 0
        return total / (positive.sum(1) + known).clamp(min=1)

    def _boxes(self, lesson: Lesson, codes: Tensor, match: LevelMatch) -> Tensor:
        """Mean L1 error [B] of the codes of found objects and of the car itself."""
        targets = lesson.targets
        there = match.target >= 0
        index = match.target.clamp(min=0).unsqueeze(-1).expand(-1, -1, codes.shape[-1])
        if targets.codes.shape[1] == 0:
            error = codes.new_zeros(len(codes))
        else:
            apart = (codes - targets.codes.gather(1, index)).abs() * self.code_weights
            error = torch.where(there, apart.sum(-1), 0).sum(1)
        own = ((codes[:, lesson.ego] - targets.ego_code).abs() * self.code_weights).sum(-1)
        error = error + torch.where(targets.ego_known, own, 0)
        return error / (there.sum(1) + targets.ego_known).clamp(min=1)


def _paths(lesson: Lesson, paths: Tensor, match: LevelMatch) -> Tensor:
    """Mean error [B] of the known coordinates of found objects' paths."""
    row, query = (match.target >= 0).nonzero(as_tuple=True)
    place = match.target[row, query]
    known = lesson.targets.paths_mask[row, place]
    error = ((paths[row, query] - lesson.targets.paths[row, place]).abs() * known).flatten(1).sum(1)
    total = error.new_zeros(len(paths)).index_add(0, row, error)
    count = error.new_zeros(len(paths)).index_add(0, row, (known > 0).flatten(1).sum(1).float())
    return total / (count + 1e-5)


def nearest_iou(codes: Tensor, others: Tensor) -> Tensor:
    """Overlap of footprints after turning each box to the nearer axis; height does not count.

    Args:
        codes: [P, 10] UniAD's box code.
        others: [P, 10], pair by pair.

    Returns:
        Intersection over union [P].

    Source: mmdet3d's bbox_overlaps_nearest_3d, which UniAD measures tracks by.
    """

    def corners(code: Tensor) -> tuple[Tensor, Tensor]:
        yaw = torch.atan2(code[:, 6], code[:, 7])
        off_axis = (yaw - (yaw / math.pi + 0.5).floor() * math.pi).abs()
        size = code[:, 2:4].exp()
        size = torch.where((off_axis > math.pi / 4).unsqueeze(1), size.flip(1), size)
        return code[:, :2] - size / 2, code[:, :2] + size / 2

    (low, high), (other_low, other_high) = corners(codes), corners(others)
    both = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(1)
    union = (high - low).prod(1) + (other_high - other_low).prod(1) - both
    return both / union.clamp(min=1e-6)


def without_ego(ids: Tensor, ego: int) -> Tensor:
    """Ids [B, Q] in which the car's own query is marked, so that it is matched to nobody."""
    ids = ids.clone()
    ids[:, ego] = EGO
    return ids
