"""What an experiment will need, before anything starts: parameters, memory, disk, time.

Everything is counted on the meta device but what the backward pass keeps, see activations.py. No
data is read: how many conversations there are is the paper's count for nuScenes' data sets, and
their lengths are those of the dialect with a short text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex
from tokenizers import pre_tokenizers as pre

from experiments.activations import Load, language_bytes, vision_bytes
from experiments.schema import ExperimentConfig
from odvla.errors import UserError
from odvla.fake_batch import fake_conversations, fake_ego, fake_plan, fake_tokenizer
from odvla.language.model_folder import model_folder
from odvla.language.tokenizer import QWEN_SPLIT, TAGS, ChatTokenizer, chat_text
from odvla.queries.scene import SceneSamplerConfig
from odvla.types import CAMERAS, SLOT_IDS, Conversation
from odvla.vla import DrivingVLA
from stages.base import StageConfig
from stages.optimisation import muon_weights, parameter_groups, trained_counts

BYTES = 4  # of a weight, a gradient and each number of an optimiser: all fp32
GIB = 2**30
SAMPLE_KINDS = {
    "alignment": ("caption_object", "caption_map", "caption_scene"),
    "instruction": ("caption", "qa", "narration"),
    "interaction": ("agent",),
    "planning": ("plan",),
    "language": ("text",),
}
# Training conversations of nuScenes' data sets (the paper's table XI); key-frames in stage 0.
PAPER_SAMPLES = {
    "perception": 28_130,
    "alignment": 536_000,
    "instruction": 566_000,
    "interaction": 459_000,
    "planning": 28_130,
}
AGENTS = 40  # confident tracks of a key-frame, where a config only says how many there may be


@dataclass(frozen=True)
class Memory:
    """Bytes of one process in a training step."""

    weights: int
    gradients: int
    optimiser: int
    exchange: int  # what the strategy adds: DDP's buckets, layers gathered by FSDP2
    activations: int  # language and vision
    step: int  # what AdamW needs for a moment

    @property
    def peak(self) -> int:
        """The most at one time.

        Activations go while gradients come, so the larger of the two counts; the optimiser's step
        comes when all gradients are there.
        """
        moving = max(self.activations, self.gradients + self.step)
        return self.weights + self.optimiser + self.exchange + moving


@dataclass(frozen=True)
class StageBudget:
    """What one stage needs."""

    stage: str
    trained: dict[str, int]  # component -> parameters
    tokens: int  # of a conversation, all kinds of tokens
    memory: Memory
    samples: int | None  # conversations (key-frames in stage 0); None: not known
    steps: int | None  # optimiser steps; None: not known
    handoff: int  # bytes on disk

    def hours(self, samples_per_second: float) -> float | None:
        """Time of the stage at a throughput of all processes together."""
        return None if self.samples is None else self.samples / samples_per_second / 3600


def budgets(config: ExperimentConfig) -> list[StageBudget]:
    """Every stage that the experiment runs.

    Raises:
        UserError: a setting does not fit.
    """
    tokenizer = _tokenizer(config)
    with torch.device("meta"):
        vla = config.model.build(tokenizer)
    return [_budget(config, stage, vla, tokenizer) for stage in config.run]


def _budget(
    config: ExperimentConfig, stage: str, vla: DrivingVLA, tokenizer: ChatTokenizer
) -> StageBudget:
    settings, data = config.stages.of(stage), getattr(config.data, stage)
    settings.freeze.apply(vla)
    load = load_of(config, stage, tokenizer)
    rows, steps = data.batch_size, data.clip_length if stage == "perception" else 1
    activations = 0
    if load is not None:
        vocabulary = vla.language.model.get_input_embeddings().num_embeddings
        activations += language_bytes(config, stage, vocabulary, load)
    if not looks_once(settings):
        activations += vision_bytes(config, stage, rows, steps)
    muon = muon_weights(vla, settings.optimiser)
    stored = sum(t.numel() * t.element_size() for t in _tensors(vla))
    samples = _samples(config, stage)
    devices = config.trainer.processes
    batch = (load.rows if load else rows) * devices * settings.accumulate
    return StageBudget(
        stage=stage,
        trained=trained_counts(vla.named_parameters()),
        tokens=load.places if load else 0,
        memory=memory_of(vla, config.trainer.sharing, devices, activations, muon),
        samples=settings.steps * batch if settings.steps else samples,
        steps=settings.steps or (None if samples is None else -(-samples // batch)),
        handoff=stored,
    )


def looks_once(settings: StageConfig) -> bool:
    """Whether steps of a stage learn from tokens that were made before."""
    return any(getattr(settings, name, False) for name in ("remember_tokens", "feature_cache"))


def _tensors(vla: DrivingVLA) -> list[torch.Tensor]:
    """All parameters and stored buffers, tied ones once."""
    kept = {id(p): p for p in vla.state_dict(keep_vars=True).values()}
    return list(kept.values())


def memory_of(
    vla: DrivingVLA, sharing: str, devices: int, activations: int, muon: Collection[str]
) -> Memory:
    """Memory of a process, from a model whose frozen parameters are marked.

    Args:
        vla: on any device.
        sharing: a strategy's name; "auto": one process.
        devices: processes.
        activations: bytes that the backward pass needs.
        muon: names of what learns by Muon, with one number each instead of two.
    """
    weights = BYTES * sum(p.numel() for p in vla.parameters())
    groups = parameter_groups(vla.named_parameters(), muon)
    sizes = [(group.muon, sum(p.numel() for p in group.parameters)) for group in groups]
    gradients = BYTES * sum(count for _, count in sizes)
    optimiser = BYTES * sum(count * (1 if by_muon else 2) for by_muon, count in sizes)
    exchange = gradients if sharing == "ddp" else 0
    step = gradients
    if sharing == "fsdp2":
        layers = [BYTES * sum(p.numel() for p in x.parameters()) for x in vla.language.layers]
        outside = weights - sum(layers)
        # The root's parameters and two layers are whole at a time, with the gradients of one.
        exchange = outside + 2 * max(layers) + (outside if gradients else 0)
        weights, gradients, optimiser, step = (
            -(-part // devices) for part in (weights, gradients, optimiser, step)
        )
    if sharing == "deepspeed_2":
        exchange = gradients
        gradients, optimiser, step = (-(-part // devices) for part in (gradients, optimiser, step))
    return Memory(weights, gradients, optimiser, exchange, activations, step)


def load_of(config: ExperimentConfig, stage: str, tokenizer: ChatTokenizer) -> Load | None:
    """Conversations of a step, their length, and how much of it is answer; None: no text."""
    kinds = [k for k in SAMPLE_KINDS.get(stage, ()) if k in config.dialect.wording.requests]
    planning = config.stages.planning
    regressed = stage == "planning" and planning is not None and planning.actions == "regression"
    if not kinds or (regressed and not config.regresses_from_language):
        return None
    told = fake_conversations(fake_plan(8, 0), fake_ego(8, 0), kinds, config.dialect_of(stage))
    lengths = [_length(config, conversation, tokenizer) for conversation in told]
    if regressed:  # requests are read, and nothing is written
        lengths = [(places - labels, 0) for places, labels in lengths]
    data = getattr(config.data, stage)
    return Load(
        rows=data.batch_size * max(1, data.conversations_per_frame),
        places=round(sum(places for places, _ in lengths) / len(lengths)),
        labels=round(sum(labels for _, labels in lengths) / len(lengths)),
    )


def _length(
    config: ExperimentConfig, conversation: Conversation, tokenizer: ChatTokenizer
) -> tuple[int, int]:
    """Places and labels of a conversation."""
    answer = conversation.turns[-1].text
    if config.tokenizer.pretrained is not None and tokenizer.stands_in:
        places = _pieces(chat_text(conversation)), _pieces(answer) + 1
    else:
        encoded = tokenizer.encode(conversation)
        places = sum(i >= 0 for i in encoded.ids), len(encoded.ids) - encoded.prompt_length - 1
    text = chat_text(conversation)
    slots = sum(text.count(slot) * _slot_tokens(config, slot) for slot in SLOT_IDS)
    return places[0] + slots, places[1]


def _pieces(text: str) -> int:
    """Words, digits and marks as Qwen2.5 cuts them; most are one token."""
    for tag in (*TAGS, *SLOT_IDS):
        text = text.replace(tag, " " if tag in SLOT_IDS else "\n")
    return len(pre.Split(Regex(QWEN_SPLIT), behavior="isolated").pre_tokenize_str(text))


def _slot_tokens(config: ExperimentConfig, slot: str) -> int:
    """Tokens that stand in a slot."""
    if slot in ("<OBJECT>", "<EGO>"):
        return 1
    name = slot.strip("<>").lower()
    for query in config.model.queries:
        kind = type(query).__name__.lower()
        if isinstance(query, SceneSamplerConfig):
            if name == "scene":
                cameras = len(CAMERAS) if query.source == "levels" else 1
                return cameras * query.rows * query.columns
        elif name == "map" and "map" in kind:
            return getattr(query, "max_tokens", None) or query.max_candidates + 1
        elif name == "track" and re.search("agent|track", kind):
            return min(getattr(query, "max_tokens", AGENTS), AGENTS)
    return 0


def _samples(config: ExperimentConfig, stage: str) -> int | None:
    """Conversations of all epochs on nuScenes; not known for a generated town."""
    if config.town is not None or stage not in PAPER_SAMPLES:
        return None
    return round(PAPER_SAMPLES[stage] * config.stages.of(stage).epochs)


def _tokenizer(config: ExperimentConfig) -> ChatTokenizer:
    """The experiment's own, where it is here; else one that stands in for it."""
    settings = config.tokenizer
    if settings.pretrained is not None:
        try:
            folder = model_folder(settings.pretrained, "tokenizer.pretrained", "tokenizer.json")
        except UserError:
            pass
        else:
            return ChatTokenizer.load(
                folder, add_tags=settings.add_tags, action_tokens=settings.action_tokens
            )
    size = max(settings.vocab_size, 300)
    made = fake_tokenizer(config.dialect, size, settings.action_tokens)
    made.stands_in = True
    return made


def totals(memory: Sequence[StageBudget]) -> dict[str, Any]:
    """The largest memory and all of the disk."""
    return {
        "peak": max(stage.memory.peak for stage in memory),
        "disk": sum(stage.handoff for stage in memory),
    }
