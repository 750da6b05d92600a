"""The life of a track query: born, carried from frame to frame, remembered, given up.

UniAD's tracker (which follows MOTR and MUTR3D): 900 fresh queries and one for the car itself stand
first in every frame, then the tracks that live. After the decoder, scores decide who is born and
who is missed; a memory bank lets a track look at its own past embeddings; the query interaction
module writes the query of the next frame.

Every tensor has a row a scene, padded to the longest; `mask` says which slots are in use. The
reference runs one scene at a time.

Shape legend: B rows, Q slots, C channels, K classes, M remembered embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.ops.transformer import inverse_sigmoid
from odvla.types import TensorFields

NOBODY = -1  # id of a query that is no track
EGO = -2  # id of the query that stands for the car itself
FALSE_TRACK = -3  # id of a query that is carried on in training although it is no track


@dataclass(frozen=True)
class Tracks(TensorFields):
    """Track queries of B scenes and what is known of each."""

    query: Tensor  # [B, Q, 2 C] positional half, content half
    reference: Tensor  # [B, Q, 3] reference point (x, y, z), logit of the fraction of the range
    embedding: Tensor  # [B, Q, C] what the decoder made of it
    logits: Tensor  # [B, Q, K]
    codes: Tensor  # [B, Q, 10] UniAD's box code, metres
    scores: Tensor  # [B, Q]
    ids: Tensor  # int64 [B, Q]; NOBODY, EGO or a track's number
    missed: Tensor  # int64 [B, Q] frames in a row with a low score
    bank: Tensor  # [B, Q, M, C] earlier embeddings, newest last
    bank_empty: Tensor  # bool [B, Q, M]
    wait: Tensor  # [B, Q] frames until the next embedding is remembered
    iou: Tensor  # [B, Q] with the ground truth it is matched to (training)
    matched: Tensor  # int64 [B, Q] ground truth it is matched to, -1: none (training)
    mask: Tensor  # bool [B, Q] slots in use

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids)

    def pick(self, chosen: Tensor) -> Tracks:
        """The chosen slots (bool [B, Q]) of each row, in their order, moved to the front.

        Slots that are not in use are never chosen; rows are padded to the longest.
        """
        chosen = chosen & self.mask
        longest = int(chosen.sum(1).max()) if len(chosen) else 0
        # A stable sort puts the chosen ones first without changing their order.
        order = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        picked = self.at(order)
        return replace(picked, mask=chosen.gather(1, order))

    def at(self, slots: Tensor) -> Tracks:
        """Slots int64 [B, S] of each row, in this order."""
        return replace(self, **{f.name: take(getattr(self, f.name), slots) for f in fields(self)})

    def cat(self, other: Tracks) -> Tracks:
        """These slots, then the others'."""
        parts = {
            f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)], 1)
            for f in fields(self)
        }
        return replace(self, **parts)


def take(values: Tensor, slots: Tensor) -> Tensor:
    """Slots int64 [B, S] of values [B, Q, ...]: [B, S, ...]."""
    index = slots.view(*slots.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*slots.shape, *values.shape[2:]))


@dataclass(frozen=True)
class TrackRules:
    """When a track is born and when it is given up; UniAD's numbers."""

    birth: float = 0.4  # a query with this score becomes a track
    keep: float = 0.35  # a track below it is missed
    patience: int = 5  # misses in a row after which it is given up


def give_ids(tracks: Tracks, next_id: Tensor, rules: TrackRules) -> tuple[Tracks, Tensor]:
    """Births and deaths after a frame.

    A miss is forgotten only by a score of at least `birth`: scores between `keep` and `birth`
    leave the count as it is (so does the reference).

    Args:
        tracks: with this frame's scores.
        next_id: int64 [B], the number the next track gets.
        rules: thresholds.

    Returns:
        Tracks with ids and misses, and the new next_id.
    """
    high = tracks.scores >= rules.birth
    born = high & (tracks.ids == NOBODY) & tracks.mask
    order = born.cumsum(1) - 1
    ids = torch.where(born, next_id.unsqueeze(1) + order, tracks.ids)
    missed = torch.where(high, 0, tracks.missed)
    misses = (tracks.ids >= 0) & (tracks.scores < rules.keep) & tracks.mask
    missed = missed + misses.long()
    ids = torch.where(misses & (missed >= rules.patience), NOBODY, ids)
    return replace(tracks, ids=ids, missed=missed), next_id + born.sum(1)


