"""Parts of data sets and weighted mixtures: slow versions, shares, the same on every machine."""

import heapq
import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.alignment import AlignmentConfig
from datamodules.mixture import MixtureConfig
from datamodules.nux import NuXConfig
from datamodules.picking import weighted_draws
from datamodules.sampling import ClipSampler
from datamodules.subset import chosen
from odvla.errors import UserError

COUNTS = {"nucaption": 2, "nuscenes_qa": 4, "nux": 1}  # records a key-frame


def _reference(data, strategy):
    """The slices of the training script that the strategies come from."""
    kind, _, number = strategy.partition(":")
    percent = number.endswith("%")
    take = -(-int(number[:-1]) * len(data) // 100) if percent else int(number)
    return data[:take] if kind == "first" else data[-take:]


@given(
    st.integers(0, 50),
    st.sampled_from(["first", "end"]),
    st.one_of(
        st.integers(1, 60).map(str),
        st.integers(1, 100).map("{}%".format),
    ),
)
def test_parts_are_those_of_the_reference(count, kind, number):
    data = list(range(count))
    part = _reference(data, f"{kind}:{number}")
    assert np.flatnonzero(chosen(f"{kind}:{number}", count, 0)).tolist() == part
    drawn = chosen(f"random:{number}", count, 7)
    assert drawn.sum() == len(part)
    np.testing.assert_array_equal(drawn, chosen(f"random:{number}", count, 7))
    assert chosen("all", count, 0).all()


def test_random_parts_depend_on_the_seed_and_favour_nobody():
    parts = np.array([chosen("random:25%", 40, seed) for seed in range(400)])
    assert (parts.sum(1) == 10).all()
    assert np.abs(parts.mean(0) - 0.25).max() < 0.1
    assert chosen("first:0.5%", 1001, 0).sum() == 6  # 5.005, rounded up


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("some", "must be all, first:N"),
        ("10%", "must be all, first:N"),
        ("first:-3", "must be all, first:N"),
        ("first:0", "more than nothing and at least 1"),
        ("end:101%", "more than nothing and at most 100%"),
        ("random:1.5", "a whole number"),
    ],
)
def test_strategies_that_are_none_are_named(sampling, message):
    with pytest.raises(UserError, match=rf"sampling .*{message}.*'{sampling}'"):
        NuXConfig(sampling=sampling)
    with pytest.raises(UserError, match=rf"samplings .*{message}"):
        MixtureConfig(datasets=("nux",), samplings=(sampling,))


def _tape(weights, seed):
    """The endless sequence, event by event."""
    phases = np.random.default_rng(seed).uniform(size=len(weights))
    events = [(phases[k] / weights[k], k, 0) for k in range(len(weights))]
    heapq.heapify(events)
    while True:
        _, k, n = heapq.heappop(events)
        yield k
        heapq.heappush(events, ((n + 1 + phases[k]) / weights[k], k, n + 1))


WEIGHTS = st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=12)


@given(WEIGHTS, st.integers(0, 300), st.integers(1, 20), st.integers(0, 5))
def test_any_part_of_the_draws_is_that_of_the_whole(weights, first, count, seed):
    expected = list(islice(_tape(weights, [seed, 3]), first, first + count))
    assert list(weighted_draws(np.array(weights), first, count, [seed, 3])) == expected


@given(WEIGHTS, st.integers(1, 400), st.integers(0, 5))
def test_every_item_gets_its_share(weights, count, seed):
    drawn = weighted_draws(np.array(weights), 0, count, [seed])
    shares = count * np.array(weights) / sum(weights)
    found = np.bincount(drawn, minlength=len(weights))
    rounds = np.array(weights) / sum(weights) * len(weights)
    assert (np.abs(found - shares) <= 1 + rounds).all()


