"""Stage 3, planning: where the car itself goes; all but the 2D backbone learns.

A plan may take several forms (`actions`): text of points, of offsets or of changes, action tokens,
or numbers that a planner regresses (regression.py). What the stages before hear and write does not
depend on it, so that one handoff serves all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from odvla.errors import UserError
from odvla.freezing import FreezePlan
from odvla.language.action_bins import ActionBins, ActionBinStore
from odvla.language.draft import Drafting
from odvla.language.grammar import Grammar, Range, action_grammar, plan_grammar
from odvla.language.waypoints import ParseFailure, PlanForm, median_plan, parse_waypoints
from odvla.outputs import Generation, Perception, VLAState
from odvla.types import Batch, Conversation
from odvla.vla import DrivingVLA
from stages.base import Record, StageModule, gather
from stages.optimisation import LearningRates, OptimiserConfig
from stages.plan_ablations import KIND_OF, Ablation, OtherVision, tell_less
from stages.regression import RegressionLossConfig, RegressionStage
from stages.talk import TalkConfig, TalkStage
from stages.thinking import think, thoughts_of

log = logging.getLogger(__name__)
# "": text, as the dialect has it.
Actions = Literal["", "points", "offsets", "changes", "tokens", "regression"]
# Numbers that a constrained plan may hold, x and y, where the stage does not say: offsets up to
# 200 km/h ahead and 100 to the side (the frame is that of t0, and a car may turn), changes as much.
RANGES = {
    "points": ((-99.99, 99.99), (-99.99, 99.99)),
    "offsets": ((-14.0, 14.0), (-14.0, 28.0)),
    "changes": ((-28.0, 28.0), (-28.0, 28.0)),
}
TRAINS = FreezePlan(("*",), but_not=("encoder.backbone.*",))
OPTIMISER = OptimiserConfig(lr=LearningRates(1e-5, 1e-5, 1e-5, 1e-5, 1e-5))


@dataclass(frozen=True)
class PlanningStageConfig(TalkConfig):
    """Settings of stage 3.

    The learning rates are the paper's; an unofficial training script has 2e-6 for the vision half.
    """

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER
    actions: Actions = ""  # what form plans take, see the module's head
    # Of action tokens: "fit" takes the bins of the training data and refuses weights that come with
    # others; "replace" takes them all the same; "keep" those of the weights.
    action_bins: Literal["fit", "replace", "keep"] = "fit"
    regression: RegressionLossConfig = field(default_factory=RegressionLossConfig)
    # What of model.planner.reads a regressed plan is made of; (): all. Experiments that differ here
    # alone share the stages before.
    planner_reads: tuple[str, ...] = ()
    max_thought_tokens: int = 96  # of a description, where plans are thought over
    constrained: bool = True  # only well-formed plans can be written
    # 1: the most likely text, as in the paper. More: the median of so many plans drawn at random.
    samples: int = 1
    temperature: float = 1.0  # of the draws
    # How a constrained plan is guessed before the model verifies it; what it writes is the same.
    drafting: Drafting = field(default_factory=Drafting)
    # What the numbers of a constrained plan in text may be, whatever they are; null: RANGES.
    x_range_m: tuple[float, float] | None = None
    y_range_m: tuple[float, float] | None = None
    # The test is taken once more for each of them; see plan_ablations.py.
    ablations: tuple[Ablation, ...] = ("no_vision",)

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            UserError: naming the setting and its value.
        """
        super().__post_init__()
        if self.actions not in get_args(Actions):
            known = ", ".join(name for name in get_args(Actions) if name)
            raise UserError(f"planning.actions must be one of {known}, not {self.actions!r}")
        if self.action_bins not in ("fit", "replace", "keep"):
            raise UserError(
                f"planning.action_bins must be fit, replace or keep, not {self.action_bins!r}"
            )
        if self.actions == "regression" and self.samples != 1:
            raise UserError(f"a planner regresses one plan, not planning.samples={self.samples}")
        if self.samples < 1:
            raise UserError(f"planning needs at least 1 sample, not {self.samples}")
        if not self.temperature > 0:
            raise UserError(f"planning.temperature must be positive, not {self.temperature}")
        for name in self.ablations:
            if name not in KIND_OF:
                raise UserError(f"ablations must be some of {', '.join(KIND_OF)}, not {name!r}")

    @property
    def pays_for_collisions(self) -> bool:
        """Whether the loss needs the boxes of others."""
        return self.actions == "regression" and self.regression.collision.weight > 0

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> StageModule:
        """The stage on a model.

        Raises:
            UserError: the model lacks what plans of this form need.
        """
        if self.actions == "regression":
            return RegressionStage(vla, self, total_steps, seed)
        return PlanningStage(vla, self, total_steps, seed)


