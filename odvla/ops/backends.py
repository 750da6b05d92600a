"""Which implementation of the two operations runs: chosen once, named in the log.

"auto" decides by device and size: on a CPU weighted bags, or grid_sample where so little is read
that starting the bags costs more than it saves; on another device mmcv's kernels where a full mmcv
is installed, else those of deformops, else grid_sample. Every other name is used for all calls,
whatever their size. docs/ops.md has the measurements behind this.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Any, Literal

import torch

from odvla.errors import UserError
from odvla.ops import compiled, grid_sampling, weighted_bags

log = logging.getLogger(__name__)
Name = Literal["auto", "bags", "grid_sample", "mmcv", "deformops"]
NAMES: tuple[Name, ...] = ("auto", "bags", "grid_sample", "mmcv", "deformops")
PURE: dict[str, Any] = {"bags": weighted_bags, "grid_sample": grid_sampling}
COMPILED: dict[str, Any] = {"mmcv": compiled.MMCVOps, "deformops": compiled.DeformopsOps}
VARIABLE = "ODVLA_OPS"
# Numbers read of one row and map (samples x channels) from which bags are faster on a CPU, without
# and with a backward pass.
WORTH_BAGS = {False: 1 << 18, True: 1 << 20}

_chosen: str | None = None


def use_backend(name: str) -> None:
    """Choose for the rest of the process.

    Args:
        name: one of NAMES.

    Raises:
        UserError: an unknown name, or a library that is not installed or does not load.
    """
    global _chosen
    if name not in NAMES:
        raise UserError(f"{VARIABLE} must be one of {', '.join(NAMES)}, not {name!r}")
    if name in COMPILED:
        _load(name)
    _chosen = name


def chosen_backend() -> str:
    """The name in force: what `use_backend` was told, else ODVLA_OPS, else "auto".

    Raises:
        UserError: ODVLA_OPS names no usable backend.
    """
    if _chosen is None:
        use_backend(os.environ.get(VARIABLE, "auto"))
    assert _chosen is not None
    return _chosen


def available_backends() -> list[str]:
    """Names that `use_backend` takes here, "auto" left out."""
    return [*PURE, *(name for name in COMPILED if _is_installed(name))]


def backend_for(*tensors: torch.Tensor, numbers: int) -> Any:
    """What to call: an object with `attention` and `convolution`.

    Args:
        tensors: the operation's inputs.
        numbers: read of one row and map, samples x channels.

    Raises:
        UserError: the chosen backend has no kernel for this device.
    """
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    name = chosen_backend()
    if name == "auto":
        if tensors[0].device.type == "cpu":
            name = "bags" if numbers >= WORTH_BAGS[gradient] else "grid_sample"
        else:
            name = _fastest_compiled() or "grid_sample"
    return _usable(name, tensors[0].device)


def _usable(name: str, device: torch.device) -> Any:
    if name in PURE:
        return PURE[name]
    if device.type == "cpu":
        raise UserError(f"{VARIABLE}={name} works on GPUs only, and the model runs on the CPU")
    return _load(name)


def describe_backend(device: torch.device) -> str:
    """One line for the log, after a check that a compiled backend computes what it should.

    Args:
        device: where the model will run.

    Raises:
        UserError: the chosen backend is not usable there, or gives other results than torch.
    """
    name = chosen_backend()
    if name == "auto" and device.type == "cpu":
        return "deformable ops: bags, grid_sample where little is read (auto, cpu)"
    found = (_fastest_compiled() or "grid_sample") if name == "auto" else name
    backend = _usable(found, device)
    if found in COMPILED:
        _check(found, backend, device)
    return f"deformable ops: {found} ({f'auto, {device.type}' if name == 'auto' else VARIABLE})"


def _is_installed(name: str) -> bool:
    # mmcv-lite is called mmcv, too; only a full one has the extension.
    needed = {"mmcv": ("mmcv", "mmcv._ext"), "deformops": ("deformops",)}[name]
    return all(importlib.util.find_spec(module) is not None for module in needed)


@cache
def _load(name: str) -> Any:
    if not _is_installed(name):
        hint = " with compiled ops (mmcv-lite has none)" if name == "mmcv" else ""
        raise UserError(f"{VARIABLE}={name} needs {name}{hint}, which is not installed")
    try:
        return COMPILED[name]()
    except ImportError as error:
        raise UserError(f"{VARIABLE}={name}: {name} does not load: {error}") from error


@cache
def _fastest_compiled() -> str | None:
    """The first compiled backend that loads; one that is installed but broken is named once."""
    for name in COMPILED:
        if not _is_installed(name):
            continue
        try:
            _load(name)
        except UserError as error:
            log.warning("%s; going on without it", error)
        else:
            return name
    return None


def _check(name: str, backend: Any, device: torch.device) -> None:
    """Compare with grid_sample on a few numbers.

    Raises:
        UserError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(2, 64, 6, 9, generator=generator).to(device),
        torch.randn(2, 64, 3, 4, generator=generator).to(device),
    ]
    locations = (torch.rand(2, 5, 8, 2, 4, 2, generator=generator) * 1.4 - 0.2).to(device)
    weights = torch.rand(2, 5, 8, 2, 4, generator=generator).to(device)
    expected = grid_sampling.attention(values, locations, weights)
    difference = float((backend.attention(values, locations, weights) - expected).abs().max())
    if not difference < 1e-3:
        raise UserError(
            f"{VARIABLE}={name}: the compiled deformable attention differs from "
            f"torch's by {difference:.1e} on {device}; set {VARIABLE}=grid_sample"
        )
