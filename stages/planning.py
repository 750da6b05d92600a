"""Stage 3, planning: where the car itself goes; all but the 2D backbone learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from odvla.errors import UserError
from odvla.freezing import FreezePlan
from odvla.language.draft import Drafting
from odvla.language.grammar import Grammar, Range, plan_grammar
from odvla.language.waypoints import ParseFailure, PlanForm, median_plan, parse_waypoints
from odvla.outputs import Perception
from odvla.types import Batch, Conversation
from odvla.vla import DrivingVLA
from stages.base import Record
from stages.optimisation import LearningRates, OptimiserConfig
from stages.plan_ablations import KIND_OF, Ablation, OtherVision, tell_less
from stages.talk import TalkConfig, TalkStage

TRAINS = FreezePlan(("*",), but_not=("encoder.backbone.*",))
OPTIMISER = OptimiserConfig(lr=LearningRates(1e-5, 1e-5, 1e-5, 1e-5, 1e-5))


@dataclass(frozen=True)
class PlanningStageConfig(TalkConfig):
    """Settings of stage 3.

    The learning rates are the paper's; an unofficial training script has 2e-6 for the vision half.
    """

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER
    constrained: bool = True  # only well-formed plans can be written
    # 1: the most likely text, as in the paper. More: the median of so many plans drawn at random.
    samples: int = 1
    temperature: float = 1.0  # of the draws
    # How a constrained plan is guessed before the model verifies it; what it writes is the same.
    drafting: Drafting = field(default_factory=Drafting)
    # What the numbers of a constrained plan may be: of its points or steps, as the dialect has it.
    x_range_m: tuple[float, float] = (-99.99, 99.99)
    y_range_m: tuple[float, float] = (-99.99, 99.99)
    # The test is taken once more for each of them; see plan_ablations.py.
    ablations: tuple[Ablation, ...] = ("no_vision",)

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        super().__post_init__()
        if self.samples < 1:
            raise UserError(f"planning needs at least 1 sample, not {self.samples}")
        if not self.temperature > 0:
            raise UserError(f"planning.temperature must be positive, not {self.temperature}")
        for name in self.ablations:
            if name not in KIND_OF:
                raise UserError(f"ablations must be some of {', '.join(KIND_OF)}, not {name!r}")

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> PlanningStage:
        """The stage on a model."""
        return PlanningStage(vla, self, total_steps, seed)


class PlanningStage(TalkStage):
    """Plans of the car."""

    name = "planning"
    config: PlanningStageConfig
    others: OtherVision

    def grammar(self, meta: Mapping[str, str]) -> Grammar | None:
        """Plans, or anything."""
        if not self.config.constrained:
            return None
        form = PlanForm.from_meta(meta)
        bounds = (Range(*self.config.x_range_m), Range(*self.config.y_range_m))
        return plan_grammar(
            self.vla.tokenizer, *bounds, form.decimals, signed_zero=form.signed_zero
        )

    @property
    def samples(self) -> int:
        """Plans that are drawn for one key-frame."""
        return self.config.samples

    @property
    def temperature(self) -> float:
        """Of the draws."""
        return self.config.temperature

    @property
    def drafting(self) -> Drafting | None:
        """How constrained plans are guessed."""
        return self.config.drafting if self.config.constrained else None

    def settle(
        self, texts: Sequence[str], conversation: Conversation, batch: Batch, row: int
    ) -> str:
        """The middle of the plans drawn."""
        if self.samples == 1:
            return texts[0]
        assert batch.ego is not None
        form = PlanForm.from_meta(conversation.meta)
        return median_plan(texts, form, batch.ego.last_step[row].cpu())

    def on_test_epoch_start(self) -> None:
        """Streams start anew."""
        super().on_test_epoch_start()
        self.others = OtherVision()

    def predict_rows(self, batch: Batch) -> list[Record]:
        """One plan a key-frame, and one for everything that is hidden in turn."""
        records = self.answers(batch)
        seen = self.seen
        for ablation in self.config.ablations:
            changed = self._ablated(batch, ablation, seen)
            records += [{**record, "kind": KIND_OF[ablation]} for record in changed]
        return records

    def _ablated(self, batch: Batch, ablation: Ablation, seen: Perception | None) -> list[Record]:
        if ablation == "no_vision":
            return self.answers(batch, blind=True)
        if ablation == "other_vision":
            return self.answers(self.others.swap(batch), stream=ablation)
        if batch.talk is None or batch.ego is None:
            return []
        # All dialects of an experiment's data are one.
        dialect = getattr(self.trainer.datamodule, "dialect", None)  # type: ignore[attr-defined]
        if dialect is None:
            raise UserError(f"the test {ablation!r} needs data that words its own requests")
        less = tell_less(batch, ablation, dialect, self.vla.tokenizer)
        return self.answers(less, stream=ablation, seen=seen)

    def record(self, conversation: Conversation, text: str, batch: Batch, row: int) -> Record:
        """A plan beside the path that was driven (from the poses, with its mask)."""
        if batch.plan is None or batch.ego is None:
            raise UserError(f"the batch of {conversation.id} lacks plan targets or ego state")
        form = PlanForm.from_meta(conversation.meta)
        plan = parse_waypoints(text, form, batch.ego.last_step[row].cpu())
        return {
            **super().record(conversation, text, batch, row),
            "waypoints": None if isinstance(plan, ParseFailure) else plan.xy.round(4).tolist(),
            "failure": plan.reason if isinstance(plan, ParseFailure) else None,
            "reference": batch.plan.waypoints[row].tolist(),
            "mask": batch.plan.mask[row].tolist(),
        }
