"""TrackFormer: scenes side by side as alone, lives of tracks by a slow loop, boxes and motion."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla import geometry
from odvla.encoders.protocol import fake_frames
from odvla.queries.box_codes import boxes_of_codes, codes_of_boxes
from odvla.queries.track_learning import Draws, training_tracks
from odvla.queries.track_life import (
    EGO,
    NOBODY,
    Range,
    TrackRules,
    give_ids,
    move_references,
)
from odvla.queries.trackformer import (
    TrackFormerConfig,
    drop_last,
)
from odvla.rows import rows_of
from odvla.types import BevGrid, SceneFeatures

GRID = BevGrid(-24.0, -20.0, 4.0, 10, 12)
CONFIG = TrackFormerConfig(queries=20, layers=2, hidden=32, rules=TrackRules(0.5, 0.45, 2))
DIM = 32


@pytest.fixture
def module():
    torch.manual_seed(1)
    made = CONFIG.build(DIM, GRID).eval()
    for branch in made.cls_branches:
        torch.nn.init.normal_(branch[-1].weight, std=1.0)  # scores on both sides of the thresholds
        torch.nn.init.constant_(branch[-1].bias, -1.5)
    return made


def features(seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    bev = torch.randn(rows, GRID.rows, GRID.columns, DIM, generator=generator)
    return SceneFeatures(levels=(), bev=bev, grid=GRID)


def row_of(found, row):
    return SceneFeatures(levels=(), bev=found.bev[row : row + 1], grid=GRID)


@pytest.mark.parametrize("compat", ["none", "uniad"])
@torch.no_grad()
def test_scenes_side_by_side_give_what_each_gives_alone(module, compat):
    module.config = replace(CONFIG, compat=compat)
    together, alone = None, [None] * 3
    sizes = set()
    for step in range(5):
        found, frames = features(step), fake_frames(3, (16, 16), step=step)
        # The second scene ends after two frames and another begins.
        start = torch.tensor([step == 0, step in (0, 2), step == 0])
        frames = replace(frames, scene_start=start)
        tokens, together = module(found, frames, together)
        for row in range(3):
            own, alone[row] = module(
                row_of(found, row), rows_of(frames, torch.tensor([row])), alone[row]
            )
            count = int(own.mask.sum())
            sizes.add(count)
            assert int(tokens.mask[row].sum()) == count
            torch.testing.assert_close(
                tokens.feats[row][tokens.mask[row]], own.feats[0][own.mask[0]], atol=1e-4, rtol=1e-4
            )
            queries = own.predictions.mask.shape[1]
            used = own.predictions.mask[0]
            assert torch.equal(tokens.predictions.mask[row, :queries], used)
            assert not tokens.predictions.mask[row, queries:].any()
            ids = own.predictions.track_ids[0]
            assert torch.equal(tokens.predictions.track_ids[row, :queries], ids)
            source = own.predictions.carried_from[0]
            assert torch.equal(tokens.predictions.carried_from[row, :queries], source)
    assert len(sizes) > 3  # the scenes had different numbers of tracks


@torch.no_grad()
def test_a_carried_query_keeps_its_id(module):
    state, before = None, None
    carried = 0
    for step in range(4):
        frames = fake_frames(3, (16, 16), step=step)
        tokens, state = module(features(step), frames, state)
        found = tokens.predictions
        if before is not None:
            for row, slot in (found.carried_from >= 0).nonzero().tolist():
                source = int(found.carried_from[row, slot])
                now = int(found.track_ids[row, slot])
                assert now in (int(before.track_ids[row, source]), NOBODY)
                carried += 1
        before = found
    assert carried > 5


def tracks_with(module, scores, ids, missed=None):
    """Tracks of one scene with these scores and ids."""
    count = len(scores)
    fresh = module.fresh(1).at(torch.arange(count).unsqueeze(0))
    return replace(
        fresh,
        scores=torch.tensor([scores]),
        ids=torch.tensor([ids]),
        missed=torch.tensor([missed or [0] * count]),
    )


@given(st.data())
def test_lives_are_those_of_a_loop_over_queries(data):
    module = CONFIG.build(DIM, GRID)
    count = data.draw(st.integers(1, 12))

    def draw(values):
        return data.draw(st.lists(values, min_size=count, max_size=count))

    scores = draw(st.sampled_from([0.0, 0.3, 0.46, 0.5, 0.9]))
    ids = draw(st.sampled_from([NOBODY, EGO, 0, 3]))
    missed = draw(st.integers(0, 3))
    tracks, following = give_ids(
        tracks_with(module, scores, ids, missed), torch.tensor([7]), CONFIG.rules
    )
    next_id = 7
    for slot in range(count):
        own, misses = ids[slot], 0 if scores[slot] >= 0.5 else missed[slot]
        if own == NOBODY and scores[slot] >= 0.5:
            own, next_id = next_id, next_id + 1
        elif own >= 0 and scores[slot] < 0.45:
            misses += 1
            own = NOBODY if misses >= 2 else own
        assert int(tracks.ids[0, slot]) == own
        assert int(tracks.missed[0, slot]) == misses
    assert int(following) == next_id


@torch.no_grad()
def test_tokens_are_the_confident_tracks_by_falling_score(module):
    frames = fake_frames(3, (16, 16))
    tokens, _ = module(features(0), frames, None)
    found = tokens.predictions
    for row in range(3):
        slots = tokens.query_index[row][tokens.mask[row]]
        scores = found.scores[row][slots]
        assert (scores.diff() <= 0).all()
        good = (found.track_ids[row] >= 0) & (found.scores[row] >= 0.45)
        assert set(slots.tolist()) == set(good.nonzero()[:, 0].tolist())
        assert CONFIG.queries not in slots  # the car's own query is no agent
    uniad = replace(CONFIG, compat="uniad")
    module.config = uniad
    fewer, _ = module(features(0), frames, None)
    for row in range(3):
        assert int(fewer.mask[row].sum()) == max(0, int(tokens.mask[row].sum()) - 1)


def test_dropping_the_last_leaves_none_of_one():
    counted = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    expected = [[True, False, False], [False, False, False], [False, False, False]]
    assert drop_last(counted).tolist() == expected


@torch.no_grad()
def test_no_track_at_all_is_fine(module):
    for branch in module.cls_branches:
        torch.nn.init.constant_(branch[-1].bias, -50.0)
    state = None
    for step in range(2):
        tokens, state = module(features(step), fake_frames(3, (16, 16), step=step), state)
        assert tokens.feats.shape == (3, 0, DIM)
        assert state.tracks.ids.shape == (3, 0)


@torch.no_grad()
def test_ids_start_anew_with_a_scene_unless_uniads_are_wanted(module):
    frames = fake_frames(1, (16, 16))
    found = row_of(features(0), 0)
    for compat, first in (("none", 0), ("uniad", None)):
        module.config = replace(CONFIG, compat=compat)
        one, state = module(found, frames, None)
        assert int(state.next_id) > 0
        two, _ = module(found, frames, state)  # scene_start again
        born = two.predictions.track_ids[two.predictions.track_ids >= 0]
        assert int(born.min()) == (int(state.next_id) if first is None else first)
        torch.testing.assert_close(one.feats, two.feats)


def test_codes_and_boxes_turn_into_one_another():
    torch.manual_seed(0)
    boxes = torch.randn(50, 9)
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.2
    again = boxes_of_codes(codes_of_boxes(boxes))
    torch.testing.assert_close(
        again[:, [0, 1, 2, 3, 4, 5, 7, 8]], boxes[:, [0, 1, 2, 3, 4, 5, 7, 8]]
    )
    torch.testing.assert_close(
        geometry.wrap_angle(again[:, 6] - boxes[:, 6]), torch.zeros(50), atol=1e-5, rtol=0
    )


def test_a_box_that_heads_along_x_has_the_old_yaw_of_minus_a_quarter_turn():
    box = torch.tensor([1.0, 2.0, 3.0, 1.9, 4.5, 1.6, 0.0, 0.0, 0.0])
    code = codes_of_boxes(box)
    torch.testing.assert_close(code[6:8], torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)


def test_reference_points_move_with_velocity_and_against_the_car():
    space = Range((-50.0, -50.0, -5.0), (50.0, 50.0, 3.0))
    fractions = space.to_fractions(torch.tensor([[[10.0, 20.0, 0.0]]]))
    old, new = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    old[:2, 3] = torch.tensor([1000.0, 2000.0], dtype=torch.float64)
    new[:2, 3] = torch.tensor([1000.0, 2002.0], dtype=torch.float64)
    new[:2, :2] = geometry.rotation_2d(torch.tensor(0.5, dtype=torch.float64))
    velocity = torch.tensor([[[4.0, -2.0]]])
    moved = move_references(
        fractions.logit(), velocity, old[None], new[None], torch.tensor([0.5]), space
    )
    metres = space.to_metres(moved.sigmoid())[0, 0]
    # In global axes it went from (1010, 2020) to (1012, 2019).
    there = torch.tensor([1012.0 - 1000.0, 2019.0 - 2002.0])
    cos, sin = torch.tensor(0.5).cos(), torch.tensor(0.5).sin()
    expected = torch.stack([cos * there[0] + sin * there[1], -sin * there[0] + cos * there[1]])
    torch.testing.assert_close(metres[:2], expected, atol=1e-3, rtol=0)


def test_training_drops_some_tracks_and_carries_some_that_are_none(module):
    tracks = tracks_with(module, [0.9, 0.8, 0.7, 0.2, 0.6, 0.1], [4, 5, 6, NOBODY, NOBODY, EGO])
    tracks = replace(tracks, iou=torch.tensor([[0.9, 0.4, 0.8, 0.0, 0.0, 0.0]]))

    def draws(keep, accompany):
        return Draws(torch.tensor([keep]), torch.tensor([accompany]))

    yes, no = [True] * 6, [False] * 6
    both = training_tracks(tracks, draws(yes, no))
    assert both.ids.tolist() == [[4, 6]]  # track 5 overlaps too little
    # The first track is dropped, and so brings nobody.
    dropped = training_tracks(tracks, draws([False, *yes[1:]], yes))
    assert dropped.ids.tolist() == [[6, NOBODY]]
    assert dropped.scores[0].tolist() == pytest.approx([0.7, 0.6])  # the likeliest that is none
    two = training_tracks(tracks, draws(yes, yes))
    assert two.ids.tolist() == [[4, 6, NOBODY, NOBODY]]
    tracks = replace(tracks, ids=torch.tensor([[4, 5, 6, 7, NOBODY, EGO]]), iou=torch.ones(1, 6))
    every = training_tracks(tracks, draws(yes, yes))
    assert every.ids.tolist() == [[4, 5, 6, 7, NOBODY, EGO]]
    idle = torch.tensor([[True] * 5 + [False]])
    assert training_tracks(tracks, draws(yes, yes), idle=idle).ids.tolist() == [[4, 5, 6, 7, -1]]


def test_every_parameter_learns(module):
    module.train()
    state, total = None, 0.0
    for step in range(3):
        tokens, state = module(features(step), fake_frames(3, (16, 16), step=step), state)
        total = (
            total
            + tokens.feats.sum()
            + sum(
                x.square().sum()
                for x in (*tokens.predictions.layer_logits, *tokens.predictions.layer_boxes)
            )
        )
    total.backward()
    without = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    # Past trajectories have a loss of their own.
    assert {name for name in without if not name.startswith("past_branches")} == set()


def test_a_grid_is_needed():
    with pytest.raises(ValueError, match="agent queries need the feature 'bev'"):
        CONFIG.build(DIM, None)


def test_fresh_references_start_all_over_the_ground():
    torch.manual_seed(0)
    module = TrackFormerConfig(queries=4000, layers=1, heads=2, hidden=16).build(DIM, GRID)
    place = module.reference_points(module.query_embedding.weight[:, :DIM]).sigmoid()
    for axis in (0, 1):
        tenths = torch.histc(place[:, axis].detach(), 10, 0, 1) / len(place)
        assert tenths.min() > 0.04, tenths
        assert tenths.max() < 0.2, tenths
    assert (place[:, 2] - 0.5).abs().max() < 0.15
