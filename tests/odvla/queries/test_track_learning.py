"""TrackFormer on clips: scenes side by side as alone, whose track is whose, chance, odd input."""

from dataclasses import replace

import pytest
import torch

from odvla.encoders.protocol import fake_frames
from odvla.losses.clip import NO_TARGET, ClipLossConfig
from odvla.queries.box_codes import boxes_of_codes, codes_of_boxes
from odvla.queries.track_learning import Draws, TrackLearning, paths_of
from odvla.queries.track_life import EGO, FALSE_TRACK, NOBODY
from odvla.queries.trackformer import TrackFormerConfig
from odvla.rows import rows_of
from odvla.types import AgentTargets, BevGrid, SceneFeatures

GRID = BevGrid(-24.0, -20.0, 4.0, 10, 12)
DIM, ROWS = 16, 3
CONFIG = TrackFormerConfig(
    queries=12,
    layers=2,
    hidden=32,
    heads=2,
    dropout=0.0,
    learning=TrackLearning(carry_iou=0.0, token_iou=0.0, random_drop=0.0, false_tracks=0.0),
)


@pytest.fixture(params=["none", "uniad"])
def compat(request):
    return request.param


@pytest.fixture
def make():
    def build(compat="none", **settings):
        torch.manual_seed(1)
        learning = replace(CONFIG.learning, **settings)
        module = replace(CONFIG, compat=compat, learning=learning).build(DIM, GRID)
        # Large boxes overlap, so that tracks are carried on.
        for branch in module.reg_branches:
            torch.nn.init.constant_(branch[-1].bias[2:4], 3.0)
        return module.train(), ClipLossConfig(compat=compat).build(GRID)

    return build


def features(step, rows=ROWS):
    generator = torch.Generator().manual_seed(step)
    bev = torch.randn(rows, GRID.rows, GRID.columns, DIM, generator=generator)
    return SceneFeatures(levels=(), bev=bev, grid=GRID)


def truth(step, ids):
    """Agents of one frame; ids: one list a row."""
    most = max(map(len, ids))
    rows = len(ids)
    boxes = torch.zeros(rows, most, 9)
    track_ids = torch.zeros(rows, most, dtype=torch.int64)
    mask = torch.zeros(rows, most, dtype=torch.bool)
    for row, own in enumerate(ids):
        for place, number in enumerate(own):
            boxes[row, place] = torch.tensor([number % 7 * 4 - 12, step, 0, 19, 20, 2, 0.5, 0, 1])
            track_ids[row, place], mask[row, place] = number, True
    return AgentTargets(
        boxes=boxes,
        labels=track_ids % 10,
        track_ids=track_ids,
        mask=mask,
        future=torch.zeros(rows, most, 6, 2),
        future_mask=torch.zeros(rows, most, 6, dtype=torch.bool),
        ego=torch.tensor([[0, 0, 0, 1.7, 4.1, 1.6, 1.57, 0, 5.0]]).expand(rows, -1),
    )


CLIP = (
    [[1, 2], [11, 12, 13], []],
    [[1, 3], [13, 12, 11], [21]],
    [[3], [], [21, 22]],
)


def frames_of(step, start=None, rows=ROWS):
    frames = fake_frames(rows, (16, 16), step=step)
    return frames if start is None else replace(frames, scene_start=start)


def run(module, criterion, row=None, clip=CLIP, starts=None):
    """Lessons and states of a clip, of all rows or of one."""
    state, lessons, states = None, [], []
    for step, ids in enumerate(clip):
        start = starts[step] if starts else None
        parts = features(step), frames_of(step, start), truth(step, ids)
        if row is not None:
            chosen = torch.tensor([row])
            bev = replace(parts[0], bev=parts[0].bev[row : row + 1])
            parts = bev, rows_of(parts[1], chosen), truth(step, [ids[row]])
        tokens, state, lesson = module.learn(*parts[:2], state, parts[2], criterion.matcher)
        lessons.append(lesson)
        states.append((tokens, state))
    return tuple(lessons), states


