"""The past that frames of a training clip look back at, as UniAD computes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from odvla.types import Frames


@torch.no_grad()
def uniad_history(encoder: nn.Module, clip: tuple[Frames, ...], state: Any) -> tuple[Any, ...]:
    """The state that each frame starts from: the BEV of the frames before it, in evaluation mode.

    UniAD computes the history anew for every frame, which gives the same as going through the clip
    once. A scene's first frame has no past: UniAD gives it its own BEV as one.

    Args:
        encoder: its mode is left as it was.
        clip: T frames, oldest first.
        state: what the encoder knows before the clip; None: nothing.

    Returns:
        T states. Frames should then be encoded with `after_history`.

    Source: UniADTrack.obtain_history_bev.
    """
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    states = []
    try:
        for step, frames in enumerate(clip):
            before = state
            if before is None or step < len(clip) - 1 or bool(frames.scene_start.any()):
                _, state = encoder(frames, before)
            states.append(_own_or_before(frames, state, before))
    finally:
        for module, training in modes.items():
            module.training = training
    return tuple(states)


def after_history(frames: Frames) -> Frames:
    """A clip's frame as the encoder should see it: even a first one has something behind it."""
    return replace(frames, scene_start=torch.zeros_like(frames.scene_start))


def _own_or_before(frames: Frames, own: Any, before: Any) -> Any:
    """A frame's own state where a scene starts, the one before it where the scene goes on."""
    if before is None:
        return own
    begins = frames.scene_start
    chosen = {
        name: torch.where(begins.view(-1, *[1] * (value.dim() - 1)), value, getattr(before, name))
        for name, value in vars(own).items()
    }
    return replace(own, **chosen)
