"""UniAD's and OpenDriveVLA's checkpoints into ours, every tensor accounted for.

A converted checkpoint is a folder:

    vla.safetensors        our names (or vla-00001-of-0000N.safetensors and an index)
    unused.safetensors     what our model never reads, under its old names, for the way back
    weights.json           where it all comes from, and what the names here do not tell
    source_files/          the configuration and tokenizer that lay beside the source

A tensor is mapped with its shape checked, or deliberately unused with a reason, or it stops the
conversion. Values are never touched: the way there and back (export.py) gives the same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from odvla.checkpoints.reading import STEMS, Checkpoint, open_checkpoint
from odvla.checkpoints.sizes import EMBEDDING, HEAD, Shapes, Sizes, sizes_of
from odvla.checkpoints.stored import Stored, StoredTensor
from odvla.checkpoints.writing import DEFAULT_SHARD_BYTES, write_folder, write_safetensors
from odvla.errors import UserError
from odvla.weight_names import LAYOUTS, OPENDRIVEVLA, Layout, Renamed, component_of
from odvla.weights import file_sha256

NOTE, UNUSED_FILE, SOURCE_FILES = "weights.json", "unused.safetensors", "source_files"
FORMAT = 1
# What lies beside the weights in a folder of Hugging Face's, and is text.
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What BatchNorm keeps besides its parameters; the last one counts in whole numbers.
COUNTER = ".num_batches_tracked"
STATISTICS = (".running_mean", ".running_var", COUNTER)
# How a checkpoint stores a language model's output layer.
HEAD_ABSENT, HEAD_COPY, HEAD_OWN = "absent: it is the embedding", "a copy of the embedding", "own"


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    out: Path
    components: dict[str, tuple[int, int]]  # tensors and parameters of each part of the model
    sizes: Sizes
    unused: dict[str, str] = field(default_factory=dict)  # name and reason, kept for the way back
    absent: tuple[str, ...] = ()  # names the target's own code has and that are not written
    left_out: dict[str, int] = field(default_factory=dict)  # our components it has no place for
    notes: tuple[str, ...] = ()  # sentences for the user


def import_weights(
    source: Path,
    layout: Layout,
    out: Path,
    *,
    limit: int = DEFAULT_SHARD_BYTES,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Report:
    """Convert a checkpoint of another project into a folder of ours.

    Args:
        source: its file, folder or index.
        layout: whose it is.
        out: folder to make; it must not be there yet, or be empty.
        limit: bytes a file of weights.
        extra: what else to write beside the weights: file name -> what writes it.

    Raises:
        UserError: the checkpoint cannot be read, or a tensor in it is unknown, missing, of a shape
            that does not fit the others, or holds anything but finite floating-point numbers.
    """
    checkpoint = open_checkpoint(source)
    renamed = layout.to_ours(checkpoint.tensors)
    _refuse_unknown(checkpoint, layout, renamed)
    original = _originals(checkpoint, renamed)
    ours = {new: checkpoint.tensors[old] for old, new in renamed.names.items()}
    head = untie(ours) if layout is OPENDRIVEVLA else None
    sizes = check_shapes(ours, layout, source, original)
    ours = {
        name: tensor if name.endswith(COUNTER) else _finite(tensor, f"{source}: {original[name]!r}")
        for name, tensor in ours.items()
    }
    unused = {name: checkpoint.tensors[name] for name in renamed.unused}
    back = layout.to_theirs(ours).names
    note: dict[str, Any] = {
        "format": FORMAT,
        "source": {
            "layout": layout.name,
            "format": checkpoint.format,
            "sha256": {file.name: file_sha256(file) for file in checkpoint.files},
        },
        "output_layer": head,
        # Names that differ from those the way back would give.
        "spelled": {new: old for new, old in original.items() if back.get(new, old) != old},
        "unused": renamed.unused,
    }
    with made_whole(out) as folder:
        note["sha256"] = write_folder(folder, STEMS[0], ours, limit=limit)
        if unused:
            note["sha256"][UNUSED_FILE] = write_safetensors(folder / UNUSED_FILE, unused)
        kept = beside(checkpoint.folder) if source != checkpoint.files[0] else {}
        if kept and layout is OPENDRIVEVLA:
            (folder / SOURCE_FILES).mkdir()
            for name, file in kept.items():
                shutil.copyfile(file, folder / SOURCE_FILES / name)
        for name, write in (extra or {}).items():
            write(folder / name)
        (folder / NOTE).write_text(json.dumps(note, indent=1))
    return Report(out, count(ours), sizes, unused=renamed.unused)


def _refuse_unknown(checkpoint: Checkpoint, layout: Layout, renamed: Renamed) -> None:
    if not renamed.unknown:
        return
    known = {other.name: len(other.to_ours(checkpoint.tensors).names) for other in LAYOUTS.values()}
    best = max(known, key=lambda name: known[name])
    hint = ""
    if best != layout.name and known[best] > len(renamed.names):
        hint = f"; it looks like {LAYOUTS[best].title} (--from {best})"
    raise UserError(
        f"{checkpoint.path} holds {renamed.unknown[0]!r}, which is no weight of {layout.title} "
        f"({len(renamed.unknown)} unknown of {len(checkpoint.tensors)}){hint}"
    )


def _originals(checkpoint: Checkpoint, renamed: Renamed) -> dict[str, str]:
    """Old name of each of our names."""
    original: dict[str, str] = {}
    for old, new in renamed.names.items():
        if new in original:
            raise UserError(f"{checkpoint.path} holds both {original[new]!r} and {old!r}: one name")
        original[new] = old
    return original


def untie(ours: dict[str, StoredTensor]) -> str:
    """Leave out an output layer that is the embedding once more, as our files do.

    Returns:
        How the checkpoint had it: HEAD_ABSENT, HEAD_COPY or HEAD_OWN.
    """
    head, embedding = ours.get(HEAD), ours.get(EMBEDDING)
    if head is None:
        return HEAD_ABSENT
    if embedding is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return HEAD_OWN
    if not torch.equal(_bytes(head), _bytes(embedding)):
        return HEAD_OWN
    del ours[HEAD]
    return HEAD_COPY


def _finite(tensor: StoredTensor, name: str) -> StoredTensor:
    """A tensor whose values are looked at when they are read: a checkpoint is read once."""

    def read() -> torch.Tensor:
        values = tensor.read()
        if not bool(values.isfinite().all()):
            raise UserError(f"{name} holds values that are not finite")
        return values

    return replace(tensor, read=read)


def _bytes(tensor: StoredTensor) -> torch.Tensor:
    return tensor.read().contiguous().reshape(-1).view(torch.uint8)


def check_shapes(
    ours: Stored, layout: Layout | None, source: Path, original: Mapping[str, str]
) -> Sizes:
    """Hold every name, shape and type against the modules that will read them.

    Args:
        ours: tensors under our names.
        layout: whose model must be whole; None: any parts will do, each of them whole.
        source: for messages.
        original: our names -> what they are called in the source.

    Raises:
        UserError: naming the first tensor that is missing, too many, of another shape or not of
            floating-point numbers.
    """

    def name_of(name: str) -> str:
        theirs = layout.to_theirs([name]).names if layout else {}
        return original.get(name, theirs.get(name, name))

    if layout is not None:
        parts = {component_of(name) for name in ours}
        absent = [component for component in layout.components if component not in parts]
        if absent:
            raise UserError(f"{source} holds nothing of {absent[0]}, so it is no {layout.title}")
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    sizes = sizes_of(Shapes(shapes, str(source), name_of))
    expected = sizes.shapes
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    for names, verb in ((missing, "lacks"), (surplus, "holds")):
        if names:
            reason = "" if verb == "lacks" else ", which no model of the sizes of the others has"
            raise UserError(
                f"{source} {verb} {name_of(names[0])!r}{reason} ({len(missing)} missing, "
                f"{len(surplus)} too many)"
            )
    wrong = [name for name, shape in shapes.items() if shape != expected[name]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{source}: {name_of(name)!r} has shape {shapes[name]}, with the sizes of the others "
            f"it must be {expected[name]} ({len(wrong)} misshapen)"
        )
    for name, tensor in ours.items():
        if not tensor.dtype.is_floating_point and not name.endswith(COUNTER):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: {name_of(name)!r} is of type {kind}, not of floating-point numbers"
            )
    return sizes


def count(tensors: Stored) -> dict[str, tuple[int, int]]:
    """Tensors and parameters of each component; statistics of BatchNorm are no parameters."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        number, values = found.get(component_of(name), (0, 0))
        own = 0 if name.endswith(STATISTICS) else tensor.numel
        found[component_of(name)] = number + 1, values + own
    return found


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():  # of a conversion that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beside(folder: Path) -> dict[str, Path]:
    """The text files beside a checkpoint that belong to it."""
    return {name: folder / name for name in BESIDE if (folder / name).is_file()}
