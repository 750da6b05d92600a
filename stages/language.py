"""A stage before all others: text alone, for a language model that nobody has pre-trained.

It stands in for the pre-training of Qwen2.5, which the small models of this toolkit lack. The
conversations have no slots and the batches no images.
"""

from __future__ import annotations

from dataclasses import dataclass

from odvla.freezing import FreezePlan
from odvla.vla import DrivingVLA
from stages.optimisation import LearningRates, OptimiserConfig
from stages.talk import TalkConfig, TalkStage

TRAINS = FreezePlan(("language.*",))
OPTIMISER = OptimiserConfig(lr=LearningRates(language=1e-3))


@dataclass(frozen=True)
class LanguageStageConfig(TalkConfig):
    """Settings of the language stage."""

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> LanguageStage:
        """The stage on a model."""
        return LanguageStage(vla, self, total_steps, seed)


class LanguageStage(TalkStage):
    """Trains the language model on text."""

    name = "language"
