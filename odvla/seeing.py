"""A clip through encoder and queries, frame by frame, with the past as a value.

A frame's view goes on to the next one; tracks do, too, and other streams where a query module says
that it has a memory. In training, the ground truth decides which tracks live (Teaching).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from odvla.encoders.history import after_history, uniad_history
from odvla.losses.clip import Lesson
from odvla.outputs import Perception, Teaching, VLAState
from odvla.types import AgentPredictions, Frames, TokenSet


def see_clip(
    encoder: nn.Module,
    queries: nn.ModuleDict,
    clip: tuple[Frames, ...],
    state: VLAState | None,
    *,
    blind: bool,
    teaching: Teaching | None = None,
) -> tuple[Perception, VLAState]:
    """Look at a clip, oldest frame first.

    Args:
        encoder: frames and the past to features.
        queries: features to tokens, a module a stream.
        clip: T frames of B scenes, at least one.
        state: what the previous call returned; None at the start.
        blind: show black images (and no lidar points).
        teaching: let the ground truth decide which tracks live.
    """
    if blind:
        clip = tuple(_unseen(frames) for frames in clip)
    past = state.encoder if state else None
    query_states = dict(state.queries) if state else {}
    agent_steps: list[AgentPredictions] = []
    lessons: list[Lesson] = []
    tokens: dict[str, TokenSet] = {}
    histories = None
    if teaching is not None and teaching.history == "uniad":
        histories = uniad_history(encoder, clip, past)
    for step, frames in enumerate(clip):
        if histories is not None:
            features, past = encoder(after_history(frames), histories[step])
        else:
            if teaching is not None and teaching.history == "detached" and past is not None:
                past = past.detach()
            features, past = encoder(frames, past)
        now = step == len(clip) - 1
        for stream, module in queries.items():
            before = query_states.get(stream)
            if stream == "track" and teaching is not None:
                learn: Any = module.learn
                tokens[stream], query_states[stream], lesson = learn(
                    features, frames, before, teaching.agents[step], teaching.matcher
                )
                lessons.append(lesson)
            # Tracks are carried from frame to frame; other streams matter only now, unless a
            # module says that it has a memory.
            elif now or getattr(module, "temporal", stream == "track"):
                tokens[stream], query_states[stream] = module(features, frames, before)
        if "track" in tokens and isinstance(tokens["track"].predictions, AgentPredictions):
            agent_steps.append(tokens["track"].predictions)
    map_predictions = tokens["map"].predictions if "map" in tokens else None
    assert not isinstance(map_predictions, AgentPredictions)
    perception = Perception(features, tokens, tuple(agent_steps), map_predictions, tuple(lessons))
    return perception, VLAState(past, query_states)


def _unseen(frames: Frames) -> Frames:
    """Black images, and a lidar to which nothing came back."""
    lidar = frames.lidar
    if lidar is not None:
        lidar = replace(lidar, mask=torch.zeros_like(lidar.mask))
    return replace(frames, images=torch.zeros_like(frames.images), lidar=lidar)
