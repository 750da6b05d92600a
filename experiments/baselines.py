"""The rows that tell whether vision matters: planners that never see an image.

Three go on as the car moves, by its velocity, its acceleration or its yaw rate. The ego-state MLP
is trained on the same split as the model and sees everything about the car itself that the model is
told: velocity, turn rate, accelerations, CAN bus, steering, two seconds of history and the command
(AD-MLP's question, asked of this data).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from odvla.types import COMMANDS, STEP_S, WAYPOINTS, EgoState

FloatArray = NDArray[np.float64]


def constant_velocity(ego: EgoState) -> FloatArray:
    """Keep the displacement of the last 0.5 s: [S, 6, 2] metres in LIDAR_TOP at t0."""
    step = ego.last_step.double().numpy()
    return step[:, None] * np.arange(1, WAYPOINTS + 1)[None, :, None]


def constant_acceleration(ego: EgoState) -> FloatArray:
    """Every step differs from the one before as the last two did: [S, 6, 2] metres.

    A car that brakes stops; it does not roll back.
    """
    last = ego.last_step.double().numpy()
    history = ego.history.double().numpy()
    change = last - (history[:, -1] - history[:, -2])
    numbers = np.arange(1, WAYPOINTS + 1)[None, :, None]
    steps = last[:, None] + change[:, None] * numbers
    onward = np.logical_and.accumulate((steps * last[:, None]).sum(-1) > 0, axis=1)
    standing = np.linalg.norm(last, axis=-1) < 1e-6  # it may set off
    return np.cumsum(np.where((onward | standing[:, None])[..., None], steps, 0.0), axis=1)


def constant_turn_rate(ego: EgoState) -> FloatArray:
    """Keep speed and yaw rate of the last half second: [S, 6, 2] metres on an arc."""
    last = ego.last_step.double().numpy()
    angle = ego.yaw_rate.double().numpy()[:, None] * STEP_S * np.arange(1, WAYPOINTS + 1)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = last[:, :1], last[:, 1:]
    return np.cumsum(np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1), axis=1)


def ego_features(ego: EgoState) -> Tensor:
    """All the model is told about the car, the command one-hot: [S, 20]."""
    command = nn.functional.one_hot(ego.command, len(COMMANDS)).float()
    return torch.cat([ego.motion, command], dim=1)


@dataclass(frozen=True)
class EgoMLPConfig:
    """An MLP from ego state to a plan.

    The number of epochs is chosen on `held_out` of the training scenes, then the network is trained
    again on all of them, so that the baseline is as strong as its data allows.
    """

    hidden: int = 256
    layers: int = 2
    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    held_out: float = 0.2
    seed: int = 0


class EgoMLP:
    """Fits and predicts plans from the ego state alone."""

    def __init__(self, config: EgoMLPConfig) -> None:
        self.config = config
        self._network: nn.Module | None = None
        self._mean = torch.zeros(0)
        self._std = torch.ones(0)
        self.epochs = 0

    def fit(self, ego: EgoState, waypoints: Tensor, mask: Tensor, scenes: list[str]) -> None:
        """Train on plans [S, 6, 2] with mask [S, 6]; `scenes` [S] names each sample's scene."""
        features = ego_features(ego)
        self._mean, self._std = features.mean(0), features.std(0).clamp_min(1e-3)
        inputs = (features - self._mean) / self._std
        # What is learned is the correction to constant velocity: it starts where the other baseline
        # ends.
        residual = waypoints - torch.from_numpy(constant_velocity(ego)).float()
        names = sorted(set(scenes))
        held = set(names[:: max(1, round(1 / self.config.held_out))])
        is_held = torch.tensor([scene in held for scene in scenes])
        if is_held.all() or not is_held.any():
            is_held = torch.arange(len(scenes)) % 5 == 0
        # Matrices so small that to wake a second thread takes longer than to multiply them.
        with threadpool_limits(1):
            _, curve = self._train(
                (inputs[~is_held], residual[~is_held], mask[~is_held]),
                (inputs[is_held], residual[is_held], mask[is_held]),
                self.config.epochs,
            )
            self.epochs = 1 + int(np.argmin(curve))
            self._network, _ = self._train((inputs, residual, mask), None, self.epochs)

    def predict(self, ego: EgoState) -> FloatArray:
        """Plans [S, 6, 2] metres."""
        if self._network is None:
            raise ValueError("the ego-state MLP must be fitted before it predicts")
        with torch.no_grad():
            residual = self._network((ego_features(ego) - self._mean) / self._std)
        return constant_velocity(ego) + residual.view(-1, WAYPOINTS, 2).double().numpy()

    def _train(
        self,
        data: tuple[Tensor, Tensor, Tensor],
        held_out: tuple[Tensor, Tensor, Tensor] | None,
        epochs: int,
    ) -> tuple[nn.Module, list[float]]:
        """Train for a number of epochs; the curve is the held-out L2 after each."""
        config = self.config
        inputs, residual, mask = data
        generator = torch.Generator().manual_seed(config.seed)
        network = _mlp(inputs.shape[1], config, generator)
        optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # one call a tensor: the arithmetic is next to nothing
        )
        curve = []
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(config.batch_size):
                loss = _masked_distance(network(inputs[rows]), residual[rows], mask[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            if held_out is not None:
                with torch.no_grad():
                    curve.append(float(_masked_distance(network(held_out[0]), *held_out[1:])))
        return network, curve


def _mlp(width_in: int, config: EgoMLPConfig, generator: torch.Generator) -> nn.Module:
    """Linear-GELU layers, initialised from the generator so that no global seed matters."""
    widths = [width_in, *[config.hidden] * config.layers, WAYPOINTS * 2]
    modules: list[nn.Module] = []
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            bound = a**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
        modules += [layer] if index == len(widths) - 2 else [layer, nn.GELU()]
    return nn.Sequential(*modules)


def _masked_distance(predicted: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
    """Mean L2 over the recorded steps: the measured quantity is the trained one."""
    distance = (predicted.view(-1, WAYPOINTS, 2) - residual).square().sum(-1).add(1e-8).sqrt()
    return (distance * mask).sum() / mask.sum().clamp_min(1)
