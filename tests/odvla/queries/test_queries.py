"""Query modules: tokens, tracks through time, and what happens without features."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from odvla import geometry
from odvla.encoders.protocol import fake_frames
from odvla.queries.agent import BOX_FEATURES, AgentQueriesConfig, box_features
from odvla.queries.map import MapQueriesConfig
from odvla.queries.protocol import fake_features
from odvla.queries.scene import SceneSamplerConfig
from odvla.queries.tracks import TrackRules, carry, empty_state, expect, give_ids
from odvla.types import AgentPredictions, BevGrid, MapPredictions, SceneFeatures

GRID = BevGrid(-32.0, -32.0, 4.0, 16, 16)
RULES = TrackRules(birth_threshold=0.4, keep_threshold=0.3, max_misses=1, duplicate_m=2.0)


def step(state, frames, scores, xy, velocity=(0.0, 0.0)):
    """One step of the tracker with given scores [Q] and centres [Q][2] (first 2 are newborn)."""
    expected = expect(state, frames)
    boxes = torch.zeros(1, len(scores), 9)
    boxes[0, :, :2] = torch.tensor(xy)
    boxes[..., 7:] = torch.tensor(velocity)
    score = torch.tensor([scores])
    score[:, 2:] *= expected.mask  # an empty slot scores nothing
    ids, misses, next_id = give_ids(expected, score, boxes[..., :2], 2, RULES)
    embeddings = torch.arange(len(scores), dtype=torch.float32).view(1, -1, 1).expand(-1, -1, 4)
    return ids, carry(expected, embeddings, boxes, score, ids, misses, next_id, GRID)


def test_tracks_are_born_once_keep_their_id_and_die_after_misses() -> None:
    frames = [fake_frames(1, step=number) for number in range(5)]
    state = empty_state(frames[0], tracks=2, dim=4)
    far = (30.0, 30.0)
    ids, state = step(state, frames[0], [0.9, 0.5, 0.0, 0.0], [(0.0, 9.0), (8.0, 8.0), far, far])
    assert ids.tolist() == [[0, 1, -1, -1]]
    assert state.track_ids.tolist() == [[0, 1]]
    assert state.source.tolist() == [[0, 1]]
    # Newborn 0 stands on track 0: the same thing. Newborn 1 is new. Track 1 is missed once.
    ids, state = step(
        state, frames[1], [0.8, 0.7, 0.9, 0.1], [(0.0, 6.5), (-9, 0.0), (0.0, 6.0), (8, 5)]
    )
    assert ids.tolist() == [[-1, 2, 0, 1]]
    assert state.track_ids.tolist() == [[0, 2]]  # two slots: the two best scores
    assert state.source.tolist() == [[2, 1]]
    ids, state = step(state, frames[2], [0.0, 0.0, 0.1, 0.9], [far, far, (0.0, 3.0), (-9, -3.0)])
    assert sorted(state.track_ids[0].tolist()) == [0, 2]
    assert state.misses[0][state.track_ids[0] == 0].item() == 1
    slots = [0.9 if number == 2 else 0.1 for number in state.track_ids[0].tolist()]
    ids, state = step(state, frames[3], [0.0, 0.0, *slots], [far, far, (0.0, 0.0), (-9, -6.0)])
    assert state.track_ids[0][state.mask[0]].tolist() == [2]  # missed twice: gone
    # A new scene forgets tracks and starts to count again.
    fresh = replace(frames[4], scene_start=torch.tensor([True]))
    ids, state = step(state, fresh, [0.9, 0.0, 0.0, 0.0], [(0.0, 9.0), far, far, far])
    assert ids.tolist() == [[0, -1, -1, -1]]


def test_a_track_is_expected_where_its_velocity_and_the_cars_motion_put_it() -> None:
    before, now = fake_frames(1, step=0), fake_frames(1, step=1)
    state = empty_state(before, tracks=1, dim=4)
    box = torch.tensor([[[4.0, 10.0, -1.0, 2.0, 4.0, 1.5, 0.3, 2.0, 6.0]]])
    state = replace(state, boxes=box, mask=torch.tensor([[True]]), track_ids=torch.tensor([[3]]))
    expected = expect(state, now)
    world = torch.tensor([4.0 + 1.0, 10.0 + 3.0, -1.0, 1.0]).double()  # half a second later
    in_now = torch.linalg.inv(now.lidar_to_global[0]) @ world
    torch.testing.assert_close(expected.boxes[0, 0, :3], in_now[:3].float(), atol=1e-4, rtol=0)
    turned = geometry.yaw_of(now.lidar_to_global[0]).item()
    assert expected.boxes[0, 0, 6].item() == pytest.approx(0.3 - turned, abs=1e-4)


def test_agents_carried_over_keep_their_ids_and_rows_do_not_mix() -> None:
    torch.manual_seed(0)
    config = AgentQueriesConfig(
        queries=5, carried=4, max_tokens=6, birth_threshold=0.0, keep_threshold=0.0,
        score_threshold=0.01, duplicate_m=0.1, heads=2,
    )  # fmt: skip
    module = config.build(16, GRID).eval()
    frames = fake_frames(3), fake_frames(3, step=1)
    seen = [config.fake_features(3, 16, GRID), fake_features(3, 16, GRID, seed=1)]
    tokens, state = module(seen[0], frames[0], None)
    again, after = module(seen[1], frames[1], state)
    predicted = again.predictions
    assert isinstance(predicted, AgentPredictions)
    assert tokens.feats.shape == (3, 6, module.dim) == (3, 6, 16 + BOX_FEATURES)
    assert (predicted.carried_from[:, :5] == -1).all()
    assert torch.equal(predicted.carried_from[:, 5:], state.source)
    assert isinstance(tokens.predictions, AgentPredictions)
    old_ids = tokens.predictions.track_ids.gather(1, state.source)
    assert torch.equal(predicted.track_ids[:, 5:], old_ids)
    for ids in predicted.track_ids:
        named = ids[ids >= 0].tolist()
        assert len(named) == len(set(named))
    # a token's box features are those of its query
    assert again.query_index is not None
    row, slot = 1, 2
    query = again.query_index[row, slot]
    expected = box_features(predicted.boxes[row, query], predicted.layer_logits[-1][row, query])
    torch.testing.assert_close(again.feats[row, slot, 16:], expected)
    scores = predicted.scores.gather(1, again.query_index)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    # row 2 alone, from the start, gives what it gave among others
    alone = None
    for features, frame in zip(seen, (fake_frames(3), fake_frames(3, step=1)), strict=True):
        one = SceneFeatures(
            tuple(level[2:] for level in features.levels), features.bev[2:], features.grid
        )
        from odvla.encoders.check import take_rows

        token, alone = module(one, take_rows(frame, slice(2, None)), alone)
    torch.testing.assert_close(token.feats, again.feats[2:], atol=1e-4, rtol=1e-4)
    assert torch.equal(alone.track_ids, after.track_ids[2:])
    # a new scene is a fresh start
    restart = replace(frames[1], scene_start=torch.tensor([True, False, True]))
    restarted, _ = module(seen[1], restart, state)
    fresh, _ = module(seen[1], restart, None)
    torch.testing.assert_close(restarted.feats[::2], fresh.feats[::2], atol=1e-4, rtol=1e-4)
    assert torch.equal(restarted.mask[::2], fresh.mask[::2])


def test_empty_slots_make_no_tokens() -> None:
    module = AgentQueriesConfig(queries=3, carried=4, score_threshold=0.0).build(16, GRID).eval()
    tokens, _ = module(fake_features(1, 16, GRID), fake_frames(1), None)
    assert isinstance(tokens.predictions, AgentPredictions)
    assert tokens.predictions.mask is not None
    assert tokens.predictions.mask.tolist() == [[True] * 3 + [False] * 4]
    assert (tokens.predictions.scores[0, 3:] < 1e-6).all()


def test_map_tokens_end_with_the_drivable_area_and_show_their_masks() -> None:
    torch.manual_seed(0)
    config = MapQueriesConfig(queries=6, max_tokens=4, score_threshold=0.0, heads=2)
    module = config.build(16, GRID).eval()
    features = config.fake_features(2, 16, GRID)
    tokens, _ = module(features, fake_frames(2), None)
    predicted = tokens.predictions
    assert isinstance(predicted, MapPredictions)
    assert tokens.feats.shape == (2, 4, module.dim)
    assert tokens.mask.all()
    picture = F.avg_pool2d(predicted.drivable.sigmoid(), 2).flatten(1)
    torch.testing.assert_close(tokens.feats[:, -1, 16:80], picture)
    assert (tokens.feats[:, -1, 80:] == 0).all()
    score = predicted.layer_logits[-1].softmax(-1)[..., :-1].amax(-1)
    best = score.argmax(1)
    shown = F.max_pool2d(predicted.layer_masks[-1].sigmoid(), 2).flatten(2)[torch.arange(2), best]
    torch.testing.assert_close(tokens.feats[:, 0, 16:80], shown)
    bare = replace(config, mask_in_token=False, score_threshold=1.1).build(16, GRID)
    tokens, _ = bare(features, fake_frames(2), None)
    assert tokens.feats.shape == (2, 4, 16)
    assert tokens.mask.tolist() == [[False, False, False, True]] * 2


def test_scene_tokens_are_the_references_pooling_of_the_last_level() -> None:
    features = fake_features(2, 8, GRID, levels=2)
    sampler = SceneSamplerConfig().build(8, None)
    tokens, state = sampler(features, fake_frames(2), None)
    assert state is None
    assert tokens.feats.shape == (2, 90, 8)
    camera, row, column = 4, 2, 3
    expected = features.levels[-1][1, camera, :, 4:6, 6:8].amax((-1, -2))  # 6 x 10 to 3 x 5
    torch.testing.assert_close(tokens.feats[1, camera * 15 + row * 5 + column], expected)


def test_scene_tokens_of_a_region_of_the_bev() -> None:
    features = fake_features(1, 8, GRID)
    config = SceneSamplerConfig("bev", 2, 2, "mean", region_m=(-8.0, 8.0, 0.0, 16.0))
    tokens, _ = config.build(8, GRID)(features, fake_frames(1), None)
    assert features.bev is not None
    # columns 6..9 and rows 8..11 lie in it
    torch.testing.assert_close(tokens.feats[0, 1], features.bev[0, 8:10, 8:10].mean((0, 1)))
    with pytest.raises(ValueError, match="holds no cell"):
        replace(config, region_m=(0.1, 0.2, 0.0, 1.0)).build(8, GRID)(features, fake_frames(1))


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(ValueError, match="agent queries need the feature 'bev'"):
        AgentQueriesConfig().build(8, None)
    with pytest.raises(ValueError, match="map queries need the feature 'bev'"):
        MapQueriesConfig().build(8, None)
    with pytest.raises(ValueError, match="source='bev' need the feature 'bev'"):
        SceneSamplerConfig(source="bev").build(8, None)
    no_bev = fake_features(1, 8, None)
    with pytest.raises(ValueError, match="agent queries need the feature 'bev'"):
        AgentQueriesConfig().build(8, GRID)(no_bev, fake_frames(1), None)
    with pytest.raises(ValueError, match="the feature 'levels'"):
        SceneSamplerConfig().build(8, GRID)(SceneFeatures(levels=()), fake_frames(1))
