"""TOD3Cap's captions sorted by the key-frames of a root, in one memory-mapped file.

The published JSON is converted once (caption_conversion.py); what is written beside the texts are
the rows of the index's annotations and, for each key-frame, where its captions begin. Opening costs
nothing, the workers of a machine share the pages, and only captions that are asked for become
Python texts. The file knows the JSON (by size and time) and the index (by fingerprint) it was made
from.

Shape legend: F key-frames of the root, K captions of its annotations, M captions of its samples
whose annotation it does not have, B records that do not fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from datamodules.caption_conversion import Broken, broken_records, check_broken, convert
from datamodules.columns import Columns, open_columns
from datamodules.index_file import cache_folder
from datamodules.records import Index
from odvla.errors import UserError

log = logging.getLogger(__name__)
KIND = "odvla captions"
SCHEMA_VERSION = 2  # raised with every change of the arrays


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

    @property
    def broken(self) -> list[Broken]:
        """[B] number, token and problem of the records that do not fit, as in the file."""
        return broken_records(self.columns)

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


def ensure_table(path: Path, index: Index, *, broken: int = 0) -> Path:
    """The table of a caption file for a root, made if there is none that fits.

    Args:
        path: the published file.
        index: the root's.
        broken: so many records may not fit; each is named in the log, and left out.

    Raises:
        UserError: the file is missing or not JSON, or more records do not fit: a field is missing
            or of another kind, the sample is not that of the annotation, or the annotation has a
            caption already. It names file, token and field of the first one.
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
            convert(path, index, table, {"kind": KIND, "source": source}, broken)
    check_broken(path, open_table(table).broken, broken)
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
