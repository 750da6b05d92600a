"""What a frozen vision half makes of key-frames, kept: it would only make the same again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from odvla.errors import UserError
from odvla.outputs import Perception
from odvla.rows import join_rows, rows_of
from odvla.types import AgentPredictions, TokenSet
from odvla.vla import DrivingVLA

VISION = ("encoder.", "queries.")  # parameters of the vision half


class Rows(Protocol):
    """Tokens of one row by stream, by sample token: a dict, or files (see TokenShards)."""

    def __len__(self) -> int: ...
    def __contains__(self, token: object, /) -> bool: ...
    def __getitem__(self, token: str, /) -> dict[str, TokenSet]: ...
    def __setitem__(self, token: str, row: dict[str, TokenSet], /) -> None: ...


class TokenMemory:
    """Tokens by sample token, as they are before projection.

    Args:
        rows: where they are kept; None: in memory, on the device that made them.
    """

    def __init__(self, rows: Rows | None = None) -> None:
        self._rows: Rows = {} if rows is None else rows

    def __len__(self) -> int:
        """Number of key-frames."""
        return len(self._rows)

    def __contains__(self, token: object) -> bool:
        """Whether a key-frame was kept, by its sample token."""
        return token in self._rows

    def keep(self, rows: Iterable[tuple[int, str]], seen: Perception) -> None:
        """Keep what was seen.

        Args:
            rows: (row, sample token) of the rows to keep. Rows that only fill a batch must not be
                among them: they bear the token of a real key-frame, but show black images.
            seen: of the whole batch.
        """
        slim = {stream: _slim(tokens).detach() for stream, tokens in seen.tokens.items()}
        for row, token in rows:
            place = torch.tensor([row], device=next(iter(slim.values())).feats.device)
            self._rows[token] = {name: rows_of(tokens, place) for name, tokens in slim.items()}

    def recall(
        self, sample_tokens: Sequence[str], device: torch.device | None = None
    ) -> Perception | None:
        """What was seen; None where one of them was not kept.

        Args:
            sample_tokens: one a row.
            device: where the tokens are wanted; None: where they are.
        """
        if any(token not in self._rows for token in sample_tokens):
            return None
        rows = [self._rows[token] for token in sample_tokens]
        tokens = {stream: join_rows([row[stream] for row in rows]) for stream in rows[0]}
        if device is not None:
            tokens = {stream: found.to(device) for stream, found in tokens.items()}
        track = tokens["track"].predictions if "track" in tokens else None
        agents = (track,) if isinstance(track, AgentPredictions) else ()
        return Perception(None, tokens, agents, None)


def _slim(tokens: TokenSet) -> TokenSet:
    """Tokens without what only perception losses need."""
    found = tokens.predictions
    if not isinstance(found, AgentPredictions):
        return replace(tokens, predictions=None)
    last = replace(
        found,
        layer_logits=found.layer_logits[-1:],
        layer_boxes=found.layer_boxes[-1:],
        heatmap=None,
        cell_codes=None,
    )
    return replace(tokens, predictions=last)


def check_frozen_vision(trained: Iterable[str], switch: str) -> None:
    """Tokens may be kept only while nothing that makes them learns.

    Args:
        trained: names of the parameters that train.
        switch: the setting that keeps tokens.

    Raises:
        UserError: one of encoder or queries is among them.
    """
    if any(name.startswith(VISION) for name in trained):
        raise UserError(
            f"{switch} needs frozen encoder and queries, but the stage's freeze plan trains some "
            "of them"
        )


def vision_sha256(vla: DrivingVLA) -> str:
    """Hash of everything stored in encoder and queries."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vla.state_dict().items()):
        if name.startswith(VISION):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
