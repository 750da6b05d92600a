"""Stage 1, alignment: each stream of tokens is put into words; only the projectors learn."""

from __future__ import annotations

from dataclasses import dataclass

from odvla.freezing import FreezePlan
from odvla.vla import DrivingVLA
from stages.optimisation import LearningRates, OptimiserConfig
from stages.talk import TalkConfig, TalkStage

TRAINS = FreezePlan(("projectors.*",))
OPTIMISER = OptimiserConfig(lr=LearningRates(projectors=1e-4))


@dataclass(frozen=True)
class AlignmentStageConfig(TalkConfig):
    """Settings of stage 1; the learning rate is the paper's."""

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> AlignmentStage:
        """The stage on a model."""
        return AlignmentStage(vla, self, total_steps, seed)


class AlignmentStage(TalkStage):
    """Captions of objects, maps and scenes."""

    name = "alignment"