@dataclass(frozen=True)
class Range:
    """The space that reference points are fractions of."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def to_metres(self, fractions: Tensor) -> Tensor:
        """[..., 3] fractions to metres."""
        low, high = fractions.new_tensor(self.low), fractions.new_tensor(self.high)
        return fractions * (high - low) + low

    def to_fractions(self, metres: Tensor) -> Tensor:
        """[..., 3] metres to fractions."""
        low, high = metres.new_tensor(self.low), metres.new_tensor(self.high)
        return (metres - low) / (high - low)


def move_references(
    reference: Tensor,
    velocity: Tensor,
    old_to_global: Tensor,
    new_to_global: Tensor,
    seconds: Tensor,
    space: Range,
) -> Tensor:
    """Reference points of one frame in the next: each moves on with its velocity, the car with its.

    Args:
        reference: [B, Q, 3] logits of fractions.
        velocity: [B, Q, 2] m/s, in the old lidar frame's axes.
        old_to_global: float64 [B, 4, 4] pose of the old lidar frame.
        new_to_global: float64 [B, 4, 4].
        seconds: [B] between the frames.
        space: what the fractions are of.

    Returns:
        [B, Q, 3].

    Source: UniADTrack.velo_update.
    """
    with torch.autocast(reference.device.type, enabled=False):
        points = space.to_metres(reference.float().sigmoid())
        step = F.pad(velocity.float(), (0, 1)) * seconds.to(points.dtype).view(-1, 1, 1)
        # The difference of two poses far from the origin needs all the digits there are.
        change = geometry.relative_transform(old_to_global, new_to_global).to(points.dtype)
        moved = (points + step) @ change[:, :3, :3].transpose(1, 2) + change[:, None, :3, 3]
        return inverse_sigmoid(space.to_fractions(moved)).to(reference.dtype)


class MemoryBank(nn.Module):
    """Lets a track look at its own last embeddings (UniAD's MemoryBank).

    In evaluation an embedding is remembered when the score is positive and then not for
    `save_period` frames; in training every one is.
    """

    def __init__(self, dim: int, heads: int = 8, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or dim
        self.save_period = 3
        self.save_proj = nn.Linear(dim, dim)
        self.temporal_attn = nn.MultiheadAttention(dim, heads, dropout=0.0, batch_first=True)
        self.temporal_fc1 = nn.Linear(dim, hidden)
        self.temporal_fc2 = nn.Linear(hidden, dim)
        self.temporal_norm1 = nn.LayerNorm(dim)
        self.temporal_norm2 = nn.LayerNorm(dim)

    def forward(self, tracks: Tracks) -> Tracks:
        """Look back, then remember."""
        return self.remember(self.look_back(tracks))

    def look_back(self, tracks: Tracks) -> Tracks:
        """Attend to the bank; only tracks whose newest place is filled do."""
        filled = ~tracks.bank_empty[..., -1] & tracks.mask
        if not bool(filled.any()):
            return tracks
        now = tracks.embedding[filled]  # n, C
        past, empty = tracks.bank[filled], tracks.bank_empty[filled]
        read, _ = self.temporal_attn(
            now.unsqueeze(1), past, past, key_padding_mask=empty, need_weights=False
        )
        now = self.temporal_norm1(now + read[:, 0])
        now = self.temporal_norm2(now + self.temporal_fc2(self.temporal_fc1(now).relu()))
        embedding = tracks.embedding.clone()
        embedding[filled] = now.to(embedding.dtype)
        return replace(tracks, embedding=embedding)

    def remember(self, tracks: Tracks) -> Tracks:
        """Push embeddings into the bank."""
        saves = (tracks.scores > 0) & tracks.mask
        wait = tracks.wait
        if not self.training:
            saves = saves & (wait == 0)
            wait = torch.where(wait > 0, wait - 1, wait)
            wait = torch.where(saves, torch.full_like(wait, self.save_period), wait)
        new = self.save_proj(tracks.embedding).unsqueeze(2)
        chosen = saves[..., None]
        pushed = torch.cat([tracks.bank[:, :, 1:], new.to(tracks.bank.dtype)], 2)
        emptied = torch.cat([tracks.bank_empty[:, :, 1:], torch.zeros_like(chosen)], 2)
        return replace(
            tracks,
            bank=torch.where(chosen[..., None], pushed, tracks.bank),
            bank_empty=torch.where(chosen, emptied, tracks.bank_empty),
            wait=wait,
        )


class QueryInteraction(nn.Module):
    """Writes the queries of the next frame (UniAD's QIM): tracks attend to one another.

    Args:
        dim: C.
        heads: of the attention.
        dropout: everywhere.
    """

    def __init__(self, dim: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.linear_pos1, self.linear_pos2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_pos = nn.LayerNorm(dim)
        self.linear_feat1, self.linear_feat2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_feat, self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tracks: Tracks) -> Tracks:
        """New queries for tracks [B, Q], of which there may be none."""
        if tracks.ids.shape[1] == 0:
            return tracks
        # Attention without any key is NaN: rows without tracks read their own padding.
        padding = ~tracks.mask & tracks.mask.any(1, keepdim=True)
        positions, content = tracks.query.chunk(2, -1)
        now = tracks.embedding
        place = positions + now
        among, _ = self.self_attn(place, place, now, key_padding_mask=padding, need_weights=False)
        now = self.norm1(now + self.dropout(among))
        now = self.norm2(now + self._feed(self.linear1, self.linear2, now))
        positions = self.norm_pos(positions + self._feed(self.linear_pos1, self.linear_pos2, now))
        content = self.norm_feat(content + self._feed(self.linear_feat1, self.linear_feat2, now))
        return replace(tracks, query=torch.cat([positions, content], -1))

    def _feed(self, first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
        return self.dropout(second(self.dropout(first(x).relu())))
