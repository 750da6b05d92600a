"""TOD3Cap's captions sorted by the key-frames of a root, in one memory-mapped file.

The published JSON is streamed once; what is written beside the texts are the rows of the index's
annotations and, for each key-frame, where its captions begin. Opening costs nothing, the workers of
a machine share the pages, and only captions that are asked for become Python texts. The file knows
the JSON (by size and time) and the index (by fingerprint) it was made from.

Shape legend: F key-frames of the root, K captions of its annotations, M captions of its samples
whose annotation it does not have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from datamodules.caption_stream import Row, stream_records
from datamodules.columns import Columns, open_columns, partial_path, write_columns
from datamodules.index_file import cache_folder
from datamodules.records import Index
from odvla.errors import UserError

log = logging.getLogger(__name__)
BATCH = 4096  # records held in memory at a time
KIND = "odvla captions"
SCHEMA_VERSION = 1  # raised with every change of the arrays


@dataclass(frozen=True)
class CaptionTable:
    """All captions of a root's annotations, sorted by key-frame, then as in the file."""

    columns: Columns

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """[F + 1] the first caption of every key-frame."""
        return self.columns.arrays["first"]

    @property
    def row(self) -> NDArray[np.int32]:
        """[K] annotation row."""
        return self.columns.arrays["row"]

    @property
    def place(self) -> NDArray[np.int32]:
        """[K] number of the record in the published file."""
        return self.columns.arrays["place"]

    @property
    def frame(self) -> NDArray[np.int64]:
        """[K] key-frame number; made anew at every call."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @property
    def missing_frame(self) -> NDArray[np.int32]:
        """[M] key-frame number of captions without an annotation."""
        return self.columns.arrays["missing_frame"]

    @property
    def missing_token(self) -> NDArray[np.bytes_]:
        """[M] their annotation tokens."""
        return self.columns.arrays["missing_token"]

    @property
    def elsewhere(self) -> tuple[int, str]:
        """Captions of samples that the root does not have, and the first one's token."""
        facts = self.columns.metadata
        return int(facts["elsewhere"]), facts["first_elsewhere"]

    def text(self, number: int) -> str:
        """One caption."""
        ends = self.columns.arrays["text_end"]
        start = int(ends[number - 1]) if number else 0
        return self.columns.arrays["text"][start : int(ends[number])].tobytes().decode()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process maps the same file."""
        return open_table, (self.columns.path,)


def open_table(path: Path) -> CaptionTable:
    """Map a table that ensure_table made.

    Raises:
        UserError: it is missing or damaged.
    """
    return CaptionTable(open_columns(path))


def ensure_table(path: Path, index: Index) -> Path:
    """The table of a caption file for a root, made if there is none that fits.

    Raises:
        UserError: the file is missing, a record does not fit, or an annotation has two captions; it
            names file, token and field.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"language file {path} does not exist")
    key = f"{path}\n{index.root.resolve()}\n{index.version}"
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    table = cache_folder() / f"{path.stem}-{name}.arrow"
    # Whoever comes second waits, and finds the table made.
    with FileLock(Path(tempfile.gettempdir()) / f"odvla-captions-{name}.lock"):
        source = _source(path, index)
        if not _fits(table, source):
            log.info("converting %s to %s, once", path, table)
            table.parent.mkdir(parents=True, exist_ok=True)
            try:
                _Conversion(path, index).write(table, source)
            finally:
                partial_path(table).unlink(missing_ok=True)
    return table


def _source(path: Path, index: Index) -> str:
    facts = path.stat()
    assert index.file is not None
    of_index = open_columns(index.file).metadata["fingerprint"]
    return json.dumps([SCHEMA_VERSION, facts.st_size, facts.st_mtime_ns, of_index])


def _fits(table: Path, source: str) -> bool:
    if not table.is_file():
        return False
    try:
        facts = open_columns(table).metadata
    except UserError:
        return False  # damaged: it is made anew
    return facts.get("kind") == KIND and facts.get("source") == source