class PlanningStage(TalkStage):
    """Plans of the car."""

    name = "planning"
    config: PlanningStageConfig
    others: OtherVision

    def __init__(
        self, vla: DrivingVLA, config: PlanningStageConfig, total_steps: int = 1, seed: int = 0
    ) -> None:
        super().__init__(vla, config, total_steps, seed)
        if config.actions == "tokens":
            action_grammar(vla.tokenizer)  # refuses a vocabulary without such tokens
        self.decisions: list[bool] = []  # of the test: was it the driven one?

    def setup(self, stage: str) -> None:
        """Settle the action bins, and word the data's plans by them.

        Raises:
            UserError: the weights come with bins of other data, or without any where they should.
        """
        if self.config.actions != "tokens":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        store = self.bin_store
        if stage == "fit" and self.config.action_bins != "keep":
            fitted = data.action_bins(store.count)
            if self.config.action_bins == "fit" and store.bins not in (None, fitted):
                raise UserError(
                    "the weights come with action bins of other data "
                    f"({_last_bins(store.bins)}; here {_last_bins(fitted)}): set stages.planning."
                    "action_bins=keep to plan in theirs, or =replace to learn these anew"
                )
            store.keep(fitted)
            log.info("action bins of the training plans: %s", fitted.error(*data.driven("train")))
        data.use_bins(self.bins)

    @property
    def bin_store(self) -> ActionBinStore:
        """Where the weights keep their bins."""
        assert self.vla.actions is not None  # the tokenizer has action tokens
        return self.vla.actions

    @property
    def bins(self) -> ActionBins:
        """The weights' bins.

        Raises:
            UserError: they have none.
        """
        bins = self.bin_store.bins
        if bins is None:
            raise UserError(
                "the weights have never learned plans of action tokens: they hold no action bins"
            )
        return bins

    def form(self, meta: Mapping[str, str]) -> PlanForm:
        """How a conversation's plan is written."""
        form = PlanForm.from_meta(meta)
        return replace(form, bins=self.bins) if form.values == "tokens" else form

    def grammar(self, meta: Mapping[str, str]) -> Grammar | None:
        """Plans, or anything."""
        if not self.config.constrained:
            return None
        form = PlanForm.from_meta(meta)
        if form.values == "tokens":
            return action_grammar(self.vla.tokenizer)
        x, y = RANGES[form.values]
        x, y = self.config.x_range_m or x, self.config.y_range_m or y
        return plan_grammar(
            self.vla.tokenizer, Range(*x), Range(*y), form.decimals, signed_zero=form.signed_zero
        )

    @property
    def samples(self) -> int:
        """Plans that are drawn for one key-frame."""
        return self.config.samples

    @property
    def temperature(self) -> float:
        """Of the draws."""
        return self.config.temperature

    def drafting(self, meta: Mapping[str, str]) -> Drafting | None:
        """How constrained plans are guessed; of a plan of twelve tokens, none is worth a guess."""
        tokens = meta["form"] == "tokens"
        return self.config.drafting if self.config.constrained and not tokens else None

    def write(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        blind: bool = False,
        seen: Perception | None = None,
    ) -> tuple[Generation, Batch]:
        """Plans; those that are thought over come with their thoughts."""
        if batch.talk is None or "thoughts" not in batch.talk.conversations[0].meta:
            return super().write(batch, state, blind=blind, seen=seen)
        return think(self, batch, state, blind=blind, seen=seen)

    def settle(
        self, texts: Sequence[str], conversation: Conversation, batch: Batch, row: int
    ) -> str:
        """The middle of the plans drawn."""
        if self.samples == 1:
            return texts[0]
        assert batch.ego is not None
        form = self.form(conversation.meta)
        return median_plan(texts, form, batch.ego.last_step[row].cpu())

    def on_test_epoch_start(self) -> None:
        """Streams start anew."""
        super().on_test_epoch_start()
        self.others = OtherVision()
        self.decisions = []

    def on_test_epoch_end(self) -> None:
        """Log what action bins lose, and how many decisions were those of the driver."""
        super().on_test_epoch_end()
        if self.config.actions == "tokens":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            lost = self.bins.error(*data.driven("val"))
            self.log("test/quantisation_m", lost.mean_m)
            self.log("test/quantisation_largest_m", lost.largest_m)
            self.log("test/clipped_percent", lost.clipped_percent)
        told = [right for part in gather(self.decisions) for right in part]
        if told:
            self.log("test/decision_accuracy", sum(told) / len(told))

    def predict_rows(self, batch: Batch) -> list[Record]:
        """One plan a key-frame, and one for everything that is hidden in turn."""
        records = self.answers(batch)
        seen = self.seen
        self.decisions += [
            record["decision"] == record["meta"].get("decision")
            for record in records
            if "decision" in record
        ]
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
        form = self.form(conversation.meta)
        plan = parse_waypoints(text, form, batch.ego.last_step[row].cpu())
        return {
            **super().record(conversation, text, batch, row),
            **thoughts_of(conversation),
            "waypoints": None if isinstance(plan, ParseFailure) else plan.xy.round(4).tolist(),
            "failure": plan.reason if isinstance(plan, ParseFailure) else None,
            "reference": batch.plan.waypoints[row].tolist(),
            "mask": batch.plan.mask[row].tolist(),
        }


def _last_bins(bins: ActionBins | None) -> str:
    assert bins is not None
    return f"y at 3 s from {bins.low[-1][1]:.2f} to {bins.high[-1][1]:.2f} m"