def test_scenes_side_by_side_learn_as_each_alone(make, compat):
    module, criterion = make(compat)
    together, states = run(module, criterion)
    loss = sum(criterion(together).values())
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    carried = set()
    for row in range(ROWS):
        alone, own_states = run(module, criterion, row)
        (sum(criterion(alone).values()) / ROWS).backward()
        for step, (one, many) in enumerate(zip(alone, together, strict=True)):
            count = one.used.shape[1]
            assert many.used[row].sum() == count
            for a, b in zip(one.matches, many.matches, strict=True):
                used = many.used[row]
                assert torch.equal(a.ids[0], b.ids[row][used])
                assert torch.equal(a.target[0], b.target[row][used])
            tokens, state = own_states[step]
            assert int(states[step][0].mask[row].sum()) == int(tokens.mask.sum())
            kept = states[step][1].tracks
            assert torch.equal(state.tracks.ids[0], kept.ids[row][kept.mask[row]])
            carried.add(int(kept.mask[row].sum()))
    assert len(carried) > 1  # rows carried different numbers of tracks
    for name, parameter in module.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-4, rtol=2e-3)


def test_a_track_stays_with_its_object_and_says_so_when_it_is_gone(make, compat):
    module, criterion = make(compat)
    lessons, states = run(module, criterion, row=1)
    first, second, third = (lesson.matches[-1] for lesson in lessons)
    fresh = CONFIG.queries + 1
    assert sorted(first.ids[0][first.ids[0] >= 0].tolist()) == [11, 12, 13]
    kept = states[0][1].tracks.ids[0].tolist()
    assert set(kept) <= {11, 12, 13}
    assert len(kept) > 0
    assert second.ids[0, fresh:].tolist() == kept
    places = {13: 0, 12: 1, 11: 2}
    assert second.target[0, fresh:].tolist() == [places[number] for number in kept]
    # In the third frame nobody is left: carried tracks are background, and are carried on.
    assert (third.target == NO_TARGET).all()
    gone = states[1][1].tracks.ids[0].tolist()
    assert third.ids[0, fresh:].tolist() == gone
    assert states[2][1].tracks.ids[0].tolist() == gone
    assert not states[2][0].mask.any()  # no token stands for what is not there
    assert first.ids[0, CONFIG.queries] == EGO


def test_a_new_scene_inside_a_clip_is_a_new_clip(make, compat):
    module, criterion = make(compat)
    begins = [torch.tensor(row) for row in ([True] * 3, [False, True, True], [False] * 3)]
    crossing, states = run(module, criterion, starts=begins)
    assert int(states[1][1].tracks.mask[0].sum()) > 0  # row 0 goes on
    # The same frames as a clip of their own.
    state = None
    for step in (1, 2):
        start = torch.full((ROWS,), step == 1)
        _, state, later = module.learn(
            features(step),
            frames_of(step, start),
            state,
            truth(step, CLIP[step]),
            criterion.matcher,
        )
        for row in (1, 2):
            own, other = crossing[step].used[row], later.used[row]
            for a, b in zip(crossing[step].matches, later.matches, strict=True):
                assert torch.equal(a.ids[row][own], b.ids[row][other])
                assert torch.equal(a.target[row][own], b.target[row][other])
            torch.testing.assert_close(
                crossing[step].codes[-1][row][own], later.codes[-1][row][other]
            )


