"""Stage 0 on clips: it learns, in bf16 as in float32, repeats itself, names what cannot be."""

from dataclasses import replace

import pytest
import torch

from callbacks.freeze import FreezeByName
from callbacks.resume import LAST, ResumeCheckpoint
from odvla.augmentation import AugmentationConfig
from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.resnet import ResNetConfig
from odvla.errors import UserError
from odvla.fake_batch import fake_batch
from odvla.language.causal_lm import LanguageConfig
from odvla.losses.clip import ClipLossConfig
from odvla.outputs import Teaching
from odvla.queries.map import MapQueriesConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.queries.track_learning import TrackLearning
from odvla.queries.trackformer import TrackFormerConfig
from odvla.vla import VLAConfig
from stages.optimisation import LearningRates, OptimiserConfig
from stages.perception import PerceptionStageConfig

SIZE = (48, 32)
FAST = OptimiserConfig(lr=LearningRates(3e-3, 3e-3, 3e-3), warmup=0.0, schedule="constant")
LOSSES = ClipLossConfig(past_trajectory=0.1)


@pytest.fixture
def make_tower(tokenizer):
    def make(seed=0, dropout=0.1, map_queries=None, **learning):
        config = VLAConfig(
            encoder=BEVFormerConfig(
                backbone=ResNetConfig(depth=50, base_channels=2, deformable_stages=()),
                dim=16,
                rows=8,
                columns=8,
                layers=1,
                heads=2,
                hidden=16,
                dropout=dropout,
            ),
            queries=(
                SceneSamplerConfig(),
                TrackFormerConfig(
                    queries=10,
                    layers=2,
                    heads=2,
                    hidden=16,
                    dropout=dropout,
                    learning=TrackLearning(carry_iou=0.0, **learning),
                ),
                *([map_queries] if map_queries else []),
            ),
            language=LanguageConfig(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=32),
        )
        torch.manual_seed(seed)
        return config.build(tokenizer)

    return make


def batch_of(seed=0, rows=2, steps=2):
    made = fake_batch(None, rows=rows, steps=steps, image_size=SIZE, seed=seed)
    return replace(made, agents=tuple(_still(a) for a in made.agents))


def _still(agents):
    """The same large boxes in every frame, so that tracks overlap what they stand for."""
    boxes = agents.boxes.clone()
    boxes[..., :2] = torch.tensor([[-20.0, 10.0], [15.0, -8.0], [5.0, 25.0], [-6.0, -30.0]])
    boxes[..., 3:6] = torch.tensor([24.0, 24.0, 2.0])
    return replace(agents, boxes=boxes, labels=torch.arange(4).expand(len(boxes), -1).clone())


def losses_of(vla, steps, dtype=None, losses=LOSSES):
    """Losses of training steps on one batch."""
    stage = PerceptionStageConfig(optimiser=FAST, losses=losses).build(vla).train()
    optimiser = torch.optim.AdamW(vla.parameters(), lr=3e-3)
    batch, found = batch_of(), []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype or torch.float32, enabled=dtype is not None):
            loss = stage.loss_of(batch, None).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vla.parameters(), 35.0)
        optimiser.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("compat", ["none", "uniad"])
def test_the_loss_falls(make_tower, compat):
    losses = replace(LOSSES, compat=compat, history="uniad" if compat == "uniad" else "detached")
    found = losses_of(make_tower(), 16, losses=losses)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_bf16_learns_as_float32_does(make_tower):
    exact = losses_of(make_tower(dropout=0.0, random_drop=0.0, false_tracks=0.0), 8)
    mixed = losses_of(make_tower(dropout=0.0, random_drop=0.0, false_tracks=0.0), 8, torch.bfloat16)
    assert all(value == value for value in mixed)
    assert mixed == pytest.approx(exact, rel=0.08)


def test_every_parameter_but_the_language_models_learns(make_tower):
    vla = make_tower(false_tracks=0.0, random_drop=0.0, dropout=0.0)
    stage = PerceptionStageConfig(losses=LOSSES).build(vla).train()
    # Weights that start at zero hide those behind them.
    with torch.no_grad():
        for parameter in vla.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    stage.loss_of(batch_of(steps=3), None).loss.backward()
    without = {
        name
        for name, p in vla.named_parameters()
        if name.startswith(("encoder.", "queries.")) and (p.grad is None or not p.grad.any())
    }
    assert without == set()


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("gradient", [False, True, True]),
        ("detached", [False, False, False]),
        # Twice through the clip, the first time for the history.
        ("uniad", [False] * 5),
    ],
)
def test_gradient_goes_through_the_history_only_where_asked(make_tower, history, expected):
    vla = make_tower().train()
    learns = []
    vla.encoder.register_forward_pre_hook(
        lambda module, args: learns.append(args[1] is not None and args[1].bev.requires_grad)
    )
    batch = batch_of(steps=3)
    matcher = LOSSES.build(vla.encoder.grid).matcher
    vla.perceive(batch.clip, None, teaching=Teaching(batch.agents, matcher, history))
    assert learns == expected


