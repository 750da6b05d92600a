"""From TOD3Cap's JSON to a table sorted by key-frame: part by part, going on after a kill.

Every PART_BYTES of the JSON become a part: a file that appears whole or not at all and knows which
bytes it was made of. Whoever begins anew keeps the parts that follow one another from the first
byte on and were made from the same JSON and index, and reads on behind the last one. When nothing
is left to be read, the captions of all parts are put in the order of the key-frames, and the parts
are deleted.

Shape legend, of a part or of all: K captions of the root's annotations, M captions of its samples
whose annotation it does not have, B records that do not fit.
"""

from __future__ import annotations

import json
import logging
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.caption_stream import BrokenRecord, CaptionStream, Row
from datamodules.columns import Columns, open_columns, partial_path, write_columns
from datamodules.records import Index
from odvla.errors import UserError

log = logging.getLogger(__name__)
BATCH = 4096  # records held in memory at a time
PART_BYTES = 1 << 26  # of the JSON: reading so much again is what a kill costs
DOUBLED = "its annotation has a second caption"
Broken = tuple[int, str, str]  # number of the record in the file, annotation token, problem


def convert(path: Path, index: Index, table: Path, facts: Mapping[str, str], allowed: int) -> None:
    """Write the table of a caption file; it appears whole or not at all.

    After a kill, the same call goes on behind the last whole part.

    Args:
        path: the published file.
        index: the root's.
        table: the file to write; parts lie in a folder beside it until it is there.
        facts: its metadata; "source" stands for everything that it is made from.
        allowed: so many records may not fit.

    Raises:
        UserError: the file is not JSON, or too many records do not fit. Whole parts are kept then,
            too: with a larger budget, the same file is not read from its start again.
    """
    folder = table.with_name(f".{table.name}.parts")
    parts = _whole_parts(folder, facts["source"])
    if parts:
        share = parts[-1].end / path.stat().st_size
        log.info("%.0f %% of %s were converted before; going on behind them", 100 * share, path)
    stream = CaptionStream(path, parts[-1].end if parts else 0)
    records = iter(stream)
    known = [one for part in parts for one in part.broken]
    placing = _Placing(index)
    part = _Gathered(stream.offset, parts[-1].records if parts else 0)
    while batch := list(islice(records, BATCH)):
        placing.add(batch, part)
        check_broken(path, [*known, *part.broken], allowed)
        if stream.offset - part.start >= PART_BYTES:
            parts.append(part.write(folder, len(parts), facts["source"], stream.offset))
            known += part.broken
            part = _Gathered(stream.offset, part.records)
    if stream.offset > part.start:
        parts.append(part.write(folder, len(parts), facts["source"], stream.offset))
    try:
        _join(path, index, parts, table, facts, allowed)
    finally:
        partial_path(table).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_broken(path: Path, found: Sequence[Broken], allowed: int) -> None:
    """Stop where more records do not fit than may.

    Args:
        path: the published file.
        found: those met so far.
        allowed: how many may.

    Raises:
        UserError: it names the first one.
    """
    if len(found) > allowed:
        _, token, problem = min(found)
        raise UserError(
            f"{path}, {token}: {problem}; it is the first of {len(found)} record(s) so far that do "
            "not fit, and data.<stage>.broken_captions (data describe: broken_captions, score: "
            f"--broken-captions) allows {allowed}"
        )


def broken_columns(found: Sequence[Broken]) -> dict[str, NDArray[Any]]:
    """Records that do not fit as arrays [B]."""
    return {
        "broken_place": np.array([place for place, _, _ in found], dtype=np.int32),
        "broken_token": _texts([token for _, token, _ in found]),
        "broken_problem": _texts([problem for _, _, problem in found]),
    }


def broken_records(columns: Columns) -> list[Broken]:
    """What `broken_columns` made arrays of."""
    found = columns.arrays
    names = (found[f"broken_{name}"].tolist() for name in ("place", "token", "problem"))
    return [(p, t.decode(), w.decode()) for p, t, w in zip(*names, strict=True)]


