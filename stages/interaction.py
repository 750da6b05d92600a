"""Stage 2.5, interaction: where each agent goes, told in the agent's own frame."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from odvla.freezing import FreezePlan
from odvla.language.grammar import Grammar, future_grammar
from odvla.language.waypoints import ParseFailure, Waypoints, parse_future
from odvla.types import Batch, Conversation
from odvla.vla import DrivingVLA
from stages.base import Record
from stages.optimisation import LearningRates, OptimiserConfig
from stages.talk import TalkConfig, TalkStage

TRAINS = FreezePlan(("projectors.*", "language.*"))
OPTIMISER = OptimiserConfig(lr=LearningRates(projectors=1e-5, language=1e-5))


@dataclass(frozen=True)
class InteractionStageConfig(TalkConfig):
    """Settings of stage 2.5; the learning rate is the paper's."""

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER
    constrained: bool = True  # only well-formed futures can be written

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> InteractionStage:
        """The stage on a model."""
        return InteractionStage(vla, self, total_steps, seed)


class InteractionStage(TalkStage):
    """Futures of agents."""

    name = "interaction"
    config: InteractionStageConfig

    def grammar(self, meta: Mapping[str, str]) -> Grammar | None:
        """Futures, or anything."""
        if not self.config.constrained:
            return None
        signed_zero = meta.get("signed_zero") == "yes"
        return future_grammar(
            self.vla.tokenizer, decimals=int(meta["decimals"]), signed_zero=signed_zero
        )

    def record(self, conversation: Conversation, text: str, batch: Batch, row: int) -> Record:
        """An answer with its positions, and those that were driven."""
        said = parse_future(text, int(conversation.meta["decimals"]))
        driven = json.loads(conversation.meta["driven"])
        record = super().record(conversation, text, batch, row)
        return {
            **record,
            "meta": {key: value for key, value in record["meta"].items() if key != "driven"},
            "waypoints": None if isinstance(said, ParseFailure) else points(said),
            "failure": said.reason if isinstance(said, ParseFailure) else None,
            "target": driven,  # not what the reference says: that is rounded
            "mask": [x is not None for x, _ in driven],
        }


def points(waypoints: Waypoints) -> list[list[float | None]]:
    """[[x, y]] for JSON; a position that is not known is [None, None]."""
    pairs = zip(waypoints.xy.tolist(), waypoints.known.tolist(), strict=True)
    return [xy if known else [None, None] for xy, known in pairs]
