"""Fully sharded data parallelism (FSDP2): every process holds a part of each parameter.

The language model's layers are gathered one after the other, everything else with the model as a
whole. Training alone is sharded; weights are gathered into a whole model afterwards, which
evaluates and is handed over, because processes that write texts of different lengths cannot take
part in the same exchanges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from odvla.vla import DrivingVLA


def shard(vla: DrivingVLA, mesh: Any) -> None:
    """Shard a model over the processes of a mesh, in place; do it before the optimiser is made."""
    for layer in vla.language.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(vla, mesh=mesh)
    # The perception stage looks and does not talk; nor does a plan by regression.
    register_fsdp_forward_method(vla, "perceive")
    register_fsdp_forward_method(vla, "regress")
    # Gradients are exchanged all at once: each process must have one for each parameter, whether
    # or not its conversations use it.
    vla.every_parameter_counts = True


@torch.no_grad()
def gather_into(whole: nn.Module, sharded: nn.Module) -> None:
    """Copy sharded parameters and buffers into a model that is whole; all processes take part."""
    own = whole.state_dict()
    for name, tensor in sharded.state_dict().items():
        own[name].copy_(full(tensor))


def full(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
