"""The data module as a whole: clips, streams, targets, single frames."""

import numpy as np
import pytest
import torch

from datamodules.collate import Collate
from datamodules.ego_state import ego_state
from datamodules.nuscenes import FrameDataset, NuScenesDataConfig
from datamodules.sampling import ClipRequest
from odvla.errors import UserError
from odvla.types import BevGrid


def _data(root, **changes):
    settings = {"image_size": (16, 9), "batch_size": 3, "eval_batch_size": 2} | changes
    return NuScenesDataConfig(str(root), **settings).build()


def test_an_epoch_of_clips(circle_root):
    data = _data(circle_root, clip_length=3, targets=("agents", "map"))
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    seen = [token for batch in batches for token in batch.clip[-1].sample_tokens]
    assert sorted(seen) == sorted(f.token for f in data.index.frames[:13])
    assert len(loader) == len(batches) == 5
    for batch in batches:
        rows = len(batch.valid)
        assert batch.valid.all()
        assert len(batch.clip) == len(batch.agents) == 3
        assert batch.clip[0].images.shape == (rows, 6, 3, 9, 16)
        assert batch.plan.waypoints.shape == (rows, 6, 2)
        assert batch.map.masks.shape[2:] == (32, 32)
        assert batch.talk is None
        for row, now in enumerate(batch.clip[-1].sample_tokens):
            position = data.index.frame(now).position
            starts = [bool(step.scene_start[row]) for step in batch.clip]
            # Older steps than the scene has repeat its first frame, which starts every time.
            expected = [True, position <= 1, position == 0]
            assert starts == expected
            tokens = [step.sample_tokens[row] for step in batch.clip]
            scene = data.index.scenes[data.index.frame(now).scene]
            wanted = [max(position - k, 0) + scene.first for k in (2, 1, 0)]
            assert tokens == [data.index.frames[n].token for n in wanted]


def test_streaming_covers_the_val_scenes(circle_root):
    data = _data(circle_root)
    data.setup("test")
    seen = []
    for batch in data.test_dataloader():
        assert len(batch.clip) == 1
        frames = batch.clip[0]
        for row, token in enumerate(frames.sample_tokens):
            record = data.index.frame(token)
            assert bool(frames.scene_start[row]) == (record.position == 0)
            if batch.valid[row]:
                seen.append(token)
            else:
                assert not frames.images[row].any()
    expected = [f.token for s in data.scenes("val") for f in data.index.frames[s.first : s.last]]
    assert sorted(seen) == sorted(expected)


def test_workers_give_the_same_batches(circle_root):
    def first(workers):
        data = _data(circle_root, num_workers=workers, targets=("agents",), seed=5)
        return next(iter(data.train_dataloader()))

    alone, helped = first(0), first(1)
    assert alone.clip[0].sample_tokens == helped.clip[0].sample_tokens
    torch.testing.assert_close(alone.agents[0].boxes, helped.agents[0].boxes)
    torch.testing.assert_close(alone.clip[0].images, helped.clip[0].images)


def test_collation_pads_with_masked_rows(circle_root):
    data = _data(circle_root, targets=("agents", "map"))
    dataset = FrameDataset(data.index, data.config, data.loader)
    samples = [dataset[ClipRequest(n)] for n in (0, 1)]
    counts = [s.targets.agents[0].mask.shape[1] for s in samples]
    assert counts == [1, 2]  # the walker appears in the second key-frame
    agents = Collate()(samples).agents[0]
    assert agents.mask.tolist() == [[True, False], [True, True]]
    assert not agents.boxes[0, 1].any()
    torch.testing.assert_close(agents.boxes[1:], samples[1].targets.agents[0].boxes)


def test_frame_and_evaluation_accessors(circle_root):
    data = _data(circle_root)
    frames = list(data.evaluation_frames("val"))
    assert len(frames) == 13
    assert [f.position for f in frames[:8]] == list(range(8))
    batch = data.frame(frames[2].sample_token)
    torch.testing.assert_close(batch.plan.waypoints, frames[2].plan.waypoints)
    assert batch.map is not None
    assert batch.agents
    ego = ego_state(data.index, data.index.frame(frames[2].sample_token))
    torch.testing.assert_close(frames[2].ego.history, ego.history)
    assert data.occupancy(frames[2].sample_token).shape == (6, 200, 200)
    with pytest.raises(UserError, match="sample 'nope' is not in"):
        data.frame("nope")


def test_scene_limits_and_agent_range(circle_root):
    data = _data(circle_root, train_scenes=1, eval_scenes=1, agent_range_m=300.0)
    assert [s.name for s in data.scenes("train")] == ["scene-0061"]
    assert [s.name for s in data.scenes("test")] == ["scene-0103"]
    boxes = data.frame(data.index.frames[1].token).agents[0].boxes[0]
    assert len(boxes) == 3  # with the far bus
    assert np.abs(boxes[:, :2].numpy()).max() > 60


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence_from_workers_too(circles, tmp_path, workers):
    root = circles.write_root(tmp_path)
    path = root / "samples" / "CAM_BACK" / "scene-0103_0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    data = _data(root, num_workers=workers)
    with pytest.raises(UserError) as caught:
        list(data.test_dataloader())
    assert str(caught.value) == f"camera image {path} is cut short (300 bytes, no end marker)"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("targets", ("agent",), "not 'agent'"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("image_size", (0, 9), "image_size"),
        ("version", "v1.0-maxi", "'v1.0-maxi' is not one of"),
    ],
)
def test_wrong_settings_are_named(circle_root, setting, value, message):
    with pytest.raises(UserError, match=message):
        _data(circle_root, **{setting: value}).setup("fit")


def test_real_sample_runs_without_map_and_future(shared):
    data = NuScenesDataConfig(
        str(shared / "data" / "nuscenes-one-sample"),
        image_size=(160, 90),
        grid=BevGrid(-51.2, -51.2, 0.8, 128, 128),
    ).build()
    batch = data.frame("ca9a282c9e77460f8360f564131a8af5", clip_length=2)
    assert batch.map is None
    assert not batch.plan.mask.any()
    assert batch.ego.heading_speed.item() == pytest.approx(9.0, abs=0.1)
    # GPT-Driver's real record of this sample continues its first step of 4.5 m backwards.
    np.testing.assert_allclose(
        batch.ego.history[0],
        [(-0.03, -17.98), (-0.02, -13.49), (-0.01, -8.99), (-0.01, -4.50)],
        atol=0.03,
    )