def test_no_agent_anywhere_still_teaches_background(make, compat):
    module, criterion = make(compat)
    clip = ([[], [], []],) * 2
    lessons, states = run(module, criterion, clip=clip)
    loss = criterion(lessons)
    assert all(bool(value.isfinite()) for value in loss.values())
    sum(loss.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert module.query_embedding.weight.grad.any()
    assert all(state.tracks.ids.shape == (ROWS, 0) for _, state in states)
    assert all(tokens.feats.shape == (ROWS, 0, DIM) for tokens, _ in states)


def test_false_tracks_are_matched_again_only_in_uniad(make, compat):
    module, criterion = make(compat, false_tracks=1.0)
    _, states = run(module, criterion, clip=CLIP[:1])
    ids = states[0][1].tracks.ids
    false = NOBODY if compat == "uniad" else FALSE_TRACK
    mask = states[0][1].tracks.mask
    assert ((ids == false) & mask).sum() == ((ids >= 0) & mask).sum() > 0
    lessons, _ = run(module, criterion, clip=CLIP[:2])
    last = lessons[1].matches[-1]
    assert (last.target[(last.ids == FALSE_TRACK)] == NO_TARGET).all()


def test_dropped_tracks_are_not_carried(make):
    module, criterion = make(random_drop=1.0)
    lessons, states = run(module, criterion)
    assert (lessons[0].matches[-1].ids >= 0).any()
    assert all(state.tracks.ids.shape[1] == 0 for _, state in states)


def test_chance_hangs_on_the_generator_alone():
    learning = TrackLearning(random_drop=0.3, false_tracks=0.4)
    like = torch.zeros(50, 200)
    one, two = (
        Draws.random(like, learning, torch.Generator().manual_seed(seed)) for seed in (5, 5)
    )
    other = Draws.random(like, learning, torch.Generator().manual_seed(6))
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(one.accompany, two.accompany)
    assert not torch.equal(one.keep, other.keep)
    assert float(one.keep.float().mean()) == pytest.approx(0.7, abs=0.02)
    assert float(one.accompany.float().mean()) == pytest.approx(0.4, abs=0.02)
    with pytest.raises(ValueError, match="random_drop must be within"):
        TrackLearning(random_drop=1.5)


def test_only_uniad_asks_for_the_height_before_the_query_is_renewed(make):
    for compat, asked in (("uniad", True), ("none", False)):
        module, criterion = make(compat)
        _, states = run(module, criterion, clip=CLIP[:1])
        state = states[0][1]
        assert (state.height is not None) == asked
        moved = module.move(module.forget(state, frames_of(1)), frames_of(1))
        again = module.reference_points(state.tracks.query[..., :DIM])[..., 2]
        same = torch.allclose(moved.reference[..., 2], again)
        assert same != asked
        if asked:
            torch.testing.assert_close(moved.reference[..., 2], state.height)


def test_outside_training_nothing_is_left_to_chance(make):
    module, criterion = make(random_drop=1.0, false_tracks=1.0)
    module.eval()
    _, states = run(module, criterion)
    tracks = states[0][1].tracks
    assert (tracks.ids[tracks.mask] >= 0).all()
    assert tracks.mask.any()


def test_the_height_in_uniads_codes_is_that_of_the_bottom():
    box = torch.tensor([1.0, 2.0, 3.0, 1.9, 4.5, 1.6, 0.4, 0.0, 0.0])
    assert float(codes_of_boxes(box, bottom=True)[4]) == pytest.approx(3.0 - 0.8)
    assert float(codes_of_boxes(box)[4]) == 3.0
    for bottom in (True, False):
        again = boxes_of_codes(codes_of_boxes(box, bottom=bottom), bottom=bottom)
        torch.testing.assert_close(again, box)


def test_paths_are_turned_from_the_agents_frame_into_the_lidars():
    targets = truth(0, [[1, 2]])
    heading = torch.tensor([0.0, torch.pi / 2])  # along +x, along +y
    targets.boxes[0, :, 6] = heading
    ahead = torch.tensor([0.0, 1.0])
    targets = replace(
        targets,
        past=-ahead * torch.arange(1, 5).view(1, 1, 4, 1).expand(1, 2, 4, 1),
        past_mask=torch.tensor([[[True] * 4, [True, False, False, False]]]),
        future=ahead * torch.arange(1, 7).view(1, 1, 6, 1).expand(1, 2, 6, 1),
        future_mask=torch.ones(1, 2, 6, dtype=torch.bool),
    )
    paths, known = paths_of(targets, 4, 4)
    along_x = [[-1, 0], [-2, 0], [-3, 0], [-4, 0], [1, 0], [2, 0], [3, 0], [4, 0]]
    torch.testing.assert_close(paths[0, 0], torch.tensor(along_x).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(paths[0, 1], paths[0, 0].flip(-1), atol=1e-5, rtol=0)
    assert known[0, 1, :, 0].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    # More steps than are known: they are unknown. Without a past: so is it.
    longer, known = paths_of(replace(targets, past=None, past_mask=None), 2, 8)
    assert longer.shape == (1, 2, 10, 2)
    assert known[0, 0, :, 1].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_a_bev_is_needed(make):
    module, criterion = make()
    levels = SceneFeatures(levels=(torch.zeros(ROWS, 6, DIM, 2, 2),))
    with pytest.raises(ValueError, match="agent queries need the feature 'bev'"):
        module.learn(levels, frames_of(0), None, truth(0, CLIP[0]), criterion.matcher)
