"""What a checkpoint holds, told from its names and shapes: whose it is, its sizes, its quirks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from odvla.checkpoints.convert import HEAD_OWN, STATISTICS, check_shapes, count, untie
from odvla.checkpoints.reading import open_checkpoint
from odvla.checkpoints.sizes import EMBEDDING, HEADS, Sizes, qwen_name
from odvla.checkpoints.stored import Stored, StoredTensor
from odvla.encoders.bevformer import BEVFormerConfig
from odvla.errors import UserError
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.queries.trackformer import TrackFormerConfig
from odvla.weight_names import LAYOUTS, OLD_OFFSETS, OPENDRIVEVLA, OWN_PARTS

OWN = "odvla"
MAP_WEIGHTS = "queries.map.encoder.0.attention.attention_weights.weight"
QWEN_ENTRIES = 151_665  # of Qwen2.5's vocabulary; its embedding is padded


@dataclass(frozen=True)
class Contents:
    """What `weights inspect` tells."""

    path: Path
    format: str
    files: dict[str, int]  # bytes of each
    layout: str | None  # whose names it has: odvla, uniad, opendrivevla; None: nobody's we know
    tensors: int
    parameters: int
    dtypes: dict[str, int]  # tensors of each type
    components: dict[str, tuple[int, int]]  # tensors and parameters of each
    unused: dict[str, str]  # what a conversion sets aside, and why
    unknown: tuple[str, ...]
    sizes: Sizes | None  # None where the shapes make no whole model
    problem: str | None  # why they do not, or why it cannot be converted
    recognised: tuple[str, ...]  # published models of these sizes
    quirks: tuple[str, ...]
    ours: Stored  # under our names


def contents_of(path: Path) -> Contents:
    """Look at a file or folder.

    Raises:
        UserError: it cannot be read as a checkpoint.
    """
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    layout, ours, unused, unknown, original = _named(tensors)
    head = untie(ours) if layout == OPENDRIVEVLA.name else None
    sizes, problem = None, None
    if layout is None:
        problem = "its names are neither ours nor UniAD's nor OpenDriveVLA's"
    elif unknown:
        problem = f"{unknown[0]!r} is unknown ({len(unknown)} such names)"
    else:
        try:
            sizes = check_shapes(ours, LAYOUTS.get(layout), path, original)
        except UserError as error:
            problem = str(error) if layout != OWN else f"not of UniAD's modules: {error}"
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return Contents(
        path=path,
        format=checkpoint.format,
        files={file.name: file.stat().st_size for file in checkpoint.files},
        layout=layout,
        tensors=len(tensors),
        parameters=sum(t.numel for n, t in tensors.items() if not n.endswith(STATISTICS)),
        dtypes=dict(dtypes.most_common()),
        components=count(ours) if layout else _first_parts(tensors),
        unused=unused,
        unknown=unknown,
        sizes=sizes,
        problem=problem,
        recognised=tuple(_recognised(sizes)) if sizes else (),
        quirks=tuple(_quirks(tensors, ours, sizes, head)),
        ours=ours,
    )


def _named(
    tensors: Stored,
) -> tuple[str | None, dict[str, StoredTensor], dict[str, str], tuple[str, ...], dict[str, str]]:
    """Whose names these are; the tensors under ours, unused ones, unknown ones, original names."""
    own = {name: t for name, t in tensors.items() if name.split(".")[0] in OWN_PARTS}
    if 2 * len(own) > len(tensors):
        unknown = tuple(name for name in tensors if name not in own)
        return OWN, own, {}, unknown, {name: name for name in own}
    renamed = {name: layout.to_ours(tensors) for name, layout in LAYOUTS.items()}
    best = max(renamed, key=lambda name: len(renamed[name].names))
    found = renamed[best]
    if 2 * len(found.names) <= len(tensors):
        return None, {}, {}, tuple(tensors), {}
    ours = {new: tensors[old] for old, new in found.names.items()}
    original = {new: old for old, new in found.names.items()}
    return best, ours, found.unused, found.unknown, original


def _first_parts(tensors: Stored) -> dict[str, tuple[int, int]]:
    """Tensors and values by the first part of the name, of a checkpoint of unknown kind."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        number, values = found.get(part, (0, 0))
        found[part] = number + 1, values + tensor.numel
    return found


def _recognised(sizes: Sizes) -> list[str]:
    found = []
    tower = (sizes.encoder, sizes.track, sizes.map)
    full = (BEVFormerConfig(), TrackFormerConfig(), PanopticMapConfig(compat="uniad"))
    if tower == full:
        found.append("UniAD's full-size tower")
    name = qwen_name(sizes.language) if sizes.language else None
    return [*found, name] if name else found


def _quirks(tensors: Stored, ours: Stored, sizes: Sizes | None, head: str | None) -> list[str]:
    """What the names and shapes imply for whoever loads them."""
    quirks = []
    weights = ours.get(MAP_WEIGHTS)
    if weights is not None:
        levels = weights.shape[0] // (HEADS * PanopticMapConfig.points)
        shape = tuple(weights.shape)
        quirks.append(
            f"map head: attention weights {shape} are for {levels} levels, of which one is read: "
            'trained with the stride quirk, which compat="uniad" reproduces'
            if levels > 1
            else f"map head: attention weights {shape} are for one level: no stride quirk, "
            "attention_levels=1"
        )
    if any(OLD_OFFSETS in name for name in tensors):
        quirks.append("backbone: offsets of deformable convolutions have mmcv's old names")
    for kind in dict.fromkeys(c.kind for c in sizes.projectors.values()) if sizes else ():
        quirks.append(f"projectors: {kind} (model.projector.kind={kind})")
    if EMBEDDING in ours:
        if head:
            quirks.append(f"output layer: {head}")
        elif sizes and sizes.language:
            tied = sizes.language.tie_embeddings
            quirks.append(f"output layer: {'the embedding' if tied else HEAD_OWN}")
        rows = ours[EMBEDDING].shape[0]
        padded = f", Qwen2.5's {QWEN_ENTRIES} padded" if rows > QWEN_ENTRIES else ""
        quirks.append(f"vocabulary: {rows} rows{padded} (model.language.vocab_size={rows})")
    return quirks
