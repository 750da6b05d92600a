"""Splicing equals a slow loop over ids, for any order and number of slots."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odvla.language.splice import SLOT_OF_STREAM, match_objects, splice
from odvla.types import IGNORE_INDEX, SLOT_IDS, AgentPredictions, Talk, TokenSet

D, N = 4, 3


def talk_of(rows, frame_index):
    """A talk of the ids given, labels = ids at odd places."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[7] * (longest - len(row))] for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    odd = torch.arange(longest) % 2 == 1
    return Talk(
        input_ids=ids,
        labels=torch.where(mask & odd & (ids >= 0), ids, IGNORE_INDEX),
        mask=mask,
        prompt_length=torch.ones(len(rows), dtype=torch.int64),
        frame_index=torch.tensor(frame_index),
        object_boxes=torch.zeros(len(rows), 9),
        conversations=(),
    )


def slow_splice(text, talk, streams, object_token):
    """Row by row: (embeddings, labels)."""
    result = []
    names = {slot: name for name, slot in SLOT_OF_STREAM.items()}
    for g in range(len(text)):
        embeds, labels = [], []
        frame = int(talk.frame_index[g])
        for at, token in enumerate(talk.input_ids[g].tolist()):
            if not talk.mask[g, at]:
                continue
            if token >= 0:
                embeds.append(text[g, at])
                labels.append(int(talk.labels[g, at]))
                continue
            new = []
            if token == SLOT_IDS["<OBJECT>"]:
                if object_token[g] >= 0:
                    new = [streams["track"][0][frame, object_token[g]]]
            elif names[token] in streams:
                feats, valid = streams[names[token]]
                new = [feats[frame, n] for n in range(feats.shape[1]) if valid[frame, n]]
            embeds += new
            labels += [IGNORE_INDEX] * len(new)
        result.append((embeds, labels))
    return result


IDS = st.lists(st.sampled_from([1, 2, 3, *SLOT_IDS.values()]), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.data())
def test_splicing_equals_the_slow_loop(data):
    rows = [[5, *row] for row in data.draw(st.lists(IDS, min_size=1, max_size=4))]
    frames = [data.draw(st.integers(0, 1)) for _ in rows]
    talk = talk_of(rows, frames)
    names = data.draw(st.sets(st.sampled_from(["scene", "track", "map"])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    streams = {
        name: (
            torch.randn(2, data.draw(st.integers(1, N)), D, generator=generator),
            None,
        )
        for name in sorted(names)
    }
    streams = {
        name: (feats, torch.rand(feats.shape[:2], generator=generator) < 0.5)
        for name, (feats, _) in streams.items()
    }
    width = streams["track"][0].shape[1] if "track" in streams else 0
    chosen = torch.tensor([data.draw(st.integers(-1, width - 1)) for _ in rows])
    text = torch.randn(*talk.input_ids.shape, D, generator=generator)
    length = data.draw(st.sampled_from([None, 1, 4, 99]))
    for pad_left in (False, True):
        spliced = splice(text, talk, streams, chosen, pad_left=pad_left, max_length=length)
        for g, (embeds, labels) in enumerate(slow_splice(text, talk, streams, chosen)):
            embeds, labels = embeds[:length], labels[:length]
            real = spliced.attention_mask[g]
            assert torch.equal(spliced.embeds[g][real], torch.stack(embeds))
            assert spliced.labels[g][real].tolist() == labels
            assert spliced.position_ids[g][real].tolist() == list(range(len(labels)))
            assert not spliced.embeds[g][~real].any()
            assert (spliced.labels[g][~real] == IGNORE_INDEX).all()
            assert real[-1 if pad_left else 0]


def test_gradients_reach_the_tokens_that_are_told_and_no_others():
    talk = talk_of([[1, SLOT_IDS["<MAP>"], 2]], [1])
    feats = torch.randn(2, N, D, requires_grad=True)
    valid = torch.tensor([[True] * N, [True, False, True]])
    splice(torch.randn(1, 3, D), talk, {"map": (feats, valid)}).embeds.sum().backward()
    assert feats.grad.tolist() == [[[0.0] * D] * N, [[1.0] * D, [0.0] * D, [1.0] * D]]


@pytest.mark.parametrize("limit_m", [0.5, 2.0])
def test_an_object_is_the_nearest_valid_track_within_the_limit(limit_m):
    boxes = torch.zeros(1, 4, 9)
    boxes[0, :, 0] = torch.tensor([30.0, 20.0, 10.0, 11.0])
    predictions = AgentPredictions(
        (torch.zeros(1, 4, 10),),
        (boxes,),
        torch.zeros(1, 4, dtype=torch.int64),
        torch.zeros(1, 4, dtype=torch.int64),
    )
    tracks = TokenSet(
        "track",
        torch.zeros(1, 3, D),
        torch.tensor([[True, True, False]]),
        predictions,
        torch.tensor([[2, 0, 3]]),  # tokens stand at x = 10, 30 and (invalid) 11
    )
    slot = SLOT_IDS["<OBJECT>"]
    talk = talk_of([[1, slot], [1, slot], [1, slot], [1, 2]], [0, 0, 0, 0])
    talk.object_boxes[:, 0] = torch.tensor([11.0, 30.25, 20.0, 10.0])
    talk.object_boxes[3] = float("nan")
    expected = [0 if limit_m > 1 else -1, 1, -1, -2]
    assert match_objects(talk, tracks, limit_m).tolist() == expected
    assert match_objects(talk, None, limit_m).tolist() == [-1, -1, -1, -2]


def test_an_object_may_be_a_track_by_its_id():
    predictions = AgentPredictions(
        (torch.zeros(2, 3, 10),),
        (torch.zeros(2, 3, 9),),
        torch.tensor([[5, -1, 8], [8, 5, 9]]),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])  # tokens are queries 2, 0, (1) and 0, 1, 2
    tracks = TokenSet("track", torch.zeros(2, 3, D), mask, predictions, order)
    slot = SLOT_IDS["<OBJECT>"]
    talk = talk_of([[1, slot]] * 5, [0, 0, 1, 1, 1])
    talk = replace(talk, object_tracks=torch.tensor([5, 9, 5, 9, -1]))
    talk.object_boxes[4] = float("nan")
    assert match_objects(talk, tracks, 2.0).tolist() == [1, -1, 1, 2, -1]
