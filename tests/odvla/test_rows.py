"""Rows of nested batches, against indexing by hand."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla.fake_batch import fake_batch
from odvla.rows import join_rows, rows_of
from odvla.types import BevGrid

GRID = BevGrid(-8.0, -8.0, 4.0, 4, 4)
FRAMES = fake_batch(None, rows=4, image_size=(16, 8), grid=GRID).clip[-1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_chosen_rows_are_the_rows_that_were_asked_for(numbers):
    chosen = rows_of(FRAMES, torch.tensor(numbers))
    assert chosen.sample_tokens == tuple(FRAMES.sample_tokens[n] for n in numbers)
    for place, number in enumerate(numbers):
        assert chosen.images[place].equal(FRAMES.images[number])
        assert chosen.cameras.intrinsics[place].equal(FRAMES.cameras.intrinsics[number])


def test_a_batch_cut_to_rows_and_joined_is_the_batch():
    batch = fake_batch(None, rows=3, image_size=(16, 8), grid=GRID)
    for whole in (batch.clip[-1], batch.ego, batch.map, batch.agents):
        parts = [rows_of(whole, torch.tensor([row])) for row in range(3)]
        joined = join_rows(parts)
        pairs = zip(_tensors(whole), _tensors(joined), strict=True)
        assert all(a.equal(b) for a, b in pairs)


def test_shorter_rows_get_padding_that_is_masked():
    few, many = (fake_batch(None, rows=1, image_size=(16, 8), grid=GRID).agents[0] for _ in "ab")
    few = rows_of(few, torch.tensor([0]))
    per_agent = {name: value for name, value in vars(few).items() if name != "ego"}
    few = replace(few, **{name: value[:, :1] for name, value in per_agent.items()})
    joined = join_rows([few, many])
    assert joined.boxes.shape == (2, many.boxes.shape[1], 9)
    assert joined.mask[0].tolist() == [True] + [False] * (many.boxes.shape[1] - 1)
    assert joined.boxes[1].equal(many.boxes[0])


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, str) or value is None:
        return []
    return [tensor for item in vars(value).values() for tensor in _tensors(item)]
