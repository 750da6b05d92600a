"""TOD3Cap's captions as a Parquet file, converted once from the published JSON by streaming.

The JSON is 1.5 GB and several times that as Python objects. It is read one record at a time, every
record is checked, and batches of three texts a record (annotation token, sample token, caption)
are written to the cache folder. The table knows the size and time of the file it was made from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from datamodules.columns import partial_path
from datamodules.index_file import cache_folder
from datamodules.language_files import text_field
from odvla.errors import UserError

log = logging.getLogger(__name__)
BATCH = 4096  # records held in memory at a time
CHUNK = 1 << 18  # characters read at a time; a record has a few thousand
LONGEST = 1 << 22  # characters a record may have
SCHEMA_VERSION = "1"
COLUMNS = ("token", "sample_token", "caption")
Row = tuple[str, str, str]  # annotation token, sample token, final caption


def caption_rows(path: Path) -> Iterator[Row]:
    """Rows of a published caption file, through its table, which is made first if none fits.

    Raises:
        UserError: the file is missing, or a record does not fit; it names file, token and field.
    """
    table = ensure_table(path)
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(BATCH, columns=list(COLUMNS)):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def ensure_table(path: Path) -> Path:
    """The table of a caption file, made if there is none that fits.

    Raises:
        UserError: see caption_rows.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"language file {path} does not exist")
    name = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    table = cache_folder() / f"{path.stem}-{name}.parquet"
    # Whoever comes second waits, and finds the table made.
    with FileLock(Path(tempfile.gettempdir()) / f"odvla-captions-{name}.lock"):
        source = _source(path)
        if not _fits(table, source):
            log.info("converting %s to %s, once", path, table)
            table.parent.mkdir(parents=True, exist_ok=True)
            try:
                _convert(path, table, source)
            finally:
                partial_path(table).unlink(missing_ok=True)
    return table


def stream_records(path: Path) -> Iterator[Row]:
    """Checked records of the JSON, one at a time.

    Raises:
        UserError: it is not a JSON object of such records.
    """
    for token, record in _members(path):
        caption = text_field(record, "final_caption", path, token)
        yield token, text_field(record, "sample_token", path, token), caption


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON object, with no more than a few records in memory.

    Python's decoder rather than a streaming parser: velocities may be NaN, which is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        text = _Text(path, file)
        if text.peek() != "{":
            raise UserError(f"{path} must hold an object keyed by token")
        text.take("{")
        while text.peek() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise text.broken(f"expected a token, not {key!r}")
            text.take(":")
            yield key, text.value()
            if text.peek() != "}":
                text.take(",")
        text.take("}")
        if text.peek():
            raise text.broken("something follows the object")


class _Text:
    """A JSON text read in chunks; what was taken is forgotten."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.left, self.at = "", 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        try:
            chunk = self.file.read(CHUNK)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        self.left, self.at = self.left[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.left) and self.left[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.left):
                return self.left[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise self.broken(f"expected {expected!r}, not {found or 'its end'!r}")
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.left, self.at)
                return value
            except json.JSONDecodeError as error:
                # The record may only be cut by the chunk's end; a broken one is not read on for.
                if len(self.left) - self.at > LONGEST or not self.more():
                    raise self.broken(error.msg) from error

    def broken(self, reason: str) -> UserError:
        near = self.left[self.at : self.at + 40]
        return UserError(f"language file {self.path} is not JSON near {near!r}: {reason}")


def _source(path: Path) -> str:
    facts = path.stat()
    return json.dumps([SCHEMA_VERSION, facts.st_size, facts.st_mtime_ns])


def _fits(table: Path, source: str) -> bool:
    if not table.is_file():
        return False
    try:
        facts = pq.read_schema(table).metadata or {}
    except (pa.ArrowException, OSError):
        return False  # damaged: it is made anew
    return facts.get(b"source") == source.encode()


def _convert(path: Path, table: Path, source: str) -> None:
    schema = pa.schema([(name, pa.string()) for name in COLUMNS], metadata={"source": source})
    partial = partial_path(table)
    rows: list[Row] = []

    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:

        def flush() -> None:
            columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            rows.clear()

        for row in stream_records(path):
            rows.append(row)
            if len(rows) == BATCH:
                flush()
        if rows:
            flush()
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(table)
