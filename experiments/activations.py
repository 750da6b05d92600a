"""How much a training step keeps for its backward pass, without training: for `plan`.

The language half runs at full size on tensors without content (FakeTensorMode), the vision half,
whose shapes depend on what it sees, on real noise at one or two small sizes: what it keeps grows in
proportion to pixels and BEV cells, apart from a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.schema import ExperimentConfig
from odvla.encoders.protocol import fake_frames
from odvla.fake_batch import fake_tokenizer, sweep_points
from odvla.freezing import FreezePlan
from odvla.vla import DrivingVLA

SMALLER = 2  # the second probe's images are so much narrower and lower
PROBE_PIXELS = 32  # the second probe's shorter side at least: what encoders take (coarsest stride)


@dataclass(frozen=True)
class Load:
    """What one process puts through the language model in a step."""

    rows: int  # conversations
    places: int  # of each, tokens of all kinds
    labels: int  # of each


@contextmanager
def kept_for_backward(parameters: Callable[[], Iterator[Tensor]]) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps inside the block, parameters left out.

    Yields:
        A function that returns the bytes so far; a storage counts once.
    """
    sizes: dict[int, int] = {}
    alive = []  # a storage that is gone could lend its number to another
    own = {parameter.untyped_storage()._cdata for parameter in parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def mixed(precision: str) -> AbstractContextManager[Any]:
    """Autocast as the trainer's precision has it."""
    if precision == "bf16-mixed":
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def language_bytes(config: ExperimentConfig, stage: str, vocab_size: int, load: Load) -> int:
    """What the language model keeps in a step of a stage."""
    language = replace(
        config.model.language,
        pretrained=None,
        attention="sdpa",
        gradient_checkpointing=config.trainer.gradient_checkpointing,
    )
    # Built without contents first: peft casts its adapters in place, which fake tensors refuse.
    with torch.device("meta"):
        holder = nn.ModuleDict({"language": language.build(vocab_size)})
    holder.train()
    _freeze(holder, config.stages.of(stage).freeze)
    with FakeTensorMode(allow_non_fake_inputs=True):
        holder.to_empty(device="cpu")
        model: Any = holder["language"]
        shape = (load.rows, load.places)
        embeds = torch.empty(*shape, model.hidden, requires_grad=True)
        states_due = load.rows * load.labels
        with mixed(config.trainer.precision), kept_for_backward(holder.parameters) as kept:
            body = model.model.base_model
            states = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
            logits = model.head(states.flatten(0, 1)[:states_due])
            labels = torch.zeros(states_due, dtype=torch.int64)
            nn.functional.cross_entropy(logits.float(), labels).requires_grad_()
            return kept() + logits.numel() * 4  # and the gradient of the logits
    raise AssertionError


def _freeze(model: nn.Module, plan: FreezePlan) -> None:
    """What a plan says about a part of the model; it may train nothing of it."""
    names = dict(model.named_parameters())

    def fits(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    for name, parameter in names.items():
        parameter.requires_grad_(fits(name, plan.train) and not fits(name, plan.but_not))


def vision_bytes(config: ExperimentConfig, stage: str, rows: int, steps: int) -> int:
    """What the vision half keeps of `steps` frames of `rows` scenes; 0 where it does not train."""
    factor = max(1, min(config.data.image_size) // (PROBE_PIXELS * SMALLER))
    first = _probe(config, stage, factor)
    if first == 0 or factor == 1:
        return first * rows * steps
    second = _probe(config, stage, factor * SMALLER)
    # bytes = constant + slope / factor^2
    areas = (1 / factor**2, 1 / (factor * SMALLER) ** 2)
    slope = (first - second) / (areas[0] - areas[1])
    whole = first + slope * (1 - areas[0])
    return int(whole) * rows * steps


def _probe(config: ExperimentConfig, stage: str, factor: int) -> int:
    """Bytes that one frame of one scene keeps, images and BEV smaller by a factor each way."""
    width, height = config.data.image_size
    encoder = config.model.encoder
    if hasattr(encoder, "rows"):
        rows, columns = (max(4, n // factor) for n in (encoder.rows, encoder.columns))
        changes: dict[str, Any] = {"rows": rows, "columns": columns}
        if hasattr(encoder, "cell_m"):
            changes["cell_m"] = encoder.cell_m * encoder.rows / rows
        encoder = replace(encoder, **changes)
    language = replace(
        config.model.language,
        hidden=16,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate=16,
        vocab_size=0,
        pretrained=None,
        attention="sdpa",
    )
    model = replace(config.model, encoder=encoder, language=language)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vla: DrivingVLA = model.build(fake_tokenizer(vocab_size=320))
        config.stages.of(stage).freeze.apply(vla)
        vision = [*vla.encoder.parameters(), *vla.queries.parameters()]
        if not any(p.requires_grad for p in vision):
            return 0
        size = (width // factor, height // factor)
        frames = fake_frames(1, size, lidar_points=sweep_points(encoder))
        with mixed(config.trainer.precision), kept_for_backward(vla.parameters) as kept:
            seen, _ = vla.perceive((frames,))
            del seen
            return kept()
    raise AssertionError