@dataclass(frozen=True)
class _Part:
    """The captions of some bytes of the JSON; [K] row, place and length, and their texts."""

    columns: Columns
    start: int  # byte of the file
    end: int
    records: int  # of the file up to its end
    elsewhere: int
    first_elsewhere: str
    broken: list[Broken]

    @classmethod
    def open(cls, file: Path, source: str) -> _Part | None:
        """A part that was made from `source`; None: it was not, or is damaged."""
        try:
            columns = open_columns(file)
        except UserError:
            return None
        facts = columns.metadata
        if facts.get("source") != source:
            return None
        start, end, records, elsewhere = json.loads(facts["counts"])
        broken = broken_records(columns)
        return cls(columns, start, end, records, elsewhere, facts["first_elsewhere"], broken)


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.arrow"


def _whole_parts(folder: Path, source: str) -> list[_Part]:
    """Parts that go on where the one before ends; whatever else lies in the folder is deleted."""
    parts: list[_Part] = []
    end = 0
    while part := _Part.open(_part_file(folder, len(parts)), source):
        if part.start != end:
            break
        parts.append(part)
        end = part.end
    kept = {part.columns.path for part in parts}
    for file in folder.glob("*") if folder.is_dir() else ():
        if file not in kept:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return parts


@dataclass
class _Gathered:
    """What is to become a part."""

    start: int  # byte of the file
    records: int  # of the file so far
    rows: list[NDArray[np.int32]] = field(default_factory=list)
    places: list[NDArray[np.int32]] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    missing: list[tuple[int, str]] = field(default_factory=list)  # frame, annotation token
    broken: list[Broken] = field(default_factory=list)
    elsewhere: int = 0
    first_elsewhere: str = ""

    def write(self, folder: Path, number: int, source: str, end: int) -> _Part:
        """Write it to a file."""
        arrays: dict[str, NDArray[Any]] = {
            "row": _joined(self.rows),
            "place": _joined(self.places),
            "length": np.array([len(text) for text in self.texts], dtype=np.int32),
            "text": np.frombuffer(b"".join(self.texts), dtype=np.uint8),
            "missing_frame": np.array([frame for frame, _ in self.missing], dtype=np.int32),
            "missing_token": _texts([token for _, token in self.missing]),
            **broken_columns(self.broken),
        }
        facts = {
            "source": source,
            "counts": json.dumps([self.start, end, self.records, self.elsewhere]),
            "first_elsewhere": self.first_elsewhere,
        }
        file = _part_file(folder, number)
        write_columns(file, arrays, facts)
        part = _Part.open(file, source)
        assert part is not None
        return part


class _Placing:
    """Finds the annotation and the key-frame of every record."""

    def __init__(self, index: Index) -> None:
        self.index = index
        # Sorted once: a token is then found without a Python dict of a million of them.
        tokens, order = index.annotations.token, index.arrays["annotation.by_token"]
        self.sorted_rows = np.asarray(order)
        self.sorted_tokens = tokens[self.sorted_rows]
        self.frames = np.append(index.annotations.frame, -1)  # row -1: no annotation, no frame
        samples = index.arrays["frame.token"].tolist()
        self.frame_of_sample = {token.decode(): k for k, token in enumerate(samples)}

    def add(self, batch: Sequence[Row | BrokenRecord], part: _Gathered) -> None:
        """Put records where they belong in a part."""
        tokens = [one.token if isinstance(one, BrokenRecord) else one[0] for one in batch]
        rows = self._rows_of(tokens)
        frames = self.frames[rows].tolist()
        kept = []
        for number, one in enumerate(batch):
            problem = ""
            if isinstance(one, BrokenRecord):
                problem = one.problem
            else:
                token, sample, caption = one
                frame = self.frame_of_sample.get(sample)
                if rows[number] >= 0 and frame != frames[number]:
                    belongs = self.index.frames[frames[number]].token
                    problem = (
                        f"sample_token is {sample!r}, but the annotation belongs to sample "
                        f"{belongs!r}"
                    )
                elif rows[number] >= 0:
                    part.texts.append(caption.encode())
                    kept.append(number)
                elif frame is not None:
                    part.missing.append((frame, token))
                else:
                    part.elsewhere += 1
                    part.first_elsewhere = part.first_elsewhere or token
            if problem:
                part.broken.append((part.records + number, tokens[number], problem))
        places = np.array(kept, dtype=np.int32)
        part.rows.append(rows[places])
        part.places.append(places + np.int32(part.records))
        part.records += len(batch)

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


