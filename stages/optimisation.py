"""Learning rates: one for each component of the model, over the steps of a stage."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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

# Of Muon, as torch.optim.Muon has them.
MOMENTUM = 0.95
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, LEAST_NORM = (3.4445, -4.775, 2.0315), 5, 1e-7


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
    # Above 0: weight matrices of some components learn by Muon, at this multiple of their rate. A
    # model that starts from nothing needs far fewer steps; the paper's stages use AdamW alone.
    muon: float = 0.0
    muon_components: tuple[str, ...] = ("language",)
    # Patterns of names that learn by AdamW all the same. What a matrix puts out moves by about as
    # much in every step of Muon, however little would do: too much where it is metres.
    muon_but_not: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.muon < 0:
            raise UserError(f"optimiser.muon is a multiple of a rate, not {self.muon}")
        for name in self.muon_components:
            if name not in COMPONENTS:
                raise UserError(
                    f"optimiser.muon_components: {name!r} is none of {', '.join(COMPONENTS)}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimiser.betas are numbers from 0 on, below 1, not {self.betas}")
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


def muon_weights(model: nn.Module, settings: OptimiserConfig) -> frozenset[str]:
    """Names of the parameters that learn by Muon.

    They are the weights of linear layers and convolutions, but those of the language model only
    inside its layers: its embeddings, with which its head may be tied, learn word by word.

    Raises:
        UserError: a pattern of `muon_but_not` matches none of them.
    """
    if settings.muon == 0:
        return frozenset()
    names = set()
    for place, module in model.named_modules():
        name = f"{place}.weight"
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if not name.startswith(tuple(COMPONENTS.values())):
            continue
        component = component_of(name)
        if component in settings.muon_components and (
            component != "language" or ".layers." in name
        ):
            names.add(name)
    for pattern in settings.muon_but_not:
        left_out = set(fnmatch.filter(names, pattern))
        if not left_out:
            raise UserError(
                f"optimiser.muon_but_not: {pattern!r} matches nothing that learns by Muon"
            )
        names -= left_out
    return frozenset(names)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], muon: Collection[str] = ()
) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group.

    Args:
        parameters: named_parameters() of the model.
        muon: names of those that get groups of their own, see `muon_weights`.

    Raises:
        UserError: a trainable parameter belongs to no component, or none trains.
    """
    found: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            key = (component_of(name), parameter.ndim > 1, name in muon)
            found.setdefault(key, []).append(parameter)
    if not found:
        raise UserError("no parameter of the model trains")
    return [
        ParameterGroup(component, decays, tuple(group), by_muon)
        for (component, decays, by_muon), group in found.items()
    ]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), as torch.optim.Muon, of filters too, and on a CPU in fp32.

    A filter [out, in, ...] is taken as the matrix [out, in * ...]. Few CPUs multiply in bfloat16,
    in which torch makes matrices orthogonal everywhere. On one that cannot, the 21 matrices of a
    language model of three layers took half a second a step, longer than forward and backward
    (docs/decisions.md).

    Args:
        groups: of matrices and filters, with "lr" and "weight_decay".
        largest_stacked: numbers of the largest matrix that is taken together with others.
    """

    def __init__(self, groups: list[dict[str, Any]], largest_stacked: int = 2**20) -> None:
        self.largest_stacked = largest_stacked
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            for weights in self._alike(group["params"]):
                steps = orthogonal_together([self._direction(weight) for weight in weights])
                for weight, step in zip(weights, steps, strict=True):
                    # So a rate means about what it means to AdamW, whatever the shape.
                    length = 0.2 * math.sqrt(max(step.shape))
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step.view_as(weight), alpha=-group["lr"] * length)
        return loss

    def _alike(self, parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
        """Those that learn: small matrices of one shape, up to turning, together; the others alone.

        A product of small matrices keeps neither two threads nor a GPU busy. Large ones do, and
        stacked copies of them would need much memory; sharded ones cannot be stacked.
        """
        found: dict[Any, list[nn.Parameter]] = {}
        for weight in parameters:
            if weight.grad is None:
                continue
            alone = weight.numel() > self.largest_stacked or isinstance(weight, DTensor)
            shape = len(weight), weight.numel() // len(weight)
            key = id(weight) if alone else (*sorted(shape), weight.device)
            found.setdefault(key, []).append(weight)
        return found.values()

    def _direction(self, weight: nn.Parameter) -> torch.Tensor:
        """Where Nesterov's momentum leads, as a matrix."""
        grad, state = weight.grad, self.state[weight]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(mean, MOMENTUM).flatten(1)
        return ahead.float() if ahead.device.type == "cpu" else ahead.bfloat16()


def orthogonal_together(matrices: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """See `orthogonal`, of several that have one shape, turned or not."""
    if len(matrices) == 1:
        return [orthogonal(matrices[0])]
    steps = orthogonal(torch.stack([_wide(matrix) for matrix in matrices]))
    return [
        step if _is_wide(matrix) else step.T for step, matrix in zip(steps, matrices, strict=True)
    ]


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices [..., rows, columns] with the same singular vectors and all singular values near 1.

    Each of the Newton-Schulz steps puts the singular values x through a x + b x^3 + c x^5.
    """
    a, b, c = NEWTON_SCHULZ
    x = _wide(matrices)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if _is_wide(matrices) else x.mT


def _is_wide(matrices: torch.Tensor) -> bool:
    return matrices.shape[-2] <= matrices.shape[-1]


def _wide(matrices: torch.Tensor) -> torch.Tensor:
    return matrices if _is_wide(matrices) else matrices.mT


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
            self.parts.append(adamw(rest, betas))
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
        loss = _loss_of(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state_dict)
        self._share(self.param_groups)


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW; on a CPU as one kernel a tensor, where calls take longer than the arithmetic.

    On a GPU torch takes all tensors together anyway; one kernel would forbid Lightning to clip
    gradients in float16.
    """
    weights = [weight for group in groups for weight in group["params"]]
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    return torch.optim.AdamW(groups, betas=betas, fused=on_cpu or None)


def _loss_of(closure: Any) -> Any:
    """What torch's optimisers do first: compute the loss and its gradients, if they are to."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def trained_counts(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Number of trainable values of each component that trains."""
    counts: dict[str, int] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            component = component_of(name)
            counts[component] = counts.get(component, 0) + parameter.numel()
    return counts
