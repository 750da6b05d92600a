"""Write tensors one after the other: a safetensors file, many of them with an index, or PyTorch's.

Of what is written to safetensors only one tensor is in memory at a time, of PyTorch's files one
shard. Whoever calls this writes into a place that is not the final one and renames it when all is
done (see convert.py): what has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

from odvla.checkpoints.reading import INDEX, SAFE_DTYPES
from odvla.checkpoints.stored import Stored
from odvla.errors import UserError

DEFAULT_SHARD_BYTES = 5 * 10**9  # as Hugging Face cuts them
_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in SAFE_DTYPES.items()}


def write_safetensors(path: Path, tensors: Stored) -> str:
    """Write one file.

    Returns:
        SHA-256 of it.
    """
    # Wide numbers first, so that every tensor starts where its numbers may.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        tensor = tensors[name]
        end = place + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _put(file, digest, len(text).to_bytes(8, "little") + text)
        for name in order:
            stored = tensors[name]
            values = stored.read().contiguous()
            assert (tuple(values.shape), values.dtype) == (stored.shape, stored.dtype), name
            _put(file, digest, values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(file: IO[bytes], digest: Any, content: bytes | memoryview) -> None:
    file.write(content)
    digest.update(content)


def write_torch_file(path: Path, tensors: Stored, *, wrapped: bool) -> None:
    """Write one PyTorch file; `wrapped`: as mmcv does, with a `state_dict` beside a `meta`."""
    values: OrderedDict[str, Any] = OrderedDict(
        (name, tensor.read().contiguous()) for name, tensor in tensors.items()
    )
    torch.save({"meta": {}, "state_dict": values} if wrapped else values, path)


def write_folder(
    folder: Path, stem: str, tensors: Stored, *, suffix: str = ".safetensors", limit: int
) -> dict[str, str]:
    """Write `<stem><suffix>`, or shards of at most `limit` bytes and their index.

    Returns:
        SHA-256 of each file of tensors by name ("" for PyTorch's).
    """
    shards = split(tensors, limit)
    names = [f"{stem}{suffix}"]
    if len(shards) > 1:
        names = [f"{stem}-{n:05}-of-{len(shards):05}{suffix}" for n in range(1, len(shards) + 1)]
    hashes = {}
    for name, shard in zip(names, shards, strict=True):
        if suffix == ".safetensors":
            hashes[name] = write_safetensors(folder / name, shard)
        else:
            write_torch_file(folder / name, shard, wrapped=False)
            hashes[name] = ""
    if len(shards) > 1:
        places = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{stem}{suffix}{INDEX}").write_text(json.dumps(index, indent=1))
    return hashes


def split(tensors: Stored, limit: int) -> list[Stored]:
    """Consecutive tensors of at most `limit` bytes together; a larger one is a shard of its own.

    Raises:
        UserError: no limit at all.
    """
    if limit < 1:
        raise UserError(f"a shard must have at least 1 byte, not {limit}")
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return list(shards)