def _join(
    path: Path,
    index: Index,
    parts: Sequence[_Part],
    table: Path,
    facts: Mapping[str, str],
    allowed: int,
) -> None:
    """Write the captions of all parts in the order of the key-frames."""
    rows, places, lengths = (
        _joined([part.columns.arrays[name] for part in parts])
        for name in ("row", "place", "length")
    )
    broken = [one for part in parts for one in part.broken]
    firsts = np.unique(rows, return_index=True)[1]
    for again in np.setdiff1d(np.arange(len(rows)), firsts, assume_unique=True).tolist():
        token = index.annotations.token[rows[again]].decode()
        broken.append((int(places[again]), token, DOUBLED))
    check_broken(path, broken, allowed)
    broken.sort()
    for _, token, problem in broken:
        log.warning("%s, %s: %s; it is left out", path, token, problem)
    kept = np.sort(firsts)
    frames = index.annotations.frame[rows[kept]]
    order = kept[np.argsort(frames, kind="stable")]
    count = np.bincount(frames, minlength=len(index.frames))
    with tempfile.TemporaryFile(dir=table.parent) as by_frame:
        _copy_in_order(parts, by_frame, order)
        arrays: dict[str, NDArray[Any]] = {
            "first": np.concatenate([[0], count.cumsum()]).astype(np.int64),
            "row": rows[order],
            "place": places[order],
            "text_end": lengths[order].cumsum(dtype=np.int64),
            "text": _mapped(by_frame),
            "missing_frame": _joined([part.columns.arrays["missing_frame"] for part in parts]),
            "missing_token": np.concatenate(
                [_texts([]), *(part.columns.arrays["missing_token"] for part in parts)]
            ),
            **broken_columns(broken),
        }
        told = [part.first_elsewhere for part in parts if part.first_elsewhere]
        elsewhere = {
            "elsewhere": str(sum(part.elsewhere for part in parts)),
            "first_elsewhere": told[0] if told else "",
        }
        write_columns(table, arrays, {**facts, **elsewhere})


def _copy_in_order(parts: Sequence[_Part], target: BinaryIO, order: NDArray[np.int64]) -> None:
    """Write the texts of all parts in another order.

    Args:
        parts: their captions are numbered through.
        target: the file.
        order: which comes when.
    """
    lengths = [part.columns.arrays["length"] for part in parts]
    starts = [each.cumsum(dtype=np.int64) - each for each in lengths]
    of_part = np.repeat(np.arange(len(parts)), [len(each) for each in lengths])
    length, start = _joined(lengths), np.concatenate([np.zeros(0, dtype=np.int64), *starts])
    texts = [part.columns.arrays["text"] for part in parts]
    for batch in _batches(order):
        pieces = (values[batch].tolist() for values in (of_part, start, length))
        target.write(
            b"".join(
                texts[part][at : at + size].tobytes()
                for part, at, size in zip(*pieces, strict=True)
            )
        )


def _batches(order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (order[k : k + BATCH] for k in range(0, len(order), BATCH))


def _joined(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts])


def _texts(texts: Sequence[str]) -> NDArray[np.bytes_]:
    encoded = [text.encode() for text in texts]
    return np.array(encoded, dtype=np.bytes_ if any(encoded) else "S1")


def _mapped(file: BinaryIO) -> NDArray[np.uint8]:
    """The bytes of a file, without reading them."""
    file.flush()
    if file.seek(0, 2) == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
