"""Open a checkpoint as it comes: one file or many, safetensors or PyTorch's, a folder or an index.

Nothing is read but names, shapes and types until a tensor is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odvla.checkpoints.stored import StoredTensor
from odvla.checkpoints.torch_files import ZIP_START, read_torch_file
from odvla.errors import UserError

# What a folder is looked through for, in this order: our own, then Hugging Face's.
STEMS = ("vla", "model", "pytorch_model")
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
REOPEN_BYTES = 1 << 28
SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint."""

    path: Path  # as it was named
    files: tuple[Path, ...]  # that hold tensors
    format: str  # "safetensors", "PyTorch zip" or "PyTorch before 1.6"
    tensors: dict[str, StoredTensor]  # in the order of the files

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.files[0].parent


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a file, a folder as Hugging Face or this project lays it out, or an index of shards.

    Raises:
        UserError: there is nothing of the kind, a file is damaged or not safe to read, a shard is
            missing, or two shards hold a tensor of the same name.
    """
    if path.is_dir():
        found = _in_folder(path)
    elif path.is_file():
        found = path
    else:
        raise UserError(f"the checkpoint {path} does not exist")
    if isinstance(found, list):
        files = found
    elif found.name.endswith(INDEX):
        return _indexed(path, found)
    else:
        files = [found]
    return _opened(path, files)


def _in_folder(folder: Path) -> Path | list[Path]:
    """The file, index or shards that a folder is about."""
    for stem in STEMS:
        for suffix in (".safetensors", ".bin"):
            for name in (f"{stem}{suffix}{INDEX}", f"{stem}{suffix}"):
                if (folder / name).is_file():
                    return folder / name
    shards = sorted(file for file in folder.iterdir() if _SHARD.fullmatch(file.name))
    if shards:
        return _complete(shards)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "nothing of the kind"
        raise UserError(f"{folder} is no checkpoint: it holds {names}; name one file")
    return files[0]


def _complete(shards: list[Path]) -> list[Path]:
    """Shards without an index: all of one set must be there."""
    parts = [_SHARD.fullmatch(shard.name) for shard in shards]
    first = parts[0]
    assert first is not None
    stem, _, count, suffix = first.groups()
    names = [f"{stem}-{n:05}-of-{count}{suffix}" for n in range(1, int(count) + 1)]
    missing = [name for name in names if not (shards[0].parent / name).is_file()]
    if missing:
        raise UserError(f"the shard {shards[0].parent / missing[0]} is missing")
    if len(names) != len(shards):
        raise UserError(f"{shards[0].parent} holds shards of more than one checkpoint; name one")
    return shards


def _indexed(path: Path, index: Path) -> Checkpoint:
    """Shards that an index lists, tensor by tensor."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        sound = places and all(isinstance(n, str) for pair in places.items() for n in pair)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, AttributeError, TypeError):
        sound, places = False, {}
    if not sound:
        raise UserError(f"the index {index} is not JSON with a weight_map from tensors to files")
    names = list(dict.fromkeys(places.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"the index {index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise UserError(f"the index {index} names the shard {name}, which is missing")
    opened = _opened(path, [index.parent / name for name in names])
    for name, shard in places.items():
        if name not in opened.tensors or opened.tensors[name].file != index.parent / shard:
            raise UserError(f"the index {index} has {name!r} in {shard}, which does not hold it")
    stray = [name for name in opened.tensors if name not in places]
    if stray:
        raise UserError(f"the index {index} does not list {stray[0]!r}, which a shard holds")
    return opened


def _opened(path: Path, files: Iterable[Path]) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    formats: list[str] = []
    for file in files:
        kind, content = open_file(file)
        formats.append(kind)
        for name, tensor in content.items():
            if name in tensors:
                raise UserError(f"{name!r} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return Checkpoint(path, tuple(files), formats[0], tensors)


def open_file(path: Path) -> tuple[str, dict[str, StoredTensor]]:
    """The format of one file, told by its first bytes, and what it holds.

    Raises:
        UserError: see open_checkpoint.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the weights; fetch them first")
    # First, as the length that such a file starts with may look like anything.
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors", _read_safetensors(path)
    if start.startswith(ZIP_START):
        return "PyTorch zip", read_torch_file(path)
    if start.startswith(b"\x80"):
        return "PyTorch before 1.6", read_torch_file(path)
    raise UserError(f"{path} is no file of weights: neither PyTorch's nor safetensors")


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    unknown = [name for name, dtype in dtypes.items() if dtype not in SAFE_DTYPES]
    if unknown:
        name = unknown[0]
        raise UserError(f"{path}: {name!r} has numbers of type {dtypes[name]}, not supported")

    file = _SafetensorsFile(path)
    return {
        name: StoredTensor(shape, SAFE_DTYPES[dtypes[name]], partial(file.read, name), path)
        for name, shape in shapes.items()
    }


class _SafetensorsFile:
    """Reads one tensor after another.

    To open the file takes milliseconds where it holds thousands of tensors, and what was read of an
    open file stays in memory: so it is opened anew now and then.

    Args:
        path: a file that was checked before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._read_bytes = 0

    def read(self, name: str) -> Tensor:
        """A tensor by its name.

        Raises:
            UserError: the file has been damaged meanwhile.
        """
        try:
            if self._file is None or self._read_bytes > REOPEN_BYTES:
                self._file, self._read_bytes = safe_open(self.path, "pt"), 0
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        self._read_bytes += tensor.nbytes
        return tensor


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as safetensors: it is cut off or damaged ({error})")
