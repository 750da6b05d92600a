"""Our weights as UniAD's or OpenDriveVLA's own code loads them: the way back of convert.py.

What our model never reads comes back from the folder of the conversion that the weights started
from; without it those few tensors are missing, and the report says which.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odvla.checkpoints.convert import (
    FORMAT,
    HEAD_COPY,
    NOTE,
    SOURCE_FILES,
    UNUSED_FILE,
    Report,
    beside,
    check_shapes,
    count,
    made_whole,
)
from odvla.checkpoints.reading import STEMS, Checkpoint, open_checkpoint, open_file
from odvla.checkpoints.sizes import EMBEDDING, HEAD, Sizes, qwen_name
from odvla.checkpoints.stored import Stored, StoredTensor
from odvla.checkpoints.writing import (
    DEFAULT_SHARD_BYTES,
    write_folder,
    write_safetensors,
    write_torch_file,
)
from odvla.errors import UserError
from odvla.weight_names import OPENDRIVEVLA, OWN_PARTS, Layout, component_of
from odvla.weights import write_atomically

_, THEIR_STEM, PICKLED_STEM = STEMS
TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def export_weights(
    source: Path,
    layout: Layout,
    out: Path,
    *,
    like: Path | None = None,
    pickled: bool = False,
    limit: int = DEFAULT_SHARD_BYTES,
) -> Report:
    """Write weights of ours as another project's own code loads them.

    Args:
        source: a folder of converted weights, or of a finished stage.
        layout: whose checkpoint it becomes.
        out: a file (.pth, .pt, .bin or .safetensors), or a folder as Hugging Face lays it out; it
            must not be there yet.
        like: a folder of converted weights whose unused tensors, spelling and source files are
            taken over; None: those of `source`, where it has them.
        pickled: PyTorch's format in a folder.
        limit: bytes a file in a folder.

    Raises:
        UserError: the weights cannot be read, or do not make up the target's model.
    """
    checkpoint = open_checkpoint(source)
    known = like if like is not None else checkpoint.folder
    note = _note_of(known, needed=like is not None)
    ours, left_out = _wanted(checkpoint, layout)
    sizes = check_shapes(ours, layout, source, {name: name for name in ours})
    spelled = note.get("spelled", {})
    theirs = {
        spelled.get(new, name): ours[new] for new, name in layout.to_theirs(ours).names.items()
    }
    head = layout.to_theirs([HEAD]).names.get(HEAD)
    if head and head not in theirs and note.get("output_layer") == HEAD_COPY:
        theirs[head] = ours[EMBEDDING]
    unused = _unused_of(known, layout, note)
    theirs |= unused
    notes: list[str] = []
    if out.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        _write_file(out, theirs)
    else:
        with made_whole(out) as folder:
            stem, suffix = (PICKLED_STEM, ".bin") if pickled else (THEIR_STEM, ".safetensors")
            write_folder(folder, stem, theirs, suffix=suffix, limit=limit)
            if layout is OPENDRIVEVLA:
                notes = _write_beside(folder, known, sizes, ours)
    absent = tuple(name for name in layout.unused if name not in unused)
    return Report(out, count(ours), sizes, {}, absent, left_out, tuple(notes))


def _wanted(checkpoint: Checkpoint, layout: Layout) -> tuple[Stored, dict[str, int]]:
    """The tensors that the layout has a place for, and how many of each other part are left out."""
    ours: dict[str, StoredTensor] = {}
    left_out: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        component = component_of(name)
        if component in layout.components:
            ours[name] = tensor
        elif component.split(".")[0] in OWN_PARTS:
            left_out[component] = left_out.get(component, 0) + 1
        else:
            raise UserError(f"{checkpoint.path} holds {name!r}, which is no weight of a DrivingVLA")
    renamed = layout.to_theirs(ours)
    if renamed.unknown:
        raise UserError(
            f"{checkpoint.path} holds {renamed.unknown[0]!r}, which {layout.title} has no name for "
            f"({len(renamed.unknown)} such tensors): only its own modules can be written so"
        )
    return ours, left_out


def _note_of(folder: Path, *, needed: bool) -> dict[str, Any]:
    path = folder / NOTE
    if not path.is_file():
        if needed:
            raise UserError(f"{folder} holds no converted weights: {path} does not exist")
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["format"] != FORMAT:
            raise UserError(f"{path} is of format {note['format']}, which is not known here")
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not the note of a conversion") from error
    return note


def _unused_of(folder: Path, layout: Layout, note: Mapping[str, Any]) -> Stored:
    """The tensors that our model never read, where the folder is a conversion."""
    path = folder / UNUSED_FILE
    if not note or not path.is_file():
        return {}
    _, tensors = open_file(path)
    # From one project's names to the other's: the tower's are the same behind a prefix.
    target = {_bare(name): name for name in layout.unused}
    stray = [name for name in tensors if _bare(name) not in target]
    if stray:
        raise UserError(f"{path} holds {stray[0]!r}, which {layout.title} does not have")
    return {target[_bare(name)]: tensor for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    """A tower's name without what wraps the tower."""
    return name.rpartition("vision_model.")[2]


def _write_file(out: Path, tensors: Stored) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    try:
        if out.suffix == ".safetensors":
            write_safetensors(partial, tensors)
        else:
            write_torch_file(partial, tensors, wrapped=out.suffix != ".bin")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _write_beside(folder: Path, known: Path, sizes: Sizes, ours: Stored) -> list[str]:
    """Configuration and tokenizer; returns what the user must know of them."""
    for name, file in beside(known / SOURCE_FILES).items():
        shutil.copyfile(file, folder / name)
    path = folder / "config.json"
    assert sizes.language is not None
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("vocab_size") != sizes.vocab_rows:
            config["vocab_size"] = sizes.vocab_rows
            write_atomically(path, json.dumps(config, indent=2).encode())
            return [f"config.json: vocab_size is now {sizes.vocab_rows}"]
        return []
    missing = "tokenizer and generation settings must come from the published checkpoint"
    if qwen_name(sizes.language) is None:
        return [f"no config.json was written: no published Qwen2.5 has these sizes; {missing}"]
    path.write_text(json.dumps(_llava_config(sizes, ours), indent=2))
    return [f"config.json was written from the sizes; {missing}"]


def _llava_config(sizes: Sizes, ours: Stored) -> dict[str, Any]:
    """What the reference's LlavaQwenForCausalLM needs to know, for a published Qwen2.5."""
    language = sizes.language
    assert language is not None
    assert sizes.encoder is not None
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "hidden_size": language.hidden,
        "intermediate_size": language.intermediate,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "vocab_size": sizes.vocab_rows,
        "tie_word_embeddings": language.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32768,
        "mm_projector_type": sizes.projectors["scene"].kind,
        "mm_hidden_size": sizes.encoder.dim,
        "torch_dtype": str(ours[EMBEDDING].dtype).removeprefix("torch."),
    }
