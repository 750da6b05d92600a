"""Some conversations of a talk: their tensors, what they begin with alike, their random seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from odvla.types import Talk


def request_of(talk: Talk) -> Talk:
    """The conversations up to their last answer, which is masked."""
    places = torch.arange(talk.mask.shape[1], device=talk.mask.device)
    return replace(talk, mask=talk.mask & (places < talk.prompt_length[:, None]))


def shared_text(talk: Talk, rows: Tensor) -> list[int]:
    """Ids that the conversations `rows` all begin with, up to the first slot."""
    ids = talk.input_ids[rows]
    same = (ids == ids[:1]).all(0) & talk.mask[rows].all(0) & (ids[0] >= 0)
    return ids[0, : int(same.long().cumprod(0).sum())].tolist()


def seeds_of(talk: Talk, rows: Tensor, samples: int) -> list[int]:
    """A seed for each of the conversations `rows`, each of which comes `samples` times in a row.

    It depends on the conversation's id and the number of the draw; nothing is drawn for one sample.
    """
    if samples == 1:
        return []
    names = [talk.conversations[row].id for row in rows.tolist()]
    return [crc32(f"{name}/{place % samples}".encode()) for place, name in enumerate(names)]


def talk_rows(talk: Talk, rows: Tensor) -> Talk:
    """Some conversations of a talk."""
    numbers: Sequence[int] = rows.tolist()
    return Talk(
        input_ids=talk.input_ids[rows],
        labels=talk.labels[rows],
        mask=talk.mask[rows],
        prompt_length=talk.prompt_length[rows],
        frame_index=talk.frame_index[rows],
        object_boxes=talk.object_boxes[rows],
        conversations=tuple(talk.conversations[number] for number in numbers),
        object_tracks=None if talk.object_tracks is None else talk.object_tracks[rows],
    )
