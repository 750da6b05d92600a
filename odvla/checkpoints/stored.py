"""A tensor that still lies in a file: its name, shape and type are known, its values are read last.

A checkpoint of 15 GB is converted tensor by tensor; nothing here holds more than one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is to be had."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: Path | None = None  # None: in memory

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self.numel * self.dtype.itemsize


Stored = Mapping[str, StoredTensor]
