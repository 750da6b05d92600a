"""Named arrays in one Arrow IPC file (Feather V2) that is read by memory map.

The file holds one row; every column is a list of that row, and the shape of the array is in the
field's metadata. Arrays of any length stand side by side so, opening costs nothing but the schema,
and processes that read the same file share its pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from odvla.errors import UserError

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Columns:
    """An open file: read-only arrays over its pages, and its metadata."""

    path: Path
    arrays: dict[str, NDArray[Any]]
    metadata: dict[str, str]


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def write_columns(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write arrays of numbers, truth values or byte strings; the file appears whole or not at all.

    What a killed writer left behind is overwritten.
    """
    columns, fields = [], []
    for name, values in arrays.items():
        flat = np.ascontiguousarray(values).reshape(-1)
        offsets = pa.array([0, len(flat)], type=pa.int64())
        columns.append(pa.LargeListArray.from_arrays(offsets, _arrow(flat)))
        facts = {"shape": json.dumps(values.shape), "dtype": values.dtype.str}
        fields.append(pa.field(name, columns[-1].type, metadata=facts))
    schema = pa.schema(fields, metadata=dict(metadata))
    partial = partial_path(path)
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def _arrow(flat: NDArray[Any]) -> pa.Array:
    """An Arrow array over the same memory."""
    if flat.dtype.kind == "b":
        return pa.array(flat.view(np.uint8))
    if flat.dtype.kind != "S":
        return pa.array(flat)
    width = pa.binary(flat.dtype.itemsize)
    # Bytes: numpy's strings have no buffer interface.
    return pa.Array.from_buffers(width, len(flat), [None, pa.py_buffer(flat.view(np.uint8))])


def open_columns(path: Path) -> Columns:
    """Map a file that write_columns wrote.

    Raises:
        UserError: it is missing, cut short or something else.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        arrays = {f.name: _numpy(f, batch.column(f.name)) for f in batch.schema}
    except (pa.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an index: {error}") from error
    facts = batch.schema.metadata or {}
    return Columns(path, arrays, {key.decode(): value.decode() for key, value in facts.items()})


def _numpy(field: pa.Field, column: pa.Array) -> NDArray[Any]:
    dtype = np.dtype(field.metadata[b"dtype"].decode())
    shape = tuple(json.loads(field.metadata[b"shape"]))
    data = column.values.buffers()[1]
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data if data is not None else b"", dtype, count).reshape(shape)
