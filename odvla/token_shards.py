"""Tokens of key-frames on disk: what a TokenMemory holds, in files that outlive the process.

    <folder>/made_for.json                what the tokens were made with: a FeatureKey
    <folder>/<hash>.safetensors           a shard: the tokens of some hundred key-frames

A tensor of a shard is called <sample token>/<stream>/<field>. Shards are written whole or not at
all and named after their key-frames, so a process that is killed loses what it had not written yet,
and several may write side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from odvla.errors import UserError
from odvla.types import AgentPredictions, TokenSet
from odvla.weights import write_atomically

MADE_FOR = "made_for.json"
FORMAT = 1
FRAMES_A_SHARD = 256
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FeatureKey:
    """What tokens depend on, besides the key-frame: two keys share no folder."""

    vision_sha256: str  # weights of encoder and queries
    model: str  # config of encoder and queries, hashed
    images: str  # config of what is done to images, hashed
    data: str  # identity of the data root
    # How the past of a key-frame was shown ("scene", or "clip of N"), and how many rows at once:
    # the last bits of a row may depend on that.
    past: str
    rows: int
    precision: str
    format: int = FORMAT

    @property
    def folder_name(self) -> str:
        """A hash of everything."""
        return hashlib.sha256(self._text.encode()).hexdigest()[:24]

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    def claim(self, folder: Path) -> None:
        """Mark a folder as this key's.

        Raises:
            UserError: it is another's.
        """
        note = folder / MADE_FOR
        if note.is_file() and note.read_text() != self._text:
            raise UserError(
                f"the feature cache {folder} was made with other settings than {MADE_FOR} should "
                "name; delete the folder"
            )
        if not note.is_file():
            write_atomically(note, self._text.encode())


class TokenShards:
    """Rows of a TokenMemory in a folder; they are read when they are asked for.

    Args:
        folder: where they lie; made if need be.
        frames_a_shard: key-frames of a file.
    """

    def __init__(self, folder: Path, frames_a_shard: int = FRAMES_A_SHARD) -> None:
        self.folder = folder
        self.frames_a_shard = frames_a_shard
        self._files: dict[Path, Any] = {}  # open shards
        self._where: dict[str, tuple[Path, dict[str, tuple[str, ...]]]] = {}
        self._new: dict[str, dict[str, TokenSet]] = {}  # not written yet
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        """Number of key-frames."""
        return len(self._where) + len(self._new)

    def __contains__(self, token: object) -> bool:
        """Whether a key-frame's tokens are here."""
        return token in self._where or token in self._new

    def __getitem__(self, token: str) -> dict[str, TokenSet]:
        """Tokens of a key-frame by stream, one row, in main memory.

        Raises:
            KeyError: they are not here.
        """
        if token in self._new:
            return self._new[token]
        path, streams = self._where[token]
        file = self._files[path]
        return {
            stream: _unpacked(
                stream, {name: file.get_tensor(f"{token}/{stream}/{name}") for name in names}
            )
            for stream, names in streams.items()
        }

    def __setitem__(self, token: str, row: dict[str, TokenSet]) -> None:
        """Keep a key-frame's tokens, unless they are here; a full shard is written."""
        if token in self:
            return
        self._new[token] = {stream: tokens.to("cpu") for stream, tokens in row.items()}
        if len(self._new) >= self.frames_a_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._new:
            return
        tensors = {
            f"{token}/{stream}/{name}": tensor
            for token, row in self._new.items()
            for stream, tokens in row.items()
            for name, tensor in _packed(tokens).items()
        }
        name = hashlib.sha256("\n".join(self._new).encode()).hexdigest()[:24]
        path = self.folder / (name + SUFFIX)
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        save_file(tensors, partial)
        partial.replace(path)
        self._new = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in shards that were written since, by this process or another.

        Raises:
            UserError: one cannot be read.
        """
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"the feature cache's file {path} cannot be read ({error}); delete it, and "
                    "what it held is made again"
                ) from error
            self._files[path] = file
            found: dict[str, dict[str, tuple[str, ...]]] = {}
            for name in names:
                token, stream, field = name.rsplit("/", 2)
                streams = found.setdefault(token, {})
                streams[stream] = (*streams.get(stream, ()), field)
            self._where |= {token: (path, streams) for token, streams in found.items()}

    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self._files)


def _packed(tokens: TokenSet) -> dict[str, Tensor]:
    """A token set's tensors by name."""
    found: dict[str, Tensor | None] = {
        "feats": tokens.feats,
        "mask": tokens.mask,
        "query_index": tokens.query_index,
    }
    agents = tokens.predictions
    if isinstance(agents, AgentPredictions):
        found |= {
            "logits": agents.layer_logits[-1],
            "boxes": agents.layer_boxes[-1],
            "track_ids": agents.track_ids,
            "carried_from": agents.carried_from,
            "slots": agents.mask,
        }
    # Clones: rows of one batch may share memory, which safetensors refuses.
    return {
        name: tensor.detach().contiguous().clone()
        for name, tensor in found.items()
        if tensor is not None
    }


def _unpacked(stream: Any, tensors: dict[str, Tensor]) -> TokenSet:
    """The token set of `_packed`."""
    agents = None
    if "logits" in tensors:
        agents = AgentPredictions(
            layer_logits=(tensors["logits"],),
            layer_boxes=(tensors["boxes"],),
            track_ids=tensors["track_ids"],
            carried_from=tensors["carried_from"],
            mask=tensors.get("slots"),
        )
    index = tensors.get("query_index")
    return TokenSet(stream, tensors["feats"], tensors["mask"], agents, index)
