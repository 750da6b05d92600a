"""How TrackFormer learns from a clip: ids come from the ground truth instead of from scores.

A frame as in evaluation, up to the decoder; then every decoder level is matched to the annotated
agents (odvla.losses.clip), the last level's matches name the tracks, and those that overlap their
object well are carried on. Chance drops some of them (to learn to find them again) and carries
some queries on that are no tracks (to learn to end them).

Shape legend: B rows, Q queries, C channels, A annotated agents, S carried slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odvla.geometry import rotation_2d
from odvla.losses.clip import ClipMatcher, ClipTargets, Lesson, LevelMatch, without_ego
from odvla.queries.track_life import FALSE_TRACK, Tracks
from odvla.types import DETECTION_CLASSES, AgentTargets, Frames, SceneFeatures, TokenSet

if TYPE_CHECKING:
    from odvla.queries.trackformer import Detections, TrackFormer, TrackState

EGO_LABEL = DETECTION_CLASSES.index("car")


@dataclass(frozen=True)
class TrackLearning:
    """Which tracks training carries on, and which are tokens; UniAD's numbers."""

    carry_iou: float = 0.5  # a track must overlap its object more than this to be carried on
    token_iou: float = 0.3  # and at least this to be a token
    random_drop: float = 0.1  # probability of not carrying on one that is good enough
    false_tracks: float = 0.3  # queries carried on that are no tracks, a part of those that are

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: naming the setting.
        """
        for name in ("carry_iou", "token_iou", "random_drop", "false_tracks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"learning.{name} must be within 0..1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Draws:
    """What is left to chance when tracks are carried on in training."""

    keep: Tensor  # bool [B, Q]: a track here is not dropped
    accompany: Tensor  # bool [B, Q]: a track here brings a query with it that is no track

    @classmethod
    def random(
        cls, like: Tensor, learning: TrackLearning, generator: torch.Generator | None = None
    ) -> Draws:
        """Draw for queries [B, Q] on the CPU; None: from torch's own generator.

        A stage seeds that one by its step, so that a run that was interrupted draws the same.
        """
        first, second = torch.rand(2, *like.shape, generator=generator).to(like.device)
        return cls(first >= learning.random_drop, second < learning.false_tracks)

    @classmethod
    def none(cls, like: Tensor) -> Draws:
        """Nothing is dropped or added."""
        return cls(
            torch.ones_like(like, dtype=torch.bool), torch.zeros_like(like, dtype=torch.bool)
        )


def slots_to_carry(
    tracks: Tracks, draws: Draws, *, least_iou: float = 0.5, idle: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Slots of the tracks that training carries on, then of the queries that are no tracks.

    A track whose object is gone keeps its overlap of before, and so is carried on: it must learn
    to say that there is nothing.

    Args:
        tracks: with ids and overlaps of the matcher.
        draws: what is left to chance.
        least_iou: a track must overlap more than this.
        idle: bool [B, Q] which queries may be added; None: all that are no tracks. The likeliest
            ones are.

    Returns:
        Slots int64 [B, S] and which of them are in use, bool [B, S].

    Source: UniAD's QueryInteractionModule.
    """
    good = (tracks.ids >= 0) & (tracks.iou > least_iou) & tracks.mask & draws.keep
    idle = (tracks.ids < 0) & tracks.mask & (idle if idle is not None else tracks.mask)
    chosen: list[Tensor] = []
    for row in range(len(tracks)):
        spare = idle[row].nonzero()[:, 0]
        count = int((good[row] & draws.accompany[row]).sum())
        if count < len(spare):
            likely = tracks.scores[row, spare].argsort()
            spare = spare[likely[len(spare) - count :]]
        elif count == 0:
            spare = spare[:0]
        chosen.append(torch.cat([good[row].nonzero()[:, 0], spare]))
    used = torch.nn.utils.rnn.pad_sequence([torch.ones_like(c) for c in chosen], batch_first=True)
    slots = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    return slots, used.bool()


def training_tracks(
    tracks: Tracks, draws: Draws, *, least_iou: float = 0.5, idle: Tensor | None = None
) -> Tracks:
    """The tracks of `slots_to_carry`."""
    slots, used = slots_to_carry(tracks, draws, least_iou=least_iou, idle=idle)
    return replace(tracks.at(slots), mask=used)


def clip_targets(module: TrackFormer, targets: AgentTargets) -> ClipTargets:
    """Annotated agents in the module's own terms."""
    config, rows = module.config, len(targets.boxes)
    paths, known = paths_of(targets, config.past_steps, config.future_steps)
    if targets.ego is None:
        ego_code = targets.boxes.new_zeros(rows, module.code_size)
    else:
        ego_code = module.codes_of(targets.ego)
    return ClipTargets(
        codes=module.codes_of(targets.boxes),
        labels=targets.labels,
        ids=targets.track_ids,
        mask=targets.mask,
        paths=paths,
        paths_mask=known,
        ego_code=ego_code,
        ego_label=torch.full((rows,), EGO_LABEL, device=targets.mask.device),
        ego_known=torch.full((rows,), targets.ego is not None, device=targets.mask.device),
    )


