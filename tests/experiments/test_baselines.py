"""The baselines against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.baselines import (
    EgoMLP,
    EgoMLPConfig,
    constant_acceleration,
    constant_turn_rate,
    constant_velocity,
    ego_features,
)
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


def test_constant_acceleration_is_exact_where_it_holds_and_never_rolls_back():
    ego, path = drives(50, 4)
    still_moving = (path[:, 1:, 1] > path[:, :-1, 1]).all(1) & (path[:, 0, 1] > 0)
    assert still_moving.any()
    plan = constant_acceleration(ego)
    np.testing.assert_allclose(plan[still_moving], path[still_moving], atol=1e-4)
    braking = torch.tensor([[0.0, -8.0], [0.0, -5.0], [0.0, -2.5], [0.0, -0.5]])
    plan = constant_acceleration(replace(ego, history=braking.expand(50, 4, 2)))
    assert (plan == 0).all()  # 2.0, then 0.5 m a step: the next would be backwards
    standing = torch.tensor([[0.0, 0.0]] * 4)
    assert (constant_acceleration(replace(ego, history=standing.expand(50, 4, 2))) == 0).all()


def test_constant_turn_rate_drives_a_circle():
    speed, rate, step = 6.0, 0.3, 0.5
    angle = rate * step * torch.arange(-4, 7)
    # Left turn of radius speed / rate, tangent to +y in the middle of the last step.
    at = torch.stack([angle.cos(), angle.sin()], -1) * speed / rate
    at = at - at[4]
    ego, _ = drives(1, 0)
    ego = replace(ego, history=at[:4][None], yaw_rate=torch.tensor([rate]))
    np.testing.assert_allclose(constant_turn_rate(ego)[0], at[5:], atol=1e-4)
    straight = replace(ego, yaw_rate=torch.zeros(1))
    np.testing.assert_allclose(constant_turn_rate(straight), constant_velocity(straight))


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
