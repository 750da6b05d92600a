"""Linear layers of a few rows on a CPU, shared out over its threads by output.

Decoding runs a model on one token a row, or on a draft of sixteen. torch multiplies [rows, in] by
[in, out]; on few rows that was as fast with one thread as with two (MKL, in the wheels for x86).
As [out, in] by [in, rows] the same product has many rows, which threads share:
benchmarks/thin_products.py measures both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_ROWS = 128  # more are shared out well as they are
LEAST_WEIGHTS = 1 << 18  # smaller layers do not gain what turning them around costs


@contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """Let a model's large linear layers multiply few rows the other way around.

    Results differ by rounding. Nothing happens on one thread, on GPUs, or in less than fp32, where
    other libraries compute.

    Args:
        model: whose layers; each has its own way back afterwards.
    """
    wanted = torch.get_num_threads() > 1 and not torch.is_autocast_enabled("cpu")
    layers = [layer for layer in model.modules() if wanted and _gains(layer)]
    for layer in layers:
        layer.forward = partial(turned_product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def turned_product(layer: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer makes of x: [..., in] -> [..., out]."""
    rows = x.numel() // max(1, x.shape[-1])
    if not 1 < rows <= MOST_ROWS:
        return functional.linear(x, layer.weight, layer.bias)
    columns = x.reshape(rows, -1).t()
    if layer.bias is None:
        product = torch.mm(layer.weight, columns)
    else:
        product = torch.addmm(layer.bias[:, None], layer.weight, columns)
    return product.t().reshape(*x.shape[:-1], -1).contiguous()


def _gains(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if type(layer) is not nn.Linear:  # one that is quantised or adapted computes something else
        return False
    weight = layer.weight
    large = weight.numel() >= LEAST_WEIGHTS
    return large and weight.device.type == "cpu" and weight.dtype == torch.float32