def paths_of(targets: AgentTargets, past: int, future: int) -> tuple[Tensor, Tensor]:
    """Where agents were (latest first) and will be, from where they are, along the lidar's axes.

    Args:
        targets: A agents.
        past: steps, as many as there are at most.
        future: steps, as many as there are at most.

    Returns:
        [B, A, past + future, 2] metres, and 1 where known, 0 where not, of the same shape.

    Source: UniAD's NuScenesTraj.get_traj_label.
    """
    own = targets.boxes.new_zeros(*targets.mask.shape, past + future, 2)
    known = torch.zeros_like(own)
    for first, steps, xy, mask in (
        (0, past, targets.past, targets.past_mask),
        (past, future, targets.future, targets.future_mask),
    ):
        if xy is not None and mask is not None:
            last = first + min(steps, xy.shape[2])
            own[:, :, first:last] = xy[:, :, : last - first]
            known[:, :, first:last] = mask[:, :, : last - first, None].float()
    # An agent's own frame has x to its right and y ahead: its heading is a quarter turn before.
    turn = rotation_2d(targets.boxes[..., 6] - torch.pi / 2)  # B, A, 2, 2
    return own @ turn.transpose(-1, -2), known


def learn(
    module: TrackFormer,
    features: SceneFeatures,
    frames: Frames,
    state: TrackState | None,
    targets: AgentTargets | ClipTargets,
    matcher: ClipMatcher,
    draws: Draws | None = None,
) -> tuple[TokenSet, TrackState, Lesson]:
    """One frame of a clip; see TrackFormer.learn."""
    state = module.start(frames) if state is None else module.forget(state, frames)
    tracks = module.fresh(len(frames.scene_start)).cat(module.move(state, frames))
    found = module.detect(features, tracks)
    goal = targets if isinstance(targets, ClipTargets) else clip_targets(module, targets)
    matches = match_levels(module, matcher, tracks, found, goal)
    asked = module.reference_points(tracks.query[..., : module.dim])[..., 2]
    tracks = module.update(tracks, found)
    last = matches[-1]
    tracks = replace(tracks, ids=last.ids, iou=last.iou, matched=last.target)
    tokens = module.tokens(tracks, found, state, _good_enough(module, tracks))
    if draws is None:
        random = module.training
        draws = (
            Draws.random(tracks.ids, module.config.learning) if random else Draws.none(tracks.ids)
        )
    uniad = module.config.compat == "uniad"
    slots, used = slots_to_carry(
        tracks,
        draws,
        least_iou=module.config.learning.carry_iou,
        # UniAD may carry a second query of the car itself.
        idle=None if uniad else _not_the_car(tracks, module.config.queries),
    )
    following = replace(module.memory_bank(tracks).at(slots), mask=used)
    if not uniad:
        # UniAD's false tracks are matched like fresh queries; ours stay what they are.
        ids = torch.where(following.ids < 0, FALSE_TRACK, following.ids)
        following = replace(following, ids=ids)
    state = module.state_after(
        module.query_interaction(following),
        slots,
        state.next_id,
        frames,
        # In training UniAD asks for the next height before the query is renewed, in tests after.
        height=asked.gather(1, slots) if uniad else None,
    )
    lesson = Lesson(
        found.logits, found.codes, found.past, matches, goal, tracks.mask, module.config.queries
    )
    return tokens, state, lesson


def match_levels(
    module: TrackFormer,
    matcher: ClipMatcher,
    tracks: Tracks,
    found: Detections,
    targets: ClipTargets,
) -> tuple[LevelMatch, ...]:
    """Each level matched from the same tracks; only the last one knows their overlaps so far."""
    ids = without_ego(tracks.ids, module.config.queries)
    last = len(found.logits) - 1
    return tuple(
        matcher.match(
            logits,
            codes,
            ids,
            tracks.iou if level == last else torch.zeros_like(tracks.iou),
            tracks.mask,
            targets,
        )
        for level, (logits, codes) in enumerate(zip(found.logits, found.codes, strict=True))
    )


def _good_enough(module: TrackFormer, tracks: Tracks) -> Tensor:
    """Which queries are tokens in training: those that stand for something that is there."""
    overlap = tracks.iou >= module.config.learning.token_iou
    return (tracks.ids >= 0) & (tracks.matched >= 0) & overlap & tracks.mask


def _not_the_car(tracks: Tracks, ego: int) -> Tensor:
    allowed = torch.ones_like(tracks.mask)
    allowed[:, ego] = False
    return allowed
