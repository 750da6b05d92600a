"""The baselines against closed forms."""

import numpy as np
import pytest
import torch

from experiments.baselines import EgoMLP, EgoMLPConfig, constant_velocity, ego_features
from odvla.types import EgoState


def drives(count: int, seed: int) -> tuple[EgoState, torch.Tensor]:
    """Straight drives with constant acceleration, which half a second of history cannot tell."""
    generator = torch.Generator().manual_seed(seed)
    speed = torch.rand(count, generator=generator) * 8 + 4
    accel = torch.rand(count, generator=generator) * 2 - 1
    past = -torch.tensor([2.0, 1.5, 1.0, 0.5])
    future = torch.arange(1, 7) * 0.5

    def along(t: torch.Tensor) -> torch.Tensor:
        return speed[:, None] * t + 0.5 * accel[:, None] * t**2

    history = torch.stack([torch.zeros(count, 4), along(past)], -1)
    ego = EgoState(
        velocity=torch.stack([torch.zeros(count), speed], -1),
        yaw_rate=torch.zeros(count),
        acceleration=torch.zeros(count, 2),
        can_accel=torch.stack([torch.zeros(count), accel], -1),
        heading_speed=speed,
        steering=torch.zeros(count),
        history=history,
        command=torch.full((count,), 2),
    )
    return ego, torch.stack([torch.zeros(count, 6), along(future)], -1)


def test_constant_velocity_repeats_the_last_displacement():
    ego, _ = drives(3, 0)
    plan = constant_velocity(ego)
    step = -ego.history[:, -1].numpy()
    for k in range(6):
        np.testing.assert_allclose(plan[:, k], step * (k + 1), rtol=1e-6)


def test_ego_mlp_learns_what_ego_state_determines():
    ego, plan = drives(400, 1)
    mlp = EgoMLP(EgoMLPConfig(hidden=64, epochs=40))
    mlp.fit(
        ego, plan, torch.ones(400, 6, dtype=torch.bool), [f"scene-{i // 40}" for i in range(400)]
    )
    unseen, truth = drives(200, 2)
    error = np.linalg.norm(mlp.predict(unseen) - truth.numpy(), axis=-1).mean()
    still = np.linalg.norm(constant_velocity(unseen) - truth.numpy(), axis=-1).mean()
    assert error < 0.3 * still
    assert ego_features(unseen).shape == (200, 20)


def test_masked_steps_teach_nothing():
    ego, plan = drives(100, 3)
    mask = torch.ones(100, 6, dtype=torch.bool)
    mask[:, 3:] = False
    poisoned = plan.clone()
    poisoned[:, 3:] = 1e6
    scenes = [f"scene-{i // 20}" for i in range(100)]
    config = EgoMLPConfig(hidden=16, epochs=3)
    clean, dirty = EgoMLP(config), EgoMLP(config)
    clean.fit(ego, plan, mask, scenes)
    dirty.fit(ego, poisoned, mask, scenes)
    np.testing.assert_array_equal(clean.predict(ego), dirty.predict(ego))


def test_unfitted_mlp_says_so():
    with pytest.raises(ValueError, match="must be fitted"):
        EgoMLP(EgoMLPConfig()).predict(drives(1, 0)[0])
