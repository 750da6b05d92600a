"""A piece of work that the processes of a run share out: one count, one end, one error for all."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from odvla.errors import UserError

POLL_S = 0.2
_T = TypeVar("_T")


class SharedWork:
    """A block that every process goes through, each with a share of its own.

        with SharedWork() as work:
            for part in mine(work.rank, work.world_size):
                do(part)
                work.add(1)

    Nobody leaves before all are done. What one process raises as a UserError, all raise. They meet
    in the store by which they found each other, not in an exchange that all must take part in at
    once: shares may be of any length, and no device is waited for.

    Args:
        watch: in every process, told how much all of them have done, now and then.
    """

    def __init__(self, watch: Callable[[int], object] = lambda done: None) -> None:
        self.watch = watch
        self.rank, self.world_size = 0, 1
        self._store: Any = dist.HashStore()
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            own = self.first_says(uuid.uuid4().hex)  # no work before or after is mistaken for it
            self._store = dist.PrefixStore(f"shared_work/{own}", _get_default_store())

    def add(self, done: int) -> None:
        """Tell the others that so much more is done."""
        self.watch(self._store.add("done", done))

    @property
    def failed(self) -> bool:
        """Whether a process has given up: the others may as well stop."""
        return self._store.add("failed", 0) > 0

    def first_says(self, value: _T) -> _T:
        """The first process's value, in all."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the others.

        Raises:
            UserError: one of them raised it; of several, that of the first.
        """
        # Of any other error the process ends, and what started it ends the others.
        if error is not None and not isinstance(error, UserError):
            return
        if error is not None:
            self._store.set(f"error/{self.rank}", str(error))
            self._store.add("failed", 1)
        self._store.add("ended", 1)
        while self._store.add("ended", 0) < self.world_size:
            self.watch(self._store.add("done", 0))
            time.sleep(POLL_S)
        self.watch(self._store.add("done", 0))
        if not self.failed:
            return
        sentences = (f"error/{rank}" for rank in range(self.world_size))
        first = next(name for name in sentences if self._store.check([name]))
        raise UserError(self._store.get(first).decode()) from error