@pytest.fixture(scope="module")
def root(circles, tmp_path_factory):
    root = circles.write_root(tmp_path_factory.mktemp("mix"))
    tokens = {
        "train": [
            circles.token(s, k) for s, n in (("scene-0061", 9), ("scene-0553", 4)) for k in range(n)
        ],
        "val": [circles.token("scene-0103", k) for k in range(8)],
    }
    for split, those in tokens.items():
        question = {"template_type": "exist", "num_hop": 0, "answer": "yes"}
        files = {
            f"nucaption/{split}.json": [
                {"sample_token": t, "question": f"{k}?", "answer": f"{k}"}
                for t in those
                for k in range(2)
            ],
            f"nuscenes_qa/NuScenes_{split}_questions.json": {
                "questions": [
                    {"sample_token": t, "question": f"{k}?", **question}
                    for k in range(4)  # one question about all key-frames, then the next
                    for t in those
                ]
            },
            f"nux/Nu_X_{split}.json": {t: {"narration": "on", "reasoning": "free"} for t in those},
        }
        for name, content in files.items():
            path = root / "language" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return root


def _mixture(root, **changes):
    return MixtureConfig(str(root), image_size=(16, 9), **changes).build()


def _of(data, split="train"):
    return [c.id.split("_", 1)[1] for c in data.conversations(split)]


def test_parts_follow_the_order_of_the_file_and_are_trained_on_alone(root):
    data = _mixture(root, datasets=("nuscenes_qa",), sampling="first:50%")
    assert sorted(_of(data)) == sorted(["qa_0", "qa_1"] * 13)
    questions = {c.meta["question"] for c in data.conversations("train")}
    assert questions == {"0?", "1?"}  # not the first half of the key-frames
    assert len(_of(data, "val")) == 8 * 4
    (report,) = data.join_reports("train")
    assert (report.joined, report.kept, report.sampling) == (52, 26, "first:50%")
    data = _mixture(root, samplings=("first:3", "all", "end:1"))
    kinds = [c.meta["dataset"] for c in data.conversations("train")]
    assert {name: kinds.count(name) for name in COUNTS} == {
        "nucaption": 3,
        "nuscenes_qa": 52,
        "nux": 1,
    }
    maps = AlignmentConfig(str(root), streams=("map",), sampling="random:5").build()
    assert len(list(maps.conversations("train"))) == 5


def _epoch(data, epoch, rank=0, world_size=1, skipped=0):
    sampler = ClipSampler(data.picker("train"), 1, data.config.seed, rank, world_size)
    sampler.resume(epoch, skipped)
    return [(r.frame, c) for r in sampler for c in r.conversations]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 4.0)])
def test_an_epoch_is_the_same_on_any_number_of_processes_and_after_a_resume(root, weights, every):
    changes = {"weights": weights, "every_conversation": every, "seed": 3}
    alone = _epoch(_mixture(root, **changes), 5)
    assert alone == _epoch(_mixture(root, **changes), 5)  # whatever was drawn before
    assert alone != _epoch(_mixture(root, **changes), 6)
    assert alone[4:] == _epoch(_mixture(root, **changes), 5, skipped=4)
    shares = [_epoch(_mixture(root, **changes), 5, rank, 3) for rank in range(3)]
    together = [item for row in zip(*shares, strict=True) for item in row]
    assert together == alone[: len(together)]
    assert len(alone) - len(together) < 3


@pytest.mark.parametrize("every", [False, True])
def test_weights_decide_the_shares_not_the_length(root, every):
    weights = dict(zip(COUNTS, (1.0, 0.5, 4.0), strict=True))
    data = _mixture(root, weights=tuple(weights.values()), every_conversation=every)
    plain = _mixture(root, every_conversation=every)
    source = data.source("train")
    names = [name for name, count in COUNTS.items() for _ in range(count)]
    assert source.weights(0).tolist() == [weights[name] for name in names]
    epochs = 40
    drawn = [names[c] for epoch in range(epochs) for _, c in _epoch(data, epoch)]
    assert len(_epoch(data, 0)) == len(_epoch(plain, 0))
    total = sum(weights[name] for name in names)
    for name, count in COUNTS.items():
        assert drawn.count(name) / len(drawn) == pytest.approx(
            weights[name] * count / total, abs=0.02
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0,)}, r"weights must be empty or have one entry for each of the 3"),
        ({"weights": (1.0, 0.0, 1.0)}, r"weights must be numbers above 0"),
        ({"weights": (1.0, float("inf"), 1.0)}, r"weights must be numbers above 0"),
        ({"weights": (1.0, 1.0, 1.0), "conversations_per_frame": 0}, r"weights change nothing"),
        ({"samplings": ("all",) * 4}, r"samplings must be empty or have one entry"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        MixtureConfig(**changes)
