"""Plans made while something is hidden from the model, to tell what it uses (the paper's Table IV).

The model stays as it was trained; what is hidden is hidden at the test alone. What the model is not
told is not used to read its plan either: a plan written as changes of motion is then read against
a car that stands.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from odvla.errors import UserError
from odvla.language.prompts import Dialect, answers_of
from odvla.language.tokenizer import ChatTokenizer
from odvla.rows import rows_of
from odvla.types import COMMANDS, Batch, EgoState, Frames

Ablation = Literal["no_vision", "other_vision", "no_ego", "no_history", "no_command"]
# Kind of the records that each of them writes.
KIND_OF: dict[str, str] = {
    "no_vision": "plan_blind",
    "other_vision": "plan_other_vision",
    "no_ego": "plan_no_ego",
    "no_history": "plan_no_history",
    "no_command": "plan_no_command",
}
EGO_FIELDS = ("velocity", "yaw_rate", "acceleration", "can_accel", "heading_speed", "steering")


def hide_ego(ego: EgoState, ablation: str) -> EgoState:
    """The ego state without one of its parts.

    Numbers become 0; a command cannot be empty, and becomes "keep forward", the commonest.
    """
    if ablation == "no_command":
        forward = torch.full_like(ego.command, COMMANDS.index("keep forward"))
        return replace(ego, command=forward)
    names = EGO_FIELDS if ablation == "no_ego" else ("history",)
    hidden = {name: torch.zeros_like(getattr(ego, name)) for name in names}
    return replace(ego, **hidden)


def tell_less(batch: Batch, ablation: str, dialect: Dialect, tokenizer: ChatTokenizer) -> Batch:
    """A batch whose requests for plans, and whose ego tokens, hide a part of the ego state."""
    assert batch.talk is not None
    assert batch.ego is not None
    ego = hide_ego(batch.ego, ablation)
    owners = batch.talk.frame_index.tolist()
    here = batch.talk.input_ids.device
    told = []
    for conversation, row in zip(batch.talk.conversations, owners, strict=True):
        one = rows_of(ego, torch.tensor([row], device=ego.command.device)).to("cpu")
        if "thoughts" in conversation.meta:
            turns = dialect.thinking_turns(answers_of(conversation.turns), one)
        else:
            turns = dialect.turns(conversation.kind, conversation.reference, one)
        told.append(replace(conversation, turns=turns))
    return replace(batch, ego=ego, talk=tokenizer.tokenise(told, owners).to(here))


class OtherVision:
    """Gives every row of a streamed batch the images of another scene.

    Rows are shifted by one among those that show something. The last scene of a split is alone at
    its end; it then sees the last key-frame of another one that was streamed before.
    """

    def __init__(self) -> None:
        self._kept: Frames | None = None  # one row, of another scene than the last rows'
        self._last: Frames | None = None

    def swap(self, batch: Batch) -> Batch:
        """The batch with the images, cameras and poses of others.

        Raises:
            UserError: there is no other scene.
        """
        frames = batch.clip[-1]
        rows = batch.valid.nonzero()[:, 0]
        if len(rows) > 1:
            donor = torch.arange(len(batch.valid), device=rows.device)
            donor[rows] = rows.roll(1)
            self._kept = rows_of(frames, rows[:1])
            return replace(batch, clip=(rows_of(frames, donor),))
        if self._last is not None and bool(frames.scene_start[rows].any()):
            self._kept = self._last  # of the scene before
        if len(rows):
            self._last = rows_of(frames, rows)
        if self._kept is None:
            raise UserError(
                "vision of another sample needs another scene: stream at least two side by side "
                "(eval_batch_size)"
            )
        everybody = torch.zeros(len(batch.valid), dtype=torch.long, device=rows.device)
        return replace(batch, clip=(rows_of(self._kept, everybody),))
