"""Samplers: every item once, equal shares, the same batches at any number of processes."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, Dataset

from datamodules.sampling import ClipRequest, ClipSampler, ResumableLoader, StreamBatchSampler
from odvla.errors import UserError


class _Frames:
    """A picker of n frames with one conversation each."""

    def __init__(self, n):
        self.n = n

    def items(self):
        return [(frame, 0) for frame in range(self.n)]

    def train(self, frame, part, epoch):
        return (epoch,)

    def evaluation(self, frame):
        return (0,)


class _Echo(Dataset):
    def __getitem__(self, request):
        return request.frame


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_visits_every_frame_once(frames, world, seed, epoch):
    if frames < world:
        with pytest.raises(UserError, match="cannot be shared"):
            ClipSampler(_Frames(frames), 1, seed, 0, world)
        return
    shares = []
    for rank in range(world):
        sampler = ClipSampler(_Frames(frames), 3, seed, rank, world)
        sampler.set_epoch(epoch)
        shares.append([request.frame for request in sampler])
        assert len(shares[-1]) == len(sampler) == frames // world
    seen = [frame for share in shares for frame in share]
    assert len(set(seen)) == len(seen) == frames - frames % world
    assert set(seen) <= set(range(frames))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = ClipSampler(_Frames(30), 2, seed)
        sampler.set_epoch(epoch)
        return [(r.frame, r.steps, r.conversations) for r in sampler]

    assert order(1, 2) == order(1, 2)
    assert len({str(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 4))
def test_streams_are_the_same_at_any_world_size(lengths, rows, world):
    bounds, first = [], 0
    for length in lengths:
        bounds.append((first, first + length))
        first += length
    alone = list(StreamBatchSampler(bounds, rows, _Frames(first)))
    shares = [
        list(StreamBatchSampler(bounds, rows, _Frames(first), r, world)) for r in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    kept = [b for share in shares for b in share if any(request.valid for request in b)]
    assert sorted(map(str, kept)) == sorted(map(str, alone))
    valid = [request for batch in alone for request in batch if request.valid]
    assert sorted(request.frame for request in valid) == list(range(first))
    for request in [r for share in shares for b in share for r in b if not r.valid]:
        assert request.conversations == ()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sets(st.integers(0, 80)),
)
def test_what_is_not_known_is_dealt_out_and_nothing_else(lengths, rows, world, known):
    ends = list(accumulate(lengths))
    bounds = list(zip([0, *ends], ends, strict=False))
    alone = list(StreamBatchSampler(bounds, rows, _Frames(ends[-1])))
    samplers = [
        StreamBatchSampler(bounds, rows, _Frames(ends[-1]), r, world, known) for r in range(world)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    given = [batch for share in shares for batch in share]
    assert {str(batch) for batch in given} <= {str(batch) for batch in alone}
    frames = [request.frame for batch in given for request in batch if request.valid]
    assert len(frames) == len(set(frames))
    assert set(range(ends[-1])) - known <= set(frames)
    # Scenes side by side are dealt out only where something of them is missing, and evenly.
    groups = [sampler.share for sampler in samplers]
    assert all(
        set().union(*(range(*scene) for scene in group)) - known
        for share in groups
        for group in share
    )
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_streams_carry_state_within_a_scene_only():
    batches = list(StreamBatchSampler([(0, 3), (3, 5), (5, 9)], 2, _Frames(9)))
    assert [[(r.frame, r.carried, r.valid) for r in batch] for batch in batches] == [
        [(0, False, True), (3, False, True)],
        [(1, True, True), (4, True, True)],
        [(2, True, True), (4, True, False)],
        [(5, False, True), (5, False, False)],
        [(6, True, True), (6, True, False)],
        [(7, True, True), (7, True, False)],
        [(8, True, True), (8, True, False)],
    ]


def test_groups_are_made_equally_large():
    sampler = StreamBatchSampler([(k, k + 1) for k in range(9)], 8, _Frames(9))
    assert [len(batch) for batch in sampler] == [5, 5]


def _loader(workers=0):
    sampler = ClipSampler(_Frames(11), 1, seed=4)
    return ResumableLoader(
        _Echo(),
        batch_sampler=BatchSampler(sampler, 2, drop_last=False),
        num_workers=workers,
        generator=torch.Generator(),
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_resumes_inside_an_epoch(workers):
    whole = _loader()
    whole.batch_sampler.sampler.set_epoch(3)
    expected = [batch.tolist() for batch in whole]

    before, after = _loader(workers), _loader(workers)
    before.batch_sampler.sampler.set_epoch(3)
    iterator = iter(before)
    seen = [next(iterator).tolist() for _ in range(2)]
    after.load_state_dict(before.state_dict())
    assert len(after) == len(before) == 6
    seen += [batch.tolist() for batch in after]
    assert seen == expected
    assert after.state_dict() == {"epoch": 3, "batches": 6}
    # A finished epoch goes on with the next one, whole.
    last = _loader()
    last.load_state_dict(after.state_dict())
    assert sum(len(batch) for batch in last) == 11
    assert last.state_dict()["epoch"] == 4


def test_request_defaults_to_one_valid_frame():
    assert ClipRequest(5) == ClipRequest(5, 1, False, True, ())
