"""Experiments that a laptop can run, on a generated town, and ablations of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datamodules.agent_trajectories import AgentTrajectoriesConfig
from datamodules.alignment import AlignmentConfig
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.mixture import MixtureConfig
from datamodules.nuscenes import NuScenesDataConfig
from experiments.schema import (
    DataConfig,
    ExperimentConfig,
    StagesConfig,
    TokenizerConfig,
    TownSettings,
    TrainerConfig,
)
from odvla.encoders.deformable_bev import DeformableBEVConfig
from odvla.encoders.image_backbone import ImageBackboneConfig
from odvla.freezing import FreezePlan
from odvla.language.causal_lm import LanguageConfig
from odvla.language.prompts import Dialect
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.map import MapQueriesConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.vla import VLAConfig
from stages.alignment import AlignmentStageConfig
from stages.instruction import InstructionStageConfig
from stages.interaction import InteractionStageConfig
from stages.optimisation import LearningRates, OptimiserConfig
from stages.perception import PerceptionStageConfig
from stages.planning import PlanningStageConfig

# Everything here learns from nothing, so the rates are far above the paper's, which are for a
# pretrained Qwen2.5 and a pretrained UniAD.
SEE = OptimiserConfig(
    lr=LearningRates(backbone=3e-3, encoder=3e-3, queries=3e-3),
    warmup=0.08,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    muon=6.0,
    muon_components=("backbone", "encoder", "queries"),
)
SPEAK = OptimiserConfig(
    lr=LearningRates(projectors=5e-4, language=5e-4),
    warmup=0.05,
    final_lr=0.05,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    muon=10.0,
    # Projectors, too: at AdamW's rate they hardly move while the language model turns over.
    muon_components=("projectors", "language"),
)
# Scenes of a town of 75 that are evaluated side by side: all of its val split.
VAL_SCENES = 13
# The paper's stage 3 trains encoder and queries, too. Frozen, what they see is computed once, which
# makes a step six times as fast; at this size that is worth more (see docs/decisions.md).
HEAR_AND_SPEAK = FreezePlan(("projectors.*", "language.*"))


def tiny() -> ExperimentConfig:
    """All stages in some twelve minutes on two slow cores, on a town of 75 scenes."""
    size = (160, 90)
    talk: dict[str, Any] = {"batch_size": 8, "eval_batch_size": VAL_SCENES, "eval_frames_stride": 8}
    return ExperimentConfig(
        name="tiny",
        model=VLAConfig(
            encoder=DeformableBEVConfig(),
            queries=(
                # The road ahead, cell by cell: the part of the scene that a plan hangs on.
                SceneSamplerConfig(
                    source="bev", rows=5, columns=4, pooling="mean", region_m=(-16, 16, -8, 32)
                ),
                # Tokens of weak tracks, too: half of the cars ahead never score 0.25.
                AgentQueriesConfig(max_tokens=16, score_threshold=0.12, birth_threshold=0.25),
                MapQueriesConfig(queries=12, max_tokens=8),
            ),
            language=LanguageConfig(
                hidden=128, layers=3, heads=4, kv_heads=2, intermediate=320, length_groups=4
            ),
            ego_token=True,
        ),
        data=DataConfig(
            version="v1.0-trainval",
            image_size=size,
            cache_images=True,
            perception=NuScenesDataConfig(
                targets=("agents", "map"), clip_length=2, batch_size=4, eval_batch_size=VAL_SCENES
            ),
            alignment=AlignmentConfig(
                **talk, conversations_per_frame=3, eval_conversations_per_frame=2
            ),
            instruction=MixtureConfig(
                **talk, conversations_per_frame=4, eval_conversations_per_frame=6
            ),
            interaction=AgentTrajectoriesConfig(
                **talk, conversations_per_frame=3, eval_conversations_per_frame=6
            ),
            planning=GPTDriverConfig(
                batch_size=24,
                eval_batch_size=VAL_SCENES,
                whole_futures_only=True,
            ),
        ),
        tokenizer=TokenizerConfig(vocab_size=768, max_conversations=2500),
        dialect=Dialect("compact"),
        stages=StagesConfig(
            perception=PerceptionStageConfig(optimiser=SEE, steps=250, gradient_clip=5.0),
            # The paper's stage 1 trains projectors alone, for a language model that can speak.
            alignment=AlignmentStageConfig(
                freeze=HEAR_AND_SPEAK,
                optimiser=SPEAK,
                steps=80,
                max_new_tokens=48,
                remember_tokens=True,
            ),
            instruction=InstructionStageConfig(
                optimiser=SPEAK, steps=120, max_new_tokens=48, remember_tokens=True
            ),
            interaction=InteractionStageConfig(
                optimiser=SPEAK, steps=60, max_new_tokens=64, remember_tokens=True
            ),
            planning=PlanningStageConfig(
                freeze=HEAR_AND_SPEAK,
                optimiser=SPEAK,
                steps=600,
                max_new_tokens=64,
                remember_tokens=True,
                # Change of motion a half second, see compact.yaml.
                x_range_m=(-6.0, 6.0),
                y_range_m=(-9.0, 9.0),
            ),
        ),
        town=TownSettings(scenes=75, image_size=size),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def smoke() -> ExperimentConfig:
    """Every part of `tiny` once, a few steps a stage: does it run at all?"""
    base = tiny()
    encoder = DeformableBEVConfig(
        backbone=ImageBackboneConfig(widths=(8, 8, 16, 16)),
        dim=16,
        rows=16,
        columns=16,
        cell_m=4.0,
        layers=1,
        heads=2,
    )
    language = LanguageConfig(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64)
    queries = (
        SceneSamplerConfig(source="bev", rows=2, columns=2),
        # Untrained scores and places are as good as any, or stage 2.5 would have nobody to tell of.
        AgentQueriesConfig(
            queries=8,
            carried=8,
            max_tokens=4,
            layers=1,
            heads=2,
            score_threshold=0.0,
            birth_threshold=0.0,
        ),
        MapQueriesConfig(queries=4, max_tokens=4, layers=1, heads=2),
    )
    return replace(
        base,
        name="smoke",
        model=replace(
            base.model, encoder=encoder, queries=queries, language=language, object_match_m=50.0
        ),
        stages=_with_steps(base, dict.fromkeys(base.run, 3)),
        data=replace(
            base.data,
            version="v1.0-mini",
            planning=replace(base.data.planning, eval_frames_stride=8),
        ),
        town=TownSettings(scenes=10, image_size=base.data.image_size),
        pictures=1,
    )


def small() -> ExperimentConfig:
    """`tiny` for longer, with a larger language model, on a town of 200 scenes."""
    base = tiny()
    steps = {
        "perception": 750,
        "alignment": 200,
        "instruction": 400,
        "interaction": 150,
        "planning": 1500,
    }
    language = replace(
        base.model.language, hidden=160, layers=4, heads=5, kv_heads=5, intermediate=448
    )
    return replace(
        base,
        name="small",
        model=replace(base.model, language=language),
        stages=_with_steps(base, steps),
        # Seed 2: a town that nothing was ever tuned on.
        town=replace(base.town or TownSettings(), scenes=200, seed=2),
    )


def tiny_no_agents() -> ExperimentConfig:
    """Ablation of `tiny`: no agent queries, and so no object captions and no stage 2.5."""
    return replace(without_agents(tiny()), name="tiny_no_agents")


def without_agents(base: ExperimentConfig) -> ExperimentConfig:
    """An experiment without agent queries, and without what needs them."""
    scene, _, map_queries = base.model.queries
    return replace(
        base,
        model=replace(base.model, queries=(scene, map_queries)),
        data=replace(
            base.data,
            perception=replace(base.data.perception, targets=("map",)),
            alignment=replace(base.data.alignment, streams=("map", "scene")),
        ),
        run=("perception", "alignment", "instruction", "planning"),
    )


def tiny_no_ego() -> ExperimentConfig:
    """Ablation of `tiny`: neither ego state nor history, in text or as a token."""
    base = tiny()
    return replace(
        base,
        name="tiny_no_ego",
        model=replace(base.model, ego_token=False),
        dialect=replace(base.dialect, without=("ego",)),
    )


def tiny_planning_only() -> ExperimentConfig:
    """Ablation of `tiny`: planning straight after perception (the paper's row "3 only")."""
    return replace(tiny(), name="tiny_planning_only", run=("perception", "planning"))


def _with_steps(base: ExperimentConfig, steps: dict[str, int]) -> StagesConfig:
    """An experiment's stages at other lengths."""
    changed: dict[str, Any] = {
        name: replace(base.stages.of(name), steps=count) for name, count in steps.items()
    }
    return replace(base.stages, **changed)
