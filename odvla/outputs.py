"""What goes into a DrivingVLA beside a batch, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from odvla.losses.clip import ClipMatcher, History, Lesson
from odvla.types import (
    AgentPredictions,
    AgentTargets,
    MapPredictions,
    SceneFeatures,
    TensorFields,
    TokenSet,
)


@dataclass(frozen=True)
class VLAState(TensorFields):
    """What is remembered from one key-frame to the next."""

    encoder: Any
    queries: dict[str, Any]  # by stream


@dataclass(frozen=True)
class Perception:
    """What the vision half made of a clip; of its last frame unless said otherwise."""

    features: SceneFeatures | None  # None where only the tokens were kept
    tokens: dict[str, TokenSet]  # by stream, before projection
    agent_steps: tuple[AgentPredictions, ...]  # one a step of the clip; () without agent queries
    map_predictions: MapPredictions | None
    lessons: tuple[Lesson, ...] = ()  # one a step, where `Teaching` was given


@dataclass(frozen=True)
class Teaching:
    """The truth about a clip, for agent queries that learn with it (`learn`, see TrackFormer)."""

    agents: tuple[AgentTargets, ...]  # one a step
    matcher: ClipMatcher
    history: History = "detached"


@dataclass(frozen=True)
class TalkOutput:
    """Result of a training step on conversations."""

    loss: Tensor  # mean over the labels
    logits: Tensor  # [P, V] at label places only
    labels: Tensor  # [P]
    matched: int  # conversations about an object that a track was found for
    unmatched: int  # ... for which none was: left out
    perception: Perception | None
    state: VLAState | None


@dataclass(frozen=True)
class Regression:
    """Plans that no text was written for."""

    waypoints: Tensor  # [B, 6, 2] metres
    asked: Tensor  # bool [B] False: the language model was to be read, and no plan was asked for
    perception: Perception
    state: VLAState | None


@dataclass(frozen=True)
class Generation:
    """Written answers to the conversations of a batch."""

    texts: tuple[tuple[str, ...], ...]  # as many a conversation as asked for; () where unmatched
    unmatched: tuple[bool, ...]  # the conversation's object has no track
    new_tokens: tuple[int, ...]  # tokens written, without the end tokens
    perception: Perception | None
    state: VLAState | None
    runs: int = 0  # times the language model was run, for all answers together
    encode_s: float = 0.0  # seconds until the prompts were embedded: seeing, projecting, splicing
    prefill_s: float = 0.0  # until the language model had read them
    decode_s: float = 0.0  # until all was written
