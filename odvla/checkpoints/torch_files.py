"""Tensors of PyTorch files (.pth, .pt, .bin), read without running anything that is in them.

Such a file holds a pickle: a small program that may name any function of any installed package and
call it. `torch.load(weights_only=True)` refuses those that it does not know, but it also refuses
the numpy scalars in the `meta` of checkpoints that mmcv wrote. Here a pickle gets stand-ins only:
tensors become StoredTensor (shape, type, place in the file), numpy's things become placeholders
without content, and whatever else it names ends the reading.

Two formats: since PyTorch 1.6 a zip with `data.pkl` and one file a storage; before that one stream
of five pickles and the storages behind them.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from odvla.checkpoints.stored import StoredTensor
from odvla.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
ZIP_START = b"PK\x03\x04"
_BLOCK = 1 << 22
# Where a state dict may be inside a checkpoint; mmcv uses the first.
STATE_DICTS = ("state_dict", "model", "module")
# What a pickle that is cut off or nonsense can raise on its way.
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


# -- what a pickle may name -------------------------------------------------------------------


class Ignored:
    """Stands for a value that nobody needs; takes whatever it is made of and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        """Without the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Without the state."""


class Named(dict):
    """Stands for an OrderedDict, whose attributes (`_metadata`) are left out."""

    def __setstate__(self, state: Any) -> None:
        """Without the attributes."""


@dataclass(frozen=True)
class StorageType:
    """Stands for torch.FloatStorage and the like."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], bytearray]


def _is_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    """Stands for torch's _rebuild_tensor: what does not lie within its storage is refused."""
    sound = (
        isinstance(storage, Storage)
        and _is_counts((offset,))
        and _is_counts(size)
        and _is_counts(stride)
        and len(size) == len(stride)
    )
    if not sound:
        raise pickle.UnpicklingError("a tensor without a storage or size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.numel:
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")

    def read() -> Tensor:
        if not math.prod(size):
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(storage.read(), dtype=storage.dtype)
        whole = math.prod(size) == storage.numel and _is_contiguous(size, stride)
        # A part of a storage is copied out of it, so that the rest need not be kept.
        return flat.view(size) if whole else flat.as_strided(size, stride, offset).clone()

    return StoredTensor(size, storage.dtype, read)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    """Stands for _rebuild_tensor_v3, whose storages are bytes."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage or type")
    count = storage.numel // dtype.itemsize
    return _tensor(Storage(dtype, count, storage.read), offset, size, stride)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    """Stands for torch's _rebuild_parameter."""
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, own in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and own != step:
            return False
        step *= n
    return True


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
_DTYPES = {name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)}
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
# (module, name) -> what a pickle gets for it. Everything that is not here is refused.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Named,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): Ignored,
    ("torch.storage", "UntypedStorage"): StorageType(torch.uint8),
    **{("torch", f"{name}Storage"): StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    ("numpy", "ndarray"): Ignored,
    ("numpy", "dtype"): Ignored,
    **{(module, name): Ignored for module in _NUMPY for name in ("_reconstruct", "scalar")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): Ignored for core in ("core", "_core")},
    ("_codecs", "encode"): Ignored,  # how old pickles write bytes
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, tuple, set, frozenset, complex)
    },
    **{(module, "bytearray"): Ignored for module in ("builtins", "__builtin__")},
}


