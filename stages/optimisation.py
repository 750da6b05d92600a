"""Learning rates: one for each component of the model, over the steps of a stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from odvla.errors import UserError

# Component -> prefix of its parameter names; the first that fits counts.
COMPONENTS = {
    "backbone": "encoder.backbone.",
    "encoder": "encoder.",
    "queries": "queries.",
    "projectors": "projectors.",
    "language": "language.",
    "planner": "planner.",
}


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each component; used for those that train."""

    backbone: float = 1e-4
    encoder: float = 1e-4
    queries: float = 1e-4
    projectors: float = 1e-4
    language: float = 1e-5
    planner: float = 1e-4


@dataclass(frozen=True)
class StartSteps:
    """A component's learning rate is 0 before this step: gradual unfreezing.

    Its parameters are trainable from the first step, so that the optimiser and distributed training
    know them; only their rate waits.
    """

    backbone: int = 0
    encoder: int = 0
    queries: int = 0
    projectors: int = 0
    language: int = 0
    planner: int = 0


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, warm-up, and the way down."""

    lr: LearningRates = LearningRates()
    start: StartSteps = StartSteps()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03  # part of all steps
    final_lr: float = 0.0  # part of the peak that a cosine ends at
    weight_decay: float = 0.0  # of matrices; vectors (biases, norms) never decay
    betas: tuple[float, float] = (0.9, 0.999)
    # Above 0: the language model's weight matrices learn by Muon, at this multiple of its rate. A
    # model that starts from nothing needs far fewer steps; the paper's stages use AdamW alone.
    muon: float = 0.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.muon < 0:
            raise UserError(f"optimiser.muon is a multiple of a rate, not {self.muon}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a part of all steps below 1, not {self.warmup}")
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"final_lr is a part of the peak, at most 1, not {self.final_lr}")

    def factor(self, step: int, total: int, start: int) -> float:
        """Learning rate of a step as a part of its peak.

        Args:
            step: 0 for the first one.
            total: steps of the stage.
            start: first step at which the component learns.
        """
        step, total = step - start, max(total - start, 1)
        if step < 0:
            return 0.0
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        done = min((step - warm) / max(total - warm, 1), 1.0)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    component: str
    decays: bool
    parameters: tuple[nn.Parameter, ...]
    muon: bool = False


def component_of(name: str) -> str:
    """The component a parameter belongs to.

    Raises:
        UserError: it belongs to none.
    """
    for component, prefix in COMPONENTS.items():
        if name.startswith(prefix):
            return component
    raise UserError(f"parameter {name!r} belongs to none of {', '.join(COMPONENTS)}")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, muon: bool = False
) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group.

    Args:
        parameters: named_parameters() of the model.
        muon: matrices inside the language model's layers get a group of their own.

    Raises:
        UserError: a trainable parameter belongs to no component, or none trains.
    """
    found: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and name.startswith("language.") and ".layers." in name
            key = (component_of(name), parameter.ndim > 1, muon and matrix)
            found.setdefault(key, []).append(parameter)
    if not found:
        raise UserError("no parameter of the model trains")
    return [
        ParameterGroup(component, decays, tuple(group), by_muon)
        for (component, decays, by_muon), group in found.items()
    ]


class Muon(torch.optim.Muon):
    """torch.optim.Muon; on a CPU its matrices are made orthogonal in fp32 instead of bfloat16.

    Few CPUs multiply in bfloat16. On one that cannot, the 21 matrices of a language model of three
    layers took half a second a step, longer than forward and backward (docs/decisions.md). State
    and settings are torch's.

    Args:
        groups: of matrices.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        # With this adjustment a rate means about what it means to AdamW, whatever the shape.
        super().__init__(groups, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; see Jordan et al. 2024."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._learn(parameter, group)
        return loss

    def _learn(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        grad, momentum, state = parameter.grad, group["momentum"], self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(mean, momentum) if group["nesterov"] else mean
        step = orthogonal(ahead.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
        length = 0.2 * math.sqrt(max(parameter.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-group["lr"] * length)


def orthogonal(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """A matrix with the same singular vectors and all singular values near 1.

    Each of the Newton-Schulz steps puts the singular values x through a x + b x^3 + c x^5.

    Args:
        matrix: [rows, columns].
        coefficients: a, b, c.
        steps: how many.
        eps: least norm of the matrix that is divided by.
    """
    a, b, c = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some groups and AdamW for the others, as one optimiser.

    Muon (Jordan et al. 2024) takes matrices only, and Lightning's automatic optimisation takes one
    optimiser only.

    Args:
        groups: as for AdamW; those with "muon": True go to Muon.
        betas: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__([dict(group) for group in groups], {})
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, betas=betas))
        self._share(matrices_first=[group for part in self.parts for group in part.param_groups])

    def _share(self, matrices_first: list[dict[str, Any]]) -> None:
        """One list of groups and one state: for schedulers and checkpoints, which know no parts."""
        self.param_groups = matrices_first
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state_dict)
        self._share(self.param_groups)


def trained_counts(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Number of trainable values of each component that trains."""
    counts: dict[str, int] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            component = component_of(name)
            counts[component] = counts.get(component, 0) + parameter.numel()
    return counts