class _Conversion:
    """Streams the JSON; texts go to a temporary file, a few numbers a caption stay in memory."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        # Sorted once: a token is then found without a Python dict of a million of them.
        tokens, order = index.annotations.token, index.arrays["annotation.by_token"]
        self.sorted_rows = np.asarray(order)
        self.sorted_tokens = tokens[self.sorted_rows]
        self.frames = np.append(index.annotations.frame, -1)  # row -1: no annotation, no frame
        samples = index.arrays["frame.token"].tolist()
        self.frame_of_sample = {token.decode(): k for k, token in enumerate(samples)}
        self.rows: list[NDArray[np.int32]] = []
        self.places: list[NDArray[np.int32]] = []
        self.lengths: list[NDArray[np.int32]] = []
        self.missing: list[tuple[int, str]] = []  # frame, annotation token
        self.elsewhere, self.first_elsewhere = 0, ""

    def write(self, table: Path, source: str) -> None:
        with (
            tempfile.TemporaryFile(dir=table.parent) as texts,
            tempfile.TemporaryFile(dir=table.parent) as by_frame,
        ):
            records = stream_records(self.path)
            done = 0
            while batch := list(islice(records, BATCH)):
                self._add(batch, done, texts)
                done += len(batch)
            rows, places, lengths = (_joined(p) for p in (self.rows, self.places, self.lengths))
            self._refuse_doubled(rows)
            frames = self.index.annotations.frame[rows]
            order = np.argsort(frames, kind="stable")
            _copy_in_order(texts, by_frame, lengths, order)
            count = np.bincount(frames, minlength=len(self.index.frames))
            tokens = [token.encode() for _, token in self.missing]
            arrays: dict[str, NDArray[Any]] = {
                "first": np.concatenate([[0], count.cumsum()]).astype(np.int64),
                "row": rows[order],
                "place": places[order],
                "text_end": lengths[order].cumsum(dtype=np.int64),
                "text": _mapped(by_frame),
                "missing_frame": np.array([frame for frame, _ in self.missing], dtype=np.int32),
                "missing_token": np.array(tokens, dtype=np.bytes_ if tokens else "S1"),
            }
            facts = {
                "kind": KIND,
                "source": source,
                "elsewhere": str(self.elsewhere),
                "first_elsewhere": self.first_elsewhere,
            }
            write_columns(table, arrays, facts)

    def _add(self, batch: list[Row], done: int, texts: BinaryIO) -> None:
        rows = self._rows_of([token for token, _, _ in batch])
        frames = self.frames[rows].tolist()
        kept, lengths = [], []
        for number, (token, sample, caption) in enumerate(batch):
            frame = self.frame_of_sample.get(sample)
            if rows[number] >= 0:
                if frame != frames[number]:
                    raise UserError(
                        f"{self.path}, {token}: sample_token is {sample!r}, but the annotation "
                        f"belongs to sample {self.index.frames[frames[number]].token!r}"
                    )
                text = caption.encode()
                texts.write(text)
                kept.append(number)
                lengths.append(len(text))
            elif frame is not None:
                self.missing.append((frame, token))
            else:
                self.elsewhere += 1
                self.first_elsewhere = self.first_elsewhere or token
        places = np.array(kept, dtype=np.int32)
        self.rows.append(rows[places])
        self.places.append(places + np.int32(done))
        self.lengths.append(np.array(lengths, dtype=np.int32))

    def _rows_of(self, tokens: list[str]) -> NDArray[np.int32]:
        """Annotation rows of tokens, -1 where there is none."""
        known = self.sorted_tokens
        if not len(known):
            return np.full(len(tokens), -1, dtype=np.int32)
        encoded = [token.encode() for token in tokens]
        # A token that is too long for the table would be cut, and might then fit.
        fitting = [token if len(token) <= known.itemsize else b"" for token in encoded]
        wanted = np.array(fitting, dtype=known.dtype)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        found = (known[at] == wanted) & (wanted != b"")
        return np.where(found, self.sorted_rows[at], -1).astype(np.int32)

    def _refuse_doubled(self, rows: NDArray[np.int32]) -> None:
        ordered = np.sort(rows)
        doubled = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(doubled):
            token = self.index.annotations.token[doubled[0]].decode()
            raise UserError(
                f"{self.path}, {token}: {len(doubled)} annotation(s) have a second caption, this "
                "is the first"
            )


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts])


def _mapped(file: BinaryIO) -> NDArray[np.uint8]:
    """The bytes of a file, without reading them."""
    file.flush()
    if file.seek(0, 2) == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _copy_in_order(
    source: BinaryIO, target: BinaryIO, lengths: NDArray[np.int32], order: NDArray[np.int64]
) -> None:
    """Texts that stand one after the other in `source` in another order."""
    starts = lengths.cumsum(dtype=np.int64) - lengths
    data = _mapped(source)
    for batch in _batches(order):
        pieces = zip(starts[batch].tolist(), lengths[batch].tolist(), strict=True)
        target.write(b"".join(data[start : start + length].tobytes() for start, length in pieces))


def _batches(order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (order[k : k + BATCH] for k in range(0, len(order), BATCH))
