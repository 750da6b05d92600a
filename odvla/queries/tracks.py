"""Tracks between key-frames: which queries live on, where they are expected, who they are.

Shape legend: B rows, Q queries of a step, M carried tracks at most, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from odvla import geometry
from odvla.types import BevGrid, Frames, TensorFields, shape_checked


@shape_checked
@dataclass(frozen=True)
class AgentState(TensorFields):
    """Tracks to carry on, in the frame of the key-frame they were last updated at."""

    embeddings: Float[Tensor, "B M D"]
    boxes: Float[Tensor, "B M 9"]
    track_ids: Int64[Tensor, "B M"]
    misses: Int64[Tensor, "B M"]  # key-frames in a row without a confident detection
    source: Int64[Tensor, "B M"]  # query index in the step that made this state
    mask: Bool[Tensor, "B M"]  # False: an empty slot
    next_id: Int64[Tensor, " B"]
    lidar_to_global: Float64[Tensor, "B 4 4"]
    timestamp_s: Float64[Tensor, " B"]


@dataclass(frozen=True)
class TrackRules:
    """When a track is born, missed and dropped."""

    birth_threshold: float
    keep_threshold: float
    max_misses: int
    duplicate_m: float


def empty_state(frames: Frames, tracks: int, dim: int) -> AgentState:
    """No tracks, at the time and place of `frames`."""
    batch, device = len(frames.scene_start), frames.images.device
    numbers = torch.zeros(batch, tracks, dtype=torch.int64, device=device)
    return AgentState(
        embeddings=torch.zeros(batch, tracks, dim, device=device),
        boxes=torch.zeros(batch, tracks, 9, device=device),
        track_ids=numbers - 1,
        misses=numbers,
        source=numbers - 1,
        mask=numbers.bool(),
        next_id=numbers.new_zeros(batch),
        lidar_to_global=frames.lidar_to_global,
        timestamp_s=frames.timestamp_s,
    )


def expect(state: AgentState, frames: Frames) -> AgentState:
    """Tracks where they should be now: moved by their own velocity, then into the new frame.

    Rows with frames.scene_start lose their tracks and count ids from 0 again, as a fresh start.
    """
    start = frames.scene_start
    seconds = torch.where(start, 0, frames.timestamp_s - state.timestamp_s).float()
    to_now = geometry.relative_transform(state.lidar_to_global, frames.lidar_to_global)
    boxes = geometry.transform_boxes(to_now, geometry.advance_boxes(state.boxes, seconds))
    mask = state.mask & ~start[:, None]
    return AgentState(
        embeddings=torch.where(mask.unsqueeze(-1), state.embeddings, 0),
        boxes=torch.where(mask.unsqueeze(-1), boxes, 0),
        track_ids=torch.where(mask, state.track_ids, -1),
        misses=torch.where(mask, state.misses, 0),
        source=torch.where(mask, state.source, -1),
        mask=mask,
        next_id=torch.where(start, 0, state.next_id),
        lidar_to_global=frames.lidar_to_global,
        timestamp_s=frames.timestamp_s,
    )


@torch.no_grad()
def give_ids(
    expected: AgentState, scores: Tensor, centres: Tensor, newborn: int, rules: TrackRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Name the tracks of a step.

    Args:
        expected: what `expect` returned; its slots are queries newborn .. newborn + M - 1.
        scores: [B, Q].
        centres: [B, Q, 2], metres.
        newborn: number of newborn queries; they are queries 0 .. newborn - 1.
        rules: thresholds.

    Returns:
        track_ids [B, Q] (-1: not a track), misses [B, Q], next_id [B].
    """
    confident = scores >= rules.keep_threshold
    held = expected.mask & confident[:, newborn:]
    distance = torch.cdist(centres[:, :newborn], centres[:, newborn:])
    double = ((distance < rules.duplicate_m) & held.unsqueeze(1)).any(-1)
    born = (scores[:, :newborn] >= rules.birth_threshold) & ~double
    new_ids = expected.next_id.unsqueeze(1) + born.cumsum(1) - 1
    misses = torch.where(confident[:, newborn:], 0, expected.misses + 1)
    lives = expected.mask & (misses <= rules.max_misses)
    ids = torch.cat([torch.where(born, new_ids, -1), torch.where(lives, expected.track_ids, -1)], 1)
    misses = torch.cat([misses.new_zeros(born.shape), torch.where(lives, misses, 0)], 1)
    return ids, misses, expected.next_id + born.sum(1)


def carry(
    expected: AgentState,
    embeddings: Tensor,
    boxes: Tensor,
    scores: Tensor,
    track_ids: Tensor,
    misses: Tensor,
    next_id: Tensor,
    grid: BevGrid,
) -> AgentState:
    """The state after a step: the M best-scored tracks that are still on the grid.

    Args:
        expected: slots, pose and time of this step.
        embeddings: [B, Q, D].
        boxes: [B, Q, 9].
        scores: [B, Q].
        track_ids: [B, Q], -1: not a track.
        misses: [B, Q].
        next_id: [B].
        grid: tracks that leave it are dropped.
    """
    place = geometry.to_bev_unit(grid, boxes[..., :2])
    alive = (track_ids >= 0) & (place > 0).all(-1) & (place < 1).all(-1)
    slots = expected.mask.shape[1]
    best = torch.where(alive, scores, -1).topk(slots, dim=1).indices
    mask = alive.gather(1, best)
    # Detached boxes: a later frame's loss should not push an earlier frame's box about.
    return AgentState(
        embeddings=_rows(embeddings, best),
        boxes=_rows(boxes.detach().float(), best),
        track_ids=torch.where(mask, track_ids.gather(1, best), -1),
        misses=torch.where(mask, misses.gather(1, best), 0),
        source=torch.where(mask, best, -1),
        mask=mask,
        next_id=next_id,
        lidar_to_global=expected.lidar_to_global,
        timestamp_s=expected.timestamp_s,
    )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Values [B, Q, D] at index [B, M]: [B, M, D]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
