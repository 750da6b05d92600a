"""Model weights on disk: safetensors, written whole or not at all, loaded strictly.

Tied parameters (a language model whose output layer is its embedding) are stored once.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from odvla.errors import UserError

_CHUNK = 1 << 22


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tied tensor under its first name only."""
    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    kept = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen[place] = name
        kept[name] = tensor
    return kept


def save_weights(model: nn.Module, path: Path) -> str:
    """Write all parameters and persistent buffers.

    Returns:
        SHA-256 of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in stored_tensors(model).items()
    }
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    save_file(tensors, partial)
    partial.replace(path)
    return file_sha256(path)


def load_weights(model: nn.Module, path: Path, parts: tuple[str, ...] = ()) -> None:
    """Fill a model; every tensor of the file and of the model is used exactly once.

    Args:
        model: what is filled.
        path: a safetensors file.
        parts: only these, by the first word of their tensors' names; the rest of the model stays
            as it is. (): all.

    Raises:
        UserError: the file is missing or damaged, or names or shapes differ.
    """
    if not path.is_file():
        raise UserError(f"the weights {path} do not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights {path} cannot be read: {error}") from error
    own = stored_tensors(model)
    if parts:
        own, tensors = (
            {name: tensor for name, tensor in every.items() if name.split(".")[0] in parts}
            for every in (own, tensors)
        )
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        problem = "lack" if missing else "hold"
        names = missing or unknown
        raise UserError(
            f"the weights {path} do not fit this model: they {problem} {names[0]!r}, which it "
            f"{'needs' if missing else 'does not have'} ({len(missing)} missing, "
            f"{len(unknown)} too many)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"the weights {path} do not fit this model: {name!r} has shape "
                f"{tuple(tensor.shape)}, the model wants {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
