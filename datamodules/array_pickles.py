"""Pickles of numbers, texts, containers and numpy arrays, read without running any code of theirs.

A pickle from the internet may run any code when it is loaded. The unpickler here makes builtins and
numpy arrays only, and refuses the rest by name before it is called. Tensors are told apart because
readers of the files at hand allow for them: they become arrays.

Files are written record by record, so that nobody has to hold all records in memory.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.columns import partial_path
from odvla.errors import UserError

# What the pickle of numpy arrays and builtins names; everything else is refused.
ALLOWED = (
    {
        (module, name)
        for module in ("builtins", "__builtin__")  # as protocols 0 to 2 call it
        for name in ("set", "frozenset", "slice", "complex", "bytearray")
    }
    | {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.multiarray", "scalar"),
            (f"{package}.numeric", "_frombuffer"),
        )
    }
    | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    | {("collections", "OrderedDict")}
)
# Every Python 3 reads protocol 3; the reference runs on 3.8.
PROTOCOL = 3


class _RefusedError(Exception):
    """The pickle names something that is not allowed."""


class _ArrayUnpickler(pickle.Unpickler):
    # Functions that stand in for those of that name.
    instead: dict[tuple[str, str], Callable[..., Any]] = {}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.instead:
            return self.instead[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _array_of_tensor
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_of_bytes
        if (module, name) not in ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def _storage_of_bytes(content: bytes) -> Any:
    """The numbers of a tensor, a pickle inside the pickle; torch's own restricted unpickler."""
    import torch

    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _RefusedError("something inside a tensor that torch refuses") from error


def _array_of_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    import torch

    tensor = torch.empty(0, dtype=storage.dtype)
    return tensor.set_(storage, offset, size, stride).numpy()


def load_arrays(path: Path) -> Any:
    """Unpickle a file that may hold only builtins, numpy arrays and tensors (which become arrays).

    Raises:
        UserError: the file is missing, broken, or names anything else.
    """
    return _load(path, _ArrayUnpickler)


class PackedBits:
    """An array of which only is kept where it is not zero, bit by bit.

    It stands where the pickle has an array, and packs what it is given at once: a file of rasters
    of any type of number takes an eighth of a byte a cell.
    """

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.bits = np.zeros(0, dtype=np.uint8)

    @classmethod
    def of(cls, values: NDArray[Any]) -> PackedBits:
        """Pack an array of numbers.

        Raises:
            ValueError: it holds no numbers.
        """
        if values.dtype.kind not in "biuf":
            raise ValueError(f"an array of {values.dtype} where cells were expected")
        packed = cls()
        packed.shape, packed.bits = values.shape, np.packbits(values != 0)
        return packed

    def __setstate__(self, state: Any) -> None:
        plain = np.empty(0)
        plain.__setstate__(state)
        self.__dict__.update(PackedBits.of(plain).__dict__)

    def unpacked(self) -> NDArray[np.bool_]:
        """The cells, True where they are not zero."""
        count = int(np.prod(self.shape))
        return np.unpackbits(self.bits, count=count).reshape(self.shape).astype(bool)


class _PackingUnpickler(_ArrayUnpickler):
    instead = {
        (f"{package}.multiarray", "_reconstruct"): PackedBits
        for package in ("numpy.core", "numpy._core")
    } | {
        (f"{package}.numeric", "_frombuffer"): lambda buffer, dtype, shape, order: PackedBits.of(
            np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)
        )
        for package in ("numpy.core", "numpy._core")
    }  # fmt: skip


def load_packed(path: Path) -> Any:
    """Unpickle a file like load_arrays does, with PackedBits where it has arrays.

    A file that `write_dict` wrote is read a record at a time; of others, pickle keeps everything
    until the end.

    Raises:
        UserError: as load_arrays.
    """
    return _load(path, _PackingUnpickler)


def _load(path: Path, unpickler: type[_ArrayUnpickler]) -> Any:
    try:
        with path.open("rb") as file:
            return unpickler(file).load()
    except FileNotFoundError as error:
        raise UserError(f"the pickle file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise UserError(f"{path} asks for more memory than there is: {error}") from error
    except _RefusedError as error:
        raise UserError(f"{path} is refused: it names {error}, where only arrays may be") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        ImportError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} is not a whole pickle file: {error}") from error


def write_dict(path: Path, items: Iterable[tuple[str, Any]]) -> int:
    """Write a pickled dict, item by item; the file appears whole or not at all.

    Returns:
        How many items it has.
    """
    count = 0
    with _whole(path) as file:
        file.write(pickle.EMPTY_DICT)
        for key, value in items:
            file.write(_part(key) + _part(value) + pickle.SETITEM)
            count += 1
    return count


def write_infos(path: Path, infos: Iterable[Any], metadata: dict[str, str]) -> int:
    """Write a pickled {"infos": [...], "metadata": metadata}, info by info, as write_dict does.

    Returns:
        How many infos it has.
    """
    count = 0
    with _whole(path) as file:
        file.write(pickle.EMPTY_DICT + _part("infos") + pickle.EMPTY_LIST)
        for info in infos:
            file.write(_part(info) + pickle.APPEND)
            count += 1
        file.write(pickle.SETITEM + _part("metadata") + _part(metadata) + pickle.SETITEM)
    return count


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A pickle that gets its name when it is complete; nothing is left of one that is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(pickle.PROTO + bytes([PROTOCOL]))
            yield file
            file.write(pickle.STOP)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _part(value: Any) -> bytes:
    """The instructions that put a value on the unpickler's stack.

    A whole pickle without its first two bytes (the protocol) and its last (stop). What it remembers
    by number is overwritten by the next part: a reader's memory does not grow.
    """
    return pickle.dumps(value, protocol=PROTOCOL)[2:-1]
