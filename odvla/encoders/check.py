"""The contract of an encoder, checked: what a contributor runs on a new one.

check_encoder(MyEncoderConfig()) returns quietly or raises a ValueError that names the broken rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odvla.encoders.protocol import fake_frames
from odvla.rows import rows_of
from odvla.types import Frames, SceneFeatures

TOLERANCE = 1e-3  # sums of another length round differently; real mixing of rows is far larger


def check_encoder(config: Any, *, batch: int = 3, seed: int = 0) -> None:
    """Check an encoder on noise images.

    The rules: features are finite and have the promised channels and grid; the state survives a
    round trip through detach(); a row's features do not depend on the other rows; scene_start gives
    the same as a fresh start; and every parameter gets a gradient.

    Args:
        config: a dataclass with build(). Its fake_batch(batch, seed=, step=) -> Frames is used
            when there is one.
        batch: rows to try; at least 2.
        seed: of the noise and the weights.

    Raises:
        ValueError: naming the first rule that does not hold.
    """
    name = type(config).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = config.build()
    make = getattr(config, "fake_batch", None) or fake_frames
    first, second = (make(batch, seed=seed, step=step) for step in range(2))
    # Every row must have a past in the second step, whatever the maker of frames thinks.
    second = replace(second, scene_start=torch.zeros_like(second.scene_start))

    encoder.eval()
    with torch.no_grad():
        start, state = encoder(first, None)
        _check_shapes(name, encoder, start, batch)
        following, _ = encoder(second, state)
        _check_shapes(name, encoder, following, batch)
        again = encoder(second, state.detach() if state is not None else None)[0]
        _require_equal(following, again, f"{name}: the detached state gives other features")
        _check_rows(name, encoder, (first, second), following)
        if state is not None:
            restarted = encoder(replace(second, scene_start=~second.scene_start), state)[0]
            fresh = encoder(replace(second, scene_start=~second.scene_start), None)[0]
            _require_equal(restarted, fresh, f"{name}: scene_start does not forget the state")
    with torch.random.fork_rng(devices=[]):
        _check_gradients(name, encoder, (first, second), seed)


def _tensors(features: SceneFeatures) -> Iterator[Tensor]:
    yield from features.levels
    if features.bev is not None:
        yield features.bev


def _check_shapes(name: str, encoder: Any, features: SceneFeatures, batch: int) -> None:
    tensors = list(_tensors(features))
    if not tensors:
        raise ValueError(f"{name}: gives neither image levels nor a BEV")
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: features are not finite")
        if len(tensor) != batch:
            raise ValueError(f"{name}: features have {len(tensor)} rows for {batch} of images")
    if (features.bev is None) != (encoder.grid is None) or features.grid != encoder.grid:
        raise ValueError(f"{name}: `grid` of the module and of its features differ")
    if features.bev is not None and features.grid is not None:
        wanted = (features.grid.rows, features.grid.columns, encoder.dim)
        if features.bev.shape[1:] != wanted:
            raise ValueError(f"{name}: the BEV is {tuple(features.bev.shape[1:])}, not {wanted}")
    for level in features.levels:
        if level.shape[2] != encoder.dim:
            raise ValueError(f"{name}: a level has {level.shape[2]} channels, not {encoder.dim}")


def _require_equal(one: SceneFeatures, other: SceneFeatures, sentence: str) -> None:
    for a, b in zip(_tensors(one), _tensors(other), strict=True):
        scale = a.abs().max().clamp(min=1)
        if not torch.allclose(a / scale, b / scale, atol=TOLERANCE, rtol=0):
            raise ValueError(sentence)


def _check_rows(
    name: str, encoder: Any, frames: tuple[Frames, Frames], together: SceneFeatures
) -> None:
    """The last row alone must give what it gives among others."""
    row = slice(len(frames[0].scene_start) - 1, None)
    state = None
    for step in frames:
        alone, state = encoder(take_rows(step, row), state)
    last = SceneFeatures(
        levels=tuple(level[row] for level in together.levels),
        bev=None if together.bev is None else together.bev[row],
        grid=together.grid,
    )
    _require_equal(last, alone, f"{name}: a row's features depend on the other rows of its batch")


def _check_gradients(name: str, encoder: Any, frames: tuple[Frames, Frames], seed: int) -> None:
    torch.manual_seed(seed)  # of what replaces zeros, and of dropout
    encoder.train()
    encoder.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter in encoder.parameters():
            # A layer that starts at zero would hide everything before it.
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    start, state = encoder(frames[0], None)
    following, _ = encoder(frames[1], state)
    loss = sum(
        (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).mean()
        for features in (start, following)
        for tensor in _tensors(features)
    )
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(f"{name}: features carry no gradient")
    loss.backward()
    for parameter_name, parameter in encoder.named_parameters():
        gradient = parameter.grad
        if parameter.requires_grad and (gradient is None or not gradient.abs().sum() > 0):
            raise ValueError(f"{name}: no gradient reaches the parameter {parameter_name}")


def take_rows(frames: Frames, rows: slice) -> Frames:
    """Some rows of a batch of frames."""
    return rows_of(frames, torch.arange(len(frames.scene_start))[rows])
