"""Other systems' distinguishing ideas as experiments on the town, each a change of `tiny`.

`*_style` says that the idea is here, not the original: sizes, data and training are this toolkit's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.schema import ExperimentConfig
from experiments.tiny import tiny, without_agents
from odvla.encoders.lidar_pillars import LidarPillarsConfig
from odvla.encoders.lift_splat import LiftSplatConfig
from odvla.encoders.vision_patches import VisionPatchesConfig
from odvla.freezing import FreezePlan
from odvla.planner import PlannerConfig
from odvla.queries.scene import SceneSamplerConfig
from stages.optimisation import LearningRates, OptimiserConfig
from stages.planning import Actions, PlanningStageConfig
from stages.regression import RegressionLossConfig

# A planner beside the language model that learns alone.
PLANNER_ALONE = FreezePlan(("planner.*",))
PLAN = OptimiserConfig(
    lr=LearningRates(planner=1e-3),
    warmup=0.05,
    final_lr=0.05,
    weight_decay=0.01,
    betas=(0.9, 0.98),
)


def lift_splat() -> ExperimentConfig:
    """`tiny` with another road to the bird's-eye view: a depth distribution a pixel (LSS)."""
    return replace(with_lift_splat(tiny()), name="lift_splat")


def lidar_llm_style() -> ExperimentConfig:
    """LiDAR-LLM: the language model sees the bird's-eye view of the lidar, and no camera."""
    return replace(with_pillars(tiny()), name="lidar_llm_style")


def bevformer_style() -> ExperimentConfig:
    """BEVFormer: the bird's-eye view and what is detected in it, stage 0 alone; no language."""
    return replace(tiny(), name="bevformer_style", run=("perception",))


def uniad_style() -> ExperimentConfig:
    """UniAD: after perception, the car's query reads the bird's-eye view and agents and regresses.

    No language model has a part in it. The vision half rests while the planner learns (UniAD
    freezes the encoder alone, and goes on with the losses of all tasks), and the planner is told
    the ego state, as everything else here is (UniAD's is not: `model.planner.ego_state=false`).
    """
    base = tiny()
    settings: Any = base.stages.planning
    planning = replace(
        settings,
        actions="regression",
        freeze=PLANNER_ALONE,
        optimiser=PLAN,
        remember_tokens=False,  # they are tokens, not the view
    )
    return replace(
        base,
        name="uniad_style",
        model=replace(base.model, planner=PlannerConfig()),
        stages=replace(base.stages, planning=planning),
        run=("perception", "planning"),
    )


def emma_style() -> ExperimentConfig:
    """EMMA: patches of the camera images go to the language model; no view from above, no queries.

    There is nothing to supervise before the language model, so there is no stage 0, and all of the
    encoder trains in stages 1 to 3.
    """
    return replace(with_patches(tiny()), name="emma_style")


def openvla_style() -> ExperimentConfig:
    """OpenVLA: patches of the images in, a plan of twelve action tokens of 256 bins out."""
    base = emma_style()
    return replace(
        base,
        name="openvla_style",
        tokenizer=replace(base.tokenizer, action_tokens=256),
        stages=replace(base.stages, planning=_writing(base.stages.planning, "tokens")),
    )


def openvla_oft_style() -> ExperimentConfig:
    """OpenVLA-OFT: patches in; the plan is regressed from the language model's state, by L1.

    One state, where the answer would begin, and UniAD's head on it. OpenVLA-OFT has a place for
    each number, which see one another, and an MLP.
    """
    base = emma_style()
    planning: Any = base.stages.planning
    freeze = replace(planning.freeze, train=(*planning.freeze.train, "planner.*"))
    rates = replace(planning.optimiser.lr, planner=1e-3)
    return replace(
        base,
        name="openvla_oft_style",
        # The prompt tells the ego state.
        model=replace(base.model, planner=PlannerConfig(reads=("language",), ego_state=False)),
        stages=replace(
            base.stages,
            planning=replace(
                planning,
                actions="regression",
                regression=RegressionLossConfig("l1"),
                freeze=freeze,
                optimiser=replace(planning.optimiser, lr=rates),
            ),
        ),
    )


def drivevlm_style() -> ExperimentConfig:
    """DriveVLM: patches in; the scene is described, a decision named, and then the plan written.

    Descriptions are nuCaption's, decisions are read off the driven path (odvla/language/
    decisions.py). At a test the model goes on from its own description and decision.
    """
    base = emma_style()
    planning: Any = base.stages.planning
    return replace(
        base,
        name="drivevlm_style",
        dialect=replace(base.dialect, name="reasoning"),
        data=replace(base.data, planning=replace(base.data.planning, thoughts=True)),
        stages=replace(base.stages, planning=replace(planning, max_thought_tokens=64)),
    )


def with_patches(base: ExperimentConfig) -> ExperimentConfig:
    """An experiment of patches for the language model, whose encoder learns from text alone."""
    base = without_agents(base)
    sampler = SceneSamplerConfig(source="levels", rows=3, columns=5, pooling="mean")
    changed: dict[str, Any] = {}
    for name in ("alignment", "instruction", "planning"):
        stage: Any = base.stages.of(name)
        freeze = replace(stage.freeze, train=(*stage.freeze.train, "encoder.*"))
        changed[name] = replace(stage, freeze=freeze, remember_tokens=False)
    return replace(
        base,
        model=replace(base.model, encoder=VisionPatchesConfig(), queries=(sampler,)),
        data=replace(base.data, alignment=replace(base.data.alignment, streams=("scene",))),
        stages=replace(base.stages, **changed),
        run=("alignment", "instruction", "planning"),
    )


def with_pillars(base: ExperimentConfig) -> ExperimentConfig:
    """An experiment that sees by lidar alone."""
    return replace(base, model=replace(base.model, encoder=LidarPillarsConfig()))


def with_lift_splat(base: ExperimentConfig) -> ExperimentConfig:
    """An experiment whose view from above is lifted out of the images."""
    return replace(base, model=replace(base.model, encoder=LiftSplatConfig()))


def _writing(planning: PlanningStageConfig | None, actions: Actions) -> PlanningStageConfig:
    """A planning stage that writes plans in another form; its ranges are that form's."""
    assert planning is not None
    return replace(planning, actions=actions, x_range_m=None, y_range_m=None)
