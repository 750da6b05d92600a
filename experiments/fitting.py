"""Which experiments a checkpoint fits: its shapes against their parts on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from experiments.find import experiments, find_experiment
from odvla.checkpoints.sizes import EMBEDDING, HEAD
from odvla.checkpoints.stored import Stored
from odvla.weight_names import component_of

Shape = tuple[int, ...]


def fits(tensors: Stored) -> dict[str, dict[str, str]]:
    """Experiment -> component of the checkpoint -> "" where it fits, else the first difference.

    Args:
        tensors: the checkpoint under our names.
    """
    held: dict[str, dict[str, Shape]] = {}
    for name, tensor in tensors.items():
        held.setdefault(component_of(name), {})[name] = tensor.shape
    found: dict[str, dict[str, str]] = {}
    for experiment in experiments():
        own = dict(_parts(find_experiment(experiment).model, tensors))
        found[experiment] = {
            component: difference(shapes, own.get(component, {}))
            for component, shapes in held.items()
        }
    return found


def _parts(model: Any, tensors: Stored) -> Iterator[tuple[str, dict[str, Shape]]]:
    """Names and shapes of each component of an experiment's model."""
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else 1
    with torch.device("meta"):
        encoder = model.encoder.build()
        yield "encoder", _shapes("encoder.", encoder)
        language = model.language.build(rows)
        own = _shapes("language.", language)
        if language.model.config.tie_word_embeddings:
            own.pop(HEAD, None)
        yield "language", own
        for config in model.queries:
            module = config.build(dim=encoder.dim, grid=encoder.grid)
            yield f"queries.{module.stream}", _shapes(f"queries.{module.stream}.", module)
            projector = model.projector.build(module.dim, language.hidden)
            yield f"projectors.{module.stream}", _shapes(f"projectors.{module.stream}.", projector)


def _shapes(prefix: str, module: nn.Module) -> dict[str, Shape]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def difference(held: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    """The first way in which a checkpoint's shapes are not a module's; "": there is none."""
    if not wanted:
        return "it has no such part"
    for name, shape in held.items():
        if name not in wanted:
            return f"it has no {name}"
        if wanted[name] != shape:
            return f"{name} is {shape}, it wants {wanted[name]}"
    missing = [name for name in wanted if name not in held]
    return f"it wants {missing[0]}" if missing else ""
