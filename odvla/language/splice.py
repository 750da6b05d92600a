"""Put tokens of the scene into the text.

    input ids    <scene_start>  -201  <scene_end>          -201 stands for <SCENE>
    spliced      <scene_start>  s1 s2 ... sn  <scene_end>  the n valid tokens of that frame

Everything is one gather: text embeddings and the tokens of all streams are rows of one table, and
each place of the output says which row it takes. A stream without valid tokens leaves its two tags
side by side.

Shapes: G conversations, L ids, S places after splicing, N tokens of a stream, D width, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odvla.types import IGNORE_INDEX, SLOT_IDS, AgentPredictions, Talk, TokenSet

SLOT_OF_STREAM = {
    "scene": SLOT_IDS["<SCENE>"],
    "track": SLOT_IDS["<TRACK>"],
    "map": SLOT_IDS["<MAP>"],
    "ego": SLOT_IDS["<EGO>"],
}
OBJECT_ID = SLOT_IDS["<OBJECT>"]


@dataclass(frozen=True)
class Spliced:
    """Embedded conversations, padded."""

    embeds: Tensor  # [G, S, D]
    attention_mask: Tensor  # bool [G, S] False: padding
    position_ids: Tensor  # int64 [G, S] 0 at a conversation's first place, whichever side is padded
    labels: Tensor  # int64 [G, S] IGNORE_INDEX where no loss is due


def match_objects(talk: Talk, tracks: TokenSet | None, max_distance_m: float) -> Tensor:
    """The track token that each conversation's object is.

    Args:
        talk: its object_boxes say which object.
        tracks: track tokens with predictions and query_index; None where there are no tracks.
        max_distance_m: how far a predicted centre may be from the object's, in the ground plane.

    Returns:
        int64 [G]: index into the frame's tokens of the nearest centre, or of the track whose id the
        conversation names; -1 where no valid token is near enough or none has the id, -2 where the
        text has no object.
    """
    has_object = ((talk.input_ids == OBJECT_ID) & talk.mask).any(1)  # [G]
    unmatched = torch.where(has_object, -1, -2)
    if tracks is None or tracks.feats.shape[1] == 0 or not has_object.any():
        return unmatched
    assert isinstance(tracks.predictions, AgentPredictions)
    assert tracks.query_index is not None
    rows = tracks.query_index.clamp(min=0)  # [B, N]
    valid = tracks.mask[talk.frame_index]  # [G, N]
    places = rows[..., None].expand(-1, -1, 2)
    centres = tracks.predictions.boxes[..., :2].detach().float().gather(1, places)  # [B, N, 2]
    gap = centres[talk.frame_index] - talk.object_boxes[:, None, :2]  # [G, N, 2]
    distance = gap.norm(dim=-1).masked_fill(~valid, torch.inf)
    nearest, token = distance.nan_to_num(nan=torch.inf).min(1)
    found = nearest <= max_distance_m
    if talk.object_tracks is not None:
        named = talk.object_tracks >= 0  # [G]
        ids = tracks.predictions.track_ids.gather(1, rows)[talk.frame_index]  # [G, N]
        same = (ids == talk.object_tracks[:, None]) & valid
        token = torch.where(named, same.long().argmax(1), token)
        found = torch.where(named, same.any(1), found)
    return torch.where(has_object & found, token, unmatched)


def splice(
    text: Tensor,
    talk: Talk,
    streams: Mapping[str, tuple[Tensor, Tensor]],
    object_token: Tensor | None = None,
    *,
    pad_left: bool = False,
    max_length: int | None = None,
) -> Spliced:
    """Replace every slot by the tokens it stands for.

    Args:
        text: [G, L, D] embeddings of talk.input_ids (anything at slots).
        talk: ids, labels, mask and frame_index count.
        streams: for "scene", "track", "map", "ego" the projected tokens [B, N, D] and which are
            valid [B, N]; a missing stream has no tokens.
        object_token: int64 [G] index of the track token of each conversation's object; negative:
            nothing is put in its place.
        pad_left: pad before the text, for generation.
        max_length: places that are kept of each conversation, from its start; None: all.
    """
    ids, mask, frame = talk.input_ids, talk.mask, talk.frame_index
    G, L, D = text.shape
    table = [text.reshape(G * L, D)]
    size = mask.long() * (ids >= 0)  # [G, L] places each id takes
    offset = {}
    rows = G * L
    for name, (feats, valid) in streams.items():
        table.append(feats.reshape(-1, D).to(text.dtype))
        offset[name] = rows
        rows += feats.shape[0] * feats.shape[1]
        size = torch.where(mask & (ids == SLOT_OF_STREAM[name]), valid.sum(1)[frame, None], size)
    if object_token is not None and "track" in streams:
        size = torch.where(mask & (ids == OBJECT_ID), (object_token >= 0).long()[:, None], size)
    total = size.sum(1)  # [G]
    S = int(total.max())
    first = size.cumsum(1) - size  # [G, L] place of each id's first row

    # take[g, s]: row of the table that place s gets; the last row is zeros, for padding.
    take = torch.full((G, S), rows, device=text.device)
    labels = torch.full((G, S), IGNORE_INDEX, device=text.device)
    g, at = ((ids >= 0) & mask).nonzero(as_tuple=True)
    take[g, first[g, at]] = g * L + at
    labels[g, first[g, at]] = talk.labels[g, at]
    for name, (_, valid) in streams.items():
        N = valid.shape[1]
        g, at = ((ids == SLOT_OF_STREAM[name]) & mask).nonzero(as_tuple=True)
        rank = valid.long().cumsum(1) - 1  # [B, N] place among the valid tokens of a frame
        which, token = valid[frame[g]].nonzero(as_tuple=True)  # which: of the (g, at) pairs
        row = offset[name] + frame[g[which]] * N + token
        place = first[g[which], at[which]] + rank[frame[g[which]], token]
        take[g[which], place] = row
    if object_token is not None and "track" in streams:
        g, at = ((ids == OBJECT_ID) & mask & (object_token >= 0)[:, None]).nonzero(as_tuple=True)
        N = streams["track"][1].shape[1]
        take[g, first[g, at]] = offset["track"] + frame[g] * N + object_token[g]

    if max_length is not None and max_length < S:
        take, labels, S = take[:, :max_length], labels[:, :max_length], max_length
        total = total.clamp(max=max_length)
    places = torch.arange(S, device=text.device).expand(G, S)
    skipped = (S - total)[:, None] if pad_left else torch.zeros_like(total)[:, None]
    if pad_left:
        # What is at the right of a row's end is padding: turned round, it comes first.
        turned = (places - skipped) % S
        take, labels = take.gather(1, turned), labels.gather(1, turned)
    table.append(text.new_zeros(1, D))
    return Spliced(
        embeds=F.embedding(take, torch.cat(table)),
        attention_mask=(places >= skipped) & (places < skipped + total[:, None]),
        position_ids=(places - skipped).clamp(min=0),
        labels=labels,
    )
