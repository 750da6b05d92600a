"""Records by key-frame in two arrays and one text of bytes, which workers share.

A worker that looks at a Python object writes to it (its count of references), so that the page it
lies on becomes the worker's own: with every epoch, workers that were forked take more of what they
have inherited, up to all of it. Packed, 376,604 questions are one object.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_R = TypeVar("_R")


class PackedRecords(Mapping[int, tuple[_R, ...]], Generic[_R]):
    """Key-frame number -> its records, which are made anew whenever they are asked for.

    Shape legend: F key-frames that have records, K records.
    """

    def __init__(self, frames: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        self.frames = frames  # [F] ascending
        self.first = first  # [F + 1] the first record of each, and K
        self.starts = np.zeros(1, dtype=np.int64)  # [K + 1] in `packed`
        self.packed = b""

    @classmethod
    def of(cls, records: Mapping[int, tuple[_R, ...]]) -> PackedRecords[_R]:
        """Pack records; those that are packed stay as they are."""
        if isinstance(records, PackedRecords):
            return records
        frames = np.array(sorted(frame for frame, own in records.items() if own), dtype=np.int64)
        counts = [len(records[frame]) for frame in frames.tolist()]
        table = cls(frames, np.cumsum([0, *counts], dtype=np.int64))
        parts = [pickle.dumps(one, 5) for frame in frames.tolist() for one in records[frame]]
        table.starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        table.packed = b"".join(parts)
        return table

    def count(self, frame: int) -> int:
        """Records of a key-frame."""
        at = self._at(frame)
        return 0 if at is None else int(self.first[at + 1] - self.first[at])

    def record(self, frame: int, number: int) -> _R:
        """One record of a key-frame.

        Raises:
            KeyError: it has none.
            IndexError: it has fewer.
        """
        at = self._at(frame)
        if at is None:
            raise KeyError(frame)
        return self._unpacked(range(int(self.first[at]), int(self.first[at + 1]))[number])

    def __getitem__(self, frame: int) -> tuple[_R, ...]:
        """All records of a key-frame."""
        at = self._at(frame)
        if at is None:
            raise KeyError(frame)
        return tuple(map(self._unpacked, range(int(self.first[at]), int(self.first[at + 1]))))

    def __contains__(self, frame: object) -> bool:
        return isinstance(frame, int | np.integer) and self._at(int(frame)) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self.frames.tolist())

    def __len__(self) -> int:
        return len(self.frames)

    def _at(self, frame: int) -> int | None:
        at = int(np.searchsorted(self.frames, frame))
        return at if at < len(self.frames) and self.frames[at] == frame else None

    def _unpacked(self, place: int) -> _R:
        start, end = int(self.starts[place]), int(self.starts[place + 1])
        return pickle.loads(memoryview(self.packed)[start:end])
