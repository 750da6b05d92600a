"""Stage 2, instruction: questions about the drive; projectors and language model learn."""

from __future__ import annotations

from dataclasses import dataclass

from odvla.freezing import FreezePlan
from odvla.vla import DrivingVLA
from stages.optimisation import LearningRates, OptimiserConfig
from stages.talk import TalkConfig, TalkStage

TRAINS = FreezePlan(("projectors.*", "language.*"))
OPTIMISER = OptimiserConfig(lr=LearningRates(projectors=1e-5, language=1e-5))


@dataclass(frozen=True)
class InstructionStageConfig(TalkConfig):
    """Settings of stage 2; the learning rate is the paper's."""

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> InstructionStage:
        """The stage on a model."""
        return InstructionStage(vla, self, total_steps, seed)


class InstructionStage(TalkStage):
    """Captions, questions, narrations."""

    name = "instruction"
