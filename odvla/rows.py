"""Rows of batches: nested dataclasses of tensors whose first dimension is the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_T = TypeVar("_T")


def rows_of(value: _T, rows: Tensor) -> _T:
    """Some rows, in every tensor of nested dataclasses and tuples.

    Args:
        value: anything that holds tensors [B, ...]; a tuple of texts has one a row.
        rows: bool [B], or int64 row numbers.
    """
    if rows.dtype == torch.bool:
        if bool(rows.all()):
            return value
        rows = rows.nonzero()[:, 0]
    return _select(value, rows)


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, tuple):
        if value and isinstance(value[0], str):
            return tuple(value[row] for row in rows.tolist())
        return tuple(_select(item, rows) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        chosen = {f.name: _select(getattr(value, f.name), rows) for f in fields(value)}
        return replace(value, **chosen)
    return value


def join_rows(items: Sequence[_T]) -> _T:
    """Put batches one behind the other, in every tensor of nested dataclasses and tuples.

    Where dimension 1 differs (agents, map elements, tokens), the shorter tensors get zeros at its
    end: masks are False there. What is neither tensor nor tuple nor dataclass is the first item's.
    """
    return _join(items)


def _join(items: Sequence[Any]) -> Any:
    first = items[0]
    if isinstance(first, Tensor):
        return torch.cat(_padded(items))
    if isinstance(first, tuple):
        if first and isinstance(first[0], str):
            return tuple(text for item in items for text in item)
        return tuple(_join(parts) for parts in zip(*items, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        joined = {f.name: _join([getattr(item, f.name) for item in items]) for f in fields(first)}
        return replace(first, **joined)
    return first


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [b, n, ...] padded at the end of dimension 1 to the largest n."""
    if tensors[0].dim() < 2 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return list(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    tail = tensors[0].dim() - 2
    return [F.pad(t, [0, 0] * tail + [0, longest - t.shape[1]]) for t in tensors]
