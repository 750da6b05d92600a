"""A metric that remembers every sample once, so that its value cannot depend on how they came.

Distributed samplers repeat samples to fill their last batch, and shards have different lengths.
Sums over ranks then differ in their last digits, or count samples twice (known of UniAD's and
VAD's evaluation). Here the rows of all processes are gathered, sorted by the sample's name and
counted once; the same numbers come out at any number of processes, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

NAME_BYTES = 64  # of a sample's name; nuScenes tokens have 32


class SampleMetric(Metric):
    """Base of metrics over named samples; subclasses say how many numbers a sample has.

    Args:
        width: numbers of a sample.
    """

    full_state_update = False
    is_differentiable = False
    names: list[Tensor]
    rows: list[Tensor]

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.add_state("names", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def keep(self, names: Sequence[str], rows: Tensor) -> None:
        """Add samples.

        Args:
            names: of S samples, at most NAME_BYTES bytes each.
            rows: [S, width].

        Raises:
            ValueError: a name is too long, or shapes do not fit.
        """
        if rows.shape != (len(names), self.width):
            raise ValueError(
                f"{len(names)} samples need rows of shape [{len(names)}, {self.width}], "
                f"not {list(rows.shape)}"
            )
        encoded = [name.encode() for name in names]
        if any(len(name) > NAME_BYTES for name in encoded):
            raise ValueError(f"a sample's name has at most {NAME_BYTES} bytes")
        padded = b"".join(name.ljust(NAME_BYTES, b"\0") for name in encoded)
        table = np.frombuffer(padded, dtype=np.uint8).reshape(len(names), NAME_BYTES)
        self.names.append(torch.from_numpy(table.copy()).to(self.device))
        self.rows.append(rows.to(self.device, torch.float64))

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Let a process that saw no sample take part: it gathers tables without rows."""
        if not self.names:
            self.names.append(torch.zeros(0, NAME_BYTES, dtype=torch.uint8, device=self.device))
            self.rows.append(torch.zeros(0, self.width, dtype=torch.float64, device=self.device))
        super()._sync_dist(dist_sync_fn, process_group=process_group)

    def table(self) -> tuple[tuple[str, ...], Tensor]:
        """Names, sorted, and rows [S, width] of all samples, each once.

        Raises:
            ValueError: no sample was added, or one was added twice with different numbers.
        """
        parts = self.names if isinstance(self.names, list) else [self.names]
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not parts or not len(rows):
            raise ValueError("there is nothing to score: no sample was added")
        raw = torch.cat(parts).cpu().numpy()
        names = np.ascontiguousarray(raw).view(f"S{NAME_BYTES}")[:, 0]
        order = np.argsort(names, kind="stable")
        first = np.ones(len(order), dtype=bool)
        first[1:] = names[order[1:]] != names[order[:-1]]
        again = np.flatnonzero(~first)
        rows = rows[torch.from_numpy(order)]
        here, before = (torch.nan_to_num(rows[torch.from_numpy(k)]) for k in (again, again - 1))
        differing = (here != before).any(1).nonzero()[:, 0]
        if len(differing):
            name = names[order[again[int(differing[0])]]].decode()
            raise ValueError(f"sample {name!r} was scored twice, differently")
        kept = [name.decode() for name in names[order[first]].tolist()]
        return tuple(kept), rows[torch.from_numpy(first)]
