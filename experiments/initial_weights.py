"""Converted weights as the start of a run: UniAD's tower, all of OpenDriveVLA, or some parts.

They fill the model once, before the first stage that is trained. A stage that starts from a handoff
never sees them: the released code restores the original tower over a trained one whenever it loads
a model, which users noticed by their detections falling apart.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.released_dialect import DIALECT
from experiments.schema import ExperimentConfig, InitConfig
from odvla.checkpoints.convert import NOTE
from odvla.checkpoints.reading import Checkpoint, open_checkpoint
from odvla.checkpoints.sizes import EMBEDDING, HEAD
from odvla.checkpoints.stored import StoredTensor
from odvla.config import config_hash
from odvla.errors import UserError
from odvla.language.causal_lm import reset_embeddings
from odvla.language.prompts import Dialect
from odvla.vla import DrivingVLA
from odvla.weight_names import OWN_PARTS, component_of
from odvla.weights import file_sha256, stored_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Initial:
    """What was loaded, for the card."""

    record: dict[str, Any]  # path, SHA-256 of the files, tensors of each component
    dialect: dict[str, Any] | None  # identity of the one that the weights speak, where it is known


def identity(init: InitConfig) -> str | None:
    """Stands for the content of the initial weights; None: there are none.

    A conversion has noted the hashes of its files, which are checked when they are loaded.

    Raises:
        UserError: the weights cannot be opened.
    """
    if not init.weights:
        return None
    checkpoint = _opened(init)
    return config_hash({"files": _noted(checkpoint) or _hashes(checkpoint), "parts": init.parts})


def load_initial(
    vla: DrivingVLA, config: ExperimentConfig, leave: tuple[str, ...] = ()
) -> Initial | None:
    """Fill the model, or parts of it, with converted weights; None: the experiment names none.

    Args:
        vla: the model, as it was built.
        config: the experiment.
        leave: parts that a handoff fills, and initial weights do not.

    Raises:
        UserError: the weights cannot be read, have changed since their conversion, do not fit the
            model exactly, or speak another dialect. The model is as it was.
    """
    init = config.init
    if not init.weights:
        return None
    checkpoint = _opened(init)
    path = checkpoint.path
    hashes = _hashes(checkpoint)
    for name, noted in _noted(checkpoint).items():
        if hashes[name] != noted:
            raise UserError(f"{checkpoint.folder / name} is not the file that {NOTE} tells of")
    chosen = {
        name: tensor
        for name, tensor in _chosen(checkpoint, init).items()
        if name.split(".")[0] not in leave
    }
    if not chosen:
        return None
    own = _own_tensors(vla)
    _check(chosen, own, path)
    dialect = _dialect(checkpoint.folder, chosen, config)
    with torch.no_grad():
        for name, stored in chosen.items():
            _fill(own[name], stored.read())
    parts = {component_of(name) for name in chosen}
    if "language" in parts and _noted(checkpoint):
        # Rows that only pad a released table; weights that were trained here know their tags.
        reset_embeddings(vla.language.model, vla.tokenizer.added_ids)
    loaded = {part: sum(component_of(n) == part for n in chosen) for part in sorted(parts)}
    for part, number in loaded.items():
        log.info("initial weights: %s, %d tensors from %s", part, number, path)
    kept = sorted({component_of(name) for name in own} - parts)
    if kept:
        log.info("initial weights: %s start as they were built", ", ".join(kept))
    return Initial({"path": str(path), "sha256": hashes, "tensors": loaded}, dialect)


def _opened(init: InitConfig) -> Checkpoint:
    path = Path(init.weights).expanduser()
    if not path.exists():
        raise UserError(
            f"init.weights {path} does not exist; where it is a stage of another experiment, fit "
            "that one first"
        )
    return open_checkpoint(path)


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in checkpoint.files}


def _noted(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes that a conversion wrote down."""
    note = checkpoint.folder / NOTE
    if not note.is_file():
        return {}
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))["sha256"]
        return {file.name: noted[file.name] for file in checkpoint.files}
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UserError(f"{note} is not the note of a conversion") from error


def _chosen(checkpoint: Checkpoint, init: InitConfig) -> dict[str, StoredTensor]:
    """The tensors of the parts that are asked for."""
    for name in checkpoint.tensors:
        if name.split(".")[0] not in OWN_PARTS:
            raise UserError(
                f"init.weights {checkpoint.path} holds {name!r}, which is none of our names: "
                "convert it first (weights convert)"
            )
    if not init.parts:
        return checkpoint.tensors
    chosen: dict[str, StoredTensor] = {}
    for part in init.parts:
        found = {n: t for n, t in checkpoint.tensors.items() if f"{n}.".startswith(f"{part}.")}
        if not found:
            raise UserError(f"init.parts names {part!r}, of which {checkpoint.path} holds nothing")
        chosen |= found
    return chosen


def _own_tensors(vla: DrivingVLA) -> dict[str, Tensor]:
    """The model's tensors, under the names they have without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in stored_tensors(vla).items()
        if ".lora_" not in name
    }


def _check(chosen: dict[str, StoredTensor], own: dict[str, Tensor], path: Path) -> None:
    """Component by component, all names and shapes must be the model's."""
    components = list(dict.fromkeys(component_of(name) for name in chosen))
    there = {component_of(name) for name in own}
    for component in components:
        if component not in there:
            raise UserError(
                f"init.weights {path} holds {component}, which the model does not have; name those "
                f"to load, e.g. init.parts=[{', '.join(c for c in components if c in there)}]"
            )
        wanted = [name for name in own if component_of(name) == component]
        missing = [name for name in wanted if name not in chosen]
        surplus = [n for n in chosen if component_of(n) == component and n not in own]
        if missing or surplus:
            verb, other = ("lacks", "needs") if missing else ("holds", "does not have")
            raise UserError(
                f"init.weights {path} {verb} {(missing or surplus)[0]!r}, which the model {other} "
                f"({len(missing)} missing, {len(surplus)} too many in {component})"
            )
    for name, stored in chosen.items():
        shape, wanted_shape = stored.shape, tuple(own[name].shape)
        if shape == wanted_shape:
            continue
        if name in (EMBEDDING, HEAD) and shape[1:] == wanted_shape[1:]:
            if shape[0] < wanted_shape[0]:
                continue  # rows of added tokens
            raise UserError(
                f"init.weights {path} has a vocabulary of {shape[0]} rows, the model of "
                f"{wanted_shape[0]}: set model.language.vocab_size={shape[0]}"
            )
        raise UserError(
            f"init.weights {path}: {name!r} has shape {shape}, the model wants {wanted_shape}"
        )


def _fill(own: Tensor, values: Tensor) -> None:
    """Copy; rows that the file does not have become the mean of those that it has."""
    if own.shape == values.shape:
        own.copy_(values)
    else:
        own[: len(values)].copy_(values)
        own[len(values) :] = values.float().mean(0).to(own)


def _dialect(
    folder: Path, chosen: dict[str, StoredTensor], config: ExperimentConfig
) -> dict[str, Any] | None:
    """The dialect beside the weights, which the experiment must speak too."""
    path = folder / DIALECT
    if not path.is_file() or not {"projectors", "language"} & {n.split(".")[0] for n in chosen}:
        return None
    spoken = Dialect(str(path)).identity()
    try:
        config.dialect.check_same(spoken, f"init.weights {folder}")
    except UserError as error:
        if not config.force_dialect:
            raise
        log.warning("forced: %s", error)
    return spoken