class _Unpickler(pickle.Unpickler):
    """Gives a pickle the stand-ins that it may have."""

    def __init__(self, file: IO[bytes], path: Path, storage: Callable[[Any], Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self.path, self.storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(
                f"{self.path} names {module}.{name}, which weights do not need: the file was "
                "refused, and nothing in it was run"
            )
        return ALLOWED[module, name]

    def persistent_load(self, place: Any) -> Storage:
        return self.storage(place)


# -- the two formats --------------------------------------------------------------------------


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The state dict of a PyTorch file.

    Raises:
        UserError: the file is no such file, is cut off, names something that is not allowed, or
            holds no state dict.
    """
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    try:
        content = _read_zip(path) if start == ZIP_START else _read_stream(path)
    except UserError:
        raise
    except _BROKEN as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    return _state_dict(path, content)


def _read_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in entries:
        kind = "a TorchScript program" if roots else "a zip without PyTorch's data.pkl"
        raise UserError(f"{path} is {kind}, not a file of weights")
    root = roots[0]
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order != b"little":
        raise UserError(f"{path} was written on a big-endian machine, which is not supported")

    def storage(place: Any) -> Storage:
        kind, dtype_of, key, _, numel = place
        sound = kind == "storage" and isinstance(dtype_of, StorageType) and _is_counts((numel,))
        if not sound:
            raise pickle.UnpicklingError("a storage without a type or size")
        entry = entries.get(f"{root}data/{key}")
        size = numel * dtype_of.dtype.itemsize
        if entry is None or entry.file_size != size:
            raise pickle.UnpicklingError(f"storage {key} is not there or has another size")

        def read() -> bytearray:
            content = bytearray(size)
            try:
                with archive.open(entry) as file:  # checks the sum of the bytes, too
                    _fill(file, content)
            except _BROKEN as error:
                raise _damaged(path, f"storage {key}: {error}") from error
            return content

        return Storage(dtype_of.dtype, numel, read)

    with archive.open(f"{root}data.pkl") as file:
        return _Unpickler(file, path, storage).load()


def _read_stream(path: Path) -> Any:
    found: dict[str, tuple[torch.dtype, int]] = {}
    places: dict[str, int] = {}  # of each storage's first byte

    def storage(place: Any) -> Storage:
        kind, dtype_of, key, _, numel, *view = place
        sound = kind == "storage" and isinstance(dtype_of, StorageType) and _is_counts((numel,))
        if not sound or (view and view[0] is not None):
            raise pickle.UnpicklingError("a storage without a type or size, or a view of one")
        dtype = dtype_of.dtype
        found[key] = dtype, numel

        def read() -> bytearray:
            content = bytearray(numel * dtype.itemsize)
            with path.open("rb") as file:
                file.seek(places[key])
                _fill(file, content)
            return content

        return Storage(dtype, numel, read)

    def nothing(place: Any) -> NoReturn:
        raise pickle.UnpicklingError("a storage where none can be")

    with path.open("rb") as file:
        head = [_Unpickler(file, path, nothing).load() for _ in range(3)]
        if head[0] != MAGIC:
            raise UserError(f"{path} is no file of weights: neither PyTorch's nor safetensors")
        if head[1] != PROTOCOL or not isinstance(head[2], dict) or not head[2].get("little_endian"):
            raise UserError(f"{path} is of a format that is not supported (protocol {head[1]})")
        content = _Unpickler(file, path, storage).load()
        keys = _Unpickler(file, path, nothing).load()
        size = path.stat().st_size
        for key in keys:
            dtype, numel = found[key]
            (stored,) = struct.unpack("<q", file.read(8))
            places[key] = file.tell()
            file.seek(numel * dtype.itemsize, 1)
            if stored != numel or file.tell() > size:
                raise EOFError(f"storage {key} is cut off")
    if set(places) != set(found):
        raise EOFError("a storage is missing")
    return content


def _fill(file: IO[bytes], content: bytearray) -> None:
    """Read exactly as much as fits."""
    view, done = memoryview(content), 0
    while done < len(content):
        block = file.read(min(_BLOCK, len(content) - done))
        if not block:
            raise EOFError("the file ends early")
        view[done : done + len(block)] = block
        done += len(block)
    file.read(1)  # of a zip's entry: the sum is checked when the end is seen


def _state_dict(path: Path, content: Any) -> dict[str, StoredTensor]:
    if isinstance(content, Mapping):
        inner = [content[key] for key in STATE_DICTS if isinstance(content.get(key), Mapping)]
        tensors = inner[0] if inner else content
        wrong = [k for k, v in tensors.items() if not isinstance(v, StoredTensor)]
        if tensors and not wrong and all(isinstance(name, str) for name in tensors):
            return {
                name: StoredTensor(t.shape, t.dtype, t.read, path) for name, t in tensors.items()
            }
        if tensors and wrong and len(wrong) < len(tensors):
            raise UserError(f"{path} is no state dict: {wrong[0]!r} in it is no tensor")
    raise UserError(f"{path} holds no state dict, a dict of tensors by name")


def _damaged(path: Path, why: str) -> UserError:
    why = " ".join(why.split())
    return UserError(f"{path} cannot be read as a PyTorch file: it is cut off or damaged ({why})")
