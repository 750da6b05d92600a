"""Reading a directory of arrays recorded from the reference, and comparing with them.

A case is a file `<stem>.safetensors` with `in/...`, `out/...` and sometimes `weight/...` tensors,
and `<stem>.json` with the settings that the reference's modules were built with.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from odvla.errors import UserError

Kind = Literal["activation", "loss", "gradient", "index", "gradient as a whole"]
# Largest difference allowed, relative to the largest magnitude in the reference's array (and
# never less than relative to 1); "as a whole": length of the difference, relative to the length of
# the reference's array.
TOLERANCE: dict[Kind, float] = {
    "activation": 1e-4,
    "loss": 1e-4,
    "gradient": 1e-3,
    "index": 0.0,
    "gradient as a whole": 1e-3,
}
SHARED_WEIGHTS = ("uniad_small_weights_img", "uniad_small_weights_rest")


@dataclass(frozen=True)
class Check:
    """One array of ours beside the reference's."""

    name: str
    ours: Tensor
    theirs: Tensor
    kind: Kind = "activation"
    # More that is allowed, because rounding decides so much; measured by who makes the check.
    slack: float = 0.0

    @property
    def absolute(self) -> float:
        """Largest absolute difference; infinite where shapes differ or a value is not finite."""
        if self.ours.numel() != self.theirs.numel():
            return float("inf")
        if self.ours.numel() == 0:
            return 0.0
        ours, theirs = (t.detach().double().flatten() for t in (self.ours, self.theirs))
        difference = (ours - theirs).abs().max()
        return float(difference) if bool(difference.isfinite()) else float("inf")

    @property
    def relative(self) -> float:
        """The absolute difference over the reference's largest magnitude, or over 1."""
        if self.theirs.numel() == 0 or not math.isfinite(self.absolute):
            return self.absolute
        if self.kind == "gradient as a whole":
            return distance(self.ours, self.theirs)
        return self.absolute / max(1.0, float(self.theirs.double().abs().max()))

    @property
    def passed(self) -> bool:
        """Within the tolerance of its kind."""
        return self.relative <= TOLERANCE[self.kind] + self.slack


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Length of the difference of two arrays over the length of the second (or over 1)."""
    a, b = ours.detach().double().flatten(), theirs.detach().double().flatten()
    return float((a - b).norm()) / max(1.0, float(b.norm()))


class Golden:
    """A golden directory.

    Args:
        folder: where index.json lies.

    Raises:
        UserError: there is no index.json, or it lists nothing by file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "index.json").is_file():
            raise UserError(f"{folder} is not a directory of recordings: it has no index.json")
        self._listed = tuple(self.facts("index"))

    def absent(self) -> list[str]:
        """Names of the files that index.json lists and that are not there."""
        return sorted(name for name in self._listed if not (self.folder / name).is_file())

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """All arrays of a file.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / f"{stem}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"the recording {path} cannot be read: {error}") from error

    def has(self, stem: str) -> bool:
        """Whether there are settings or results of this name."""
        return (self.folder / f"{stem}.json").is_file()

    def arrays(self, stem: str) -> dict[str, Tensor]:
        """All arrays of a file of numpy's.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / f"{stem}.npz"
        try:
            with np.load(path, allow_pickle=False) as content:
                return {name: torch.from_numpy(content[name]) for name in content.files}
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:
            raise UserError(f"the recording {path} cannot be read: {error}") from error

    def facts(self, stem: str) -> dict[str, Any]:
        """Settings of a case.

        Raises:
            UserError: the file is missing or not JSON, or holds no object.
        """
        return self._json(stem, dict, "object")

    def rows(self, stem: str) -> list[Any]:
        """What a case lists.

        Raises:
            UserError: the file is missing or not JSON, or holds no list.
        """
        return self._json(stem, list, "list")

    def _json(self, stem: str, kind: type, name: str) -> Any:
        path = self.folder / f"{stem}.json"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:  # not UTF-8, or not JSON
            raise UserError(f"the recording {path} cannot be read: {error}") from error
        if not isinstance(content, kind):
            raise UserError(f"the recording {path} holds no {name} but {content!r:.40}")
        return content

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the small model that several cases share, by the reference's names."""
        return {
            name.removeprefix("weight/"): tensor
            for stem in SHARED_WEIGHTS
            for name, tensor in self.tensors(stem).items()
        }


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def checks(ours: dict[str, Tensor], theirs: dict[str, Tensor], kind: Kind) -> Iterator[Check]:
    """Compare arrays of the same names."""
    for name, tensor in ours.items():
        yield Check(name, tensor, theirs[name], kind)


def as_bool(tensor: Tensor) -> Tensor:
    """Recorded truth values (uint8) as bool."""
    return tensor.to(torch.bool)