def test_a_killed_run_ends_in_the_same_weights(make_tower, make_trainer, tmp_path):
    """Augmentation, dropout and dropped tracks are drawn again as they were."""
    config = PerceptionStageConfig(
        optimiser=FAST, losses=LOSSES, steps=4, augmentation=AugmentationConfig()
    )

    loader = torch.utils.data.DataLoader([batch_of(7)] * 4, batch_size=None)

    def fit(name, steps, config=config):
        vla = make_tower(random_drop=0.5, false_tracks=0.5)
        trainer = make_trainer(
            FreezeByName(vla, config.freeze), ResumeCheckpoint(tmp_path / name, 2), max_steps=steps
        )
        last = tmp_path / name / LAST
        path = last if last.is_file() else None
        trainer.fit(config.build(vla, 4, seed=3), loader, ckpt_path=path)
        return {key: value.clone() for key, value in vla.state_dict().items()}

    whole = fit("whole", 4)
    fit("broken", 2)
    resumed = fit("broken", 4)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    plain = fit("plain", 4, replace(config, augmentation=None))
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)


def test_augmentation_is_for_training_alone(make_tower):
    vla = make_tower()
    changed = AugmentationConfig(grid_mask=1.0)
    stage = PerceptionStageConfig(losses=LOSSES, augmentation=changed).build(vla).eval()
    plain = PerceptionStageConfig(losses=LOSSES).build(vla).eval()
    with torch.no_grad():
        assert stage.loss_of(batch_of(), None).loss == plain.loss_of(batch_of(), None).loss
        stage.train()
        plain.train()
        losses = []
        for one in (stage, plain):
            torch.manual_seed(0)
            losses.append(one.loss_of(batch_of(), None).loss)
    assert losses[0] != losses[1]


def test_rows_that_fill_a_batch_teach_nothing(make_tower):
    vla = make_tower(dropout=0.0).eval()
    stage = PerceptionStageConfig(losses=LOSSES).build(vla)
    batch = batch_of()
    with torch.no_grad():
        alone = stage.loss_of(replace(batch, valid=torch.tensor([False, True])), None)
        both = stage.loss_of(batch, None)
        nothing = stage.loss_of(replace(batch, valid=torch.zeros(2, dtype=torch.bool)), None)
    assert (alone.weight, both.weight, nothing.weight) == (1, 2, 0)
    assert alone.loss != both.loss
    assert set(both.parts) == {"agent_class", "agent_box", "past_trajectory"}


def test_clip_losses_need_tracks_and_their_truth(make_tower, make_vla):
    with pytest.raises(UserError, match=r"TrackFormerConfig\), not AgentQueries"):
        PerceptionStageConfig(losses=LOSSES).build(make_vla())
    stage = PerceptionStageConfig(losses=LOSSES).build(make_tower())
    with pytest.raises(UserError, match="targets must hold agents"):
        stage.loss_of(replace(batch_of(), agents=()), None)


@pytest.mark.parametrize("size", [(33, 47), (160, 90), (32, 32), (700, 40)])
def test_images_of_any_size_are_padded(make_tower, size):
    vla = make_tower().eval()
    batch = fake_batch(None, rows=1, image_size=size)
    with torch.no_grad():
        seen, _ = vla.perceive(batch.clip)
    assert seen.features.bev.isfinite().all()
    height, width = -(-size[1] // 32) * 32, -(-size[0] // 32) * 32
    assert seen.features.levels[0].shape[-2:] == (height // 8, width // 8)


def test_images_that_the_tower_cannot_take_are_named(make_tower):
    vla = make_tower()
    frames = fake_batch(None, rows=1, image_size=SIZE).clip[0]
    empty = replace(frames, images=frames.images[..., :0])
    with pytest.raises(UserError, match="images of 0x32 pixels"):
        vla.perceive((empty,))
    cameras = replace(
        frames.cameras,
        intrinsics=frames.cameras.intrinsics[:, :5],
        lidar_to_cam=frames.cameras.lidar_to_cam[:, :5],
    )
    with pytest.raises(UserError, match="6 cameras, not 5"):
        vla.perceive((replace(frames, images=frames.images[:, :5], cameras=cameras),))


class AnyMap:
    """A criterion of the map that takes whatever the head says."""

    def __init__(self):
        self.given = []

    def build(self):
        def judge(head, predictions, targets):
            self.given.append((head, len(predictions.drivable), len(targets.drivable)))
            return {"map_class": predictions.drivable.square().mean()}

        return judge


def test_a_map_criterion_gets_the_head_and_the_valid_rows(make_tower):
    vla = make_tower(map_queries=MapQueriesConfig(queries=4, max_tokens=4, layers=1, heads=1))
    of_map = AnyMap()
    stage = PerceptionStageConfig(losses=replace(LOSSES, map=of_map)).build(vla).train()
    batch = fake_batch(None, rows=2, steps=2, image_size=SIZE, grid=vla.encoder.grid)
    found = stage.loss_of(replace(batch, valid=torch.tensor([True, False])), None)
    assert of_map.given == [(vla.queries["map"], 1, 1)]
    assert set(found.parts) == {"agent_class", "agent_box", "past_trajectory", "map_class"}
    found.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in vla.queries["map"].parameters())
    without = PerceptionStageConfig(losses=LOSSES).build(vla)
    assert "map_class" not in without.loss_of(batch, None).parts


def test_what_the_ground_truth_has_helped_to_see_is_no_prediction(make_tower):
    stage = PerceptionStageConfig(losses=LOSSES).build(make_tower()).eval()
    batch = batch_of()
    found = stage.loss_of(batch, None)
    assert found.weight > 0
    assert not stage.predicts_in_validation
    assert stage.records_of(found, batch) == []
    assert stage.predict_rows(batch) != []
