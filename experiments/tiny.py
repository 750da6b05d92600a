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

# A language model without pre-training learns at rates far above the paper's, which are for a
# pretrained Qwen2.5.
FROM_SCRATCH = OptimiserConfig(
    lr=LearningRates(backbone=1e-4, encoder=3e-4, queries=3e-4, projectors=1e-3, language=1e-3),
    warmup=0.05,
)


def tiny() -> ExperimentConfig:
    """All stages in minutes on two cores, on a town of ten scenes."""
    size = (160, 90)
    return ExperimentConfig(
        name="tiny",
        model=VLAConfig(
            encoder=DeformableBEVConfig(dim=64, rows=32, columns=32, cell_m=2.0, layers=1),
            queries=(
                SceneSamplerConfig(source="bev", rows=4, columns=4),
                AgentQueriesConfig(queries=24, carried=24, max_tokens=16),
                MapQueriesConfig(queries=16, max_tokens=8),
            ),
            language=LanguageConfig(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=384),
        ),
        data=DataConfig(
            image_size=size,
            cache_images=True,
            perception=NuScenesDataConfig(
                targets=("agents", "map"), clip_length=2, batch_size=4, eval_batch_size=2
            ),
            alignment=AlignmentConfig(
                batch_size=8,
                eval_batch_size=2,
                conversations_per_frame=4,
                eval_conversations_per_frame=2,
                eval_frames_stride=4,
            ),
            instruction=MixtureConfig(
                batch_size=8,
                eval_batch_size=2,
                conversations_per_frame=4,
                eval_conversations_per_frame=4,
                eval_frames_stride=2,
            ),
            interaction=AgentTrajectoriesConfig(
                batch_size=8,
                eval_batch_size=2,
                conversations_per_frame=4,
                eval_conversations_per_frame=4,
                eval_frames_stride=4,
            ),
            planning=GPTDriverConfig(batch_size=8, clip_length=2, eval_batch_size=2),
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
        dialect=Dialect("compact"),
        stages=StagesConfig(
            perception=PerceptionStageConfig(optimiser=FROM_SCRATCH, steps=400),
            alignment=AlignmentStageConfig(optimiser=FROM_SCRATCH, steps=100, max_new_tokens=64),
            instruction=InstructionStageConfig(
                optimiser=FROM_SCRATCH, steps=300, max_new_tokens=64
            ),
            interaction=InteractionStageConfig(
                optimiser=FROM_SCRATCH, steps=200, max_new_tokens=96
            ),
            planning=PlanningStageConfig(
                optimiser=FROM_SCRATCH,
                steps=400,
                max_new_tokens=96,
                x_range_m=(-30.0, 30.0),
                y_range_m=(-10.0, 60.0),
            ),
        ),
        town=TownSettings(scenes=10, image_size=size),
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
        AgentQueriesConfig(queries=8, carried=8, max_tokens=4, layers=1, heads=2),
        MapQueriesConfig(queries=4, max_tokens=4, layers=1, heads=2),
    )
    return replace(
        base,
        name="smoke",
        model=replace(base.model, encoder=encoder, queries=queries, language=language),
        stages=_with_steps(base, dict.fromkeys(base.run, 3)),
        data=replace(base.data, train_scenes=2),
        pictures=1,
    )


def small() -> ExperimentConfig:
    """Larger and longer than `tiny`, on a town of 100 scenes: about an hour on two cores."""
    base = tiny()
    size = (320, 180)
    steps = {
        "perception": 3000,
        "alignment": 500,
        "instruction": 1500,
        "interaction": 1000,
        "planning": 2500,
    }
    return replace(
        base,
        name="small",
        model=replace(
            base.model,
            encoder=DeformableBEVConfig(dim=64, rows=32, columns=32, cell_m=2.0, layers=2),
            language=LanguageConfig(hidden=192, layers=4, heads=6, kv_heads=2, intermediate=576),
        ),
        data=replace(base.data, version="v1.0-trainval", image_size=size, cache_images=False),
        stages=_with_steps(base, steps),
        town=TownSettings(scenes=100, image_size=size),
    )


def tiny_no_agents() -> ExperimentConfig:
    """Ablation of `tiny`: no agent queries, and so no object captions and no stage 2.5."""
    base = tiny()
    scene, _, map_queries = base.model.queries
    return replace(
        base,
        name="tiny_no_agents",
        model=replace(base.model, queries=(scene, map_queries)),
        data=replace(
            base.data,
            perception=replace(base.data.perception, targets=("map",)),
            alignment=replace(base.data.alignment, streams=("map", "scene")),
        ),
        run=("perception", "alignment", "instruction", "planning"),
    )


def tiny_no_ego() -> ExperimentConfig:
    """Ablation of `tiny`: the prompts tell neither ego state nor history."""
    base = tiny()
    dialect = replace(base.dialect, without=("ego", "history"))
    return replace(base, name="tiny_no_ego", dialect=dialect)


def tiny_planning_only() -> ExperimentConfig:
    """Ablation of `tiny`: planning straight after perception (the paper's row "3 only")."""
    return replace(tiny(), name="tiny_planning_only", run=("perception", "planning"))


def _with_steps(base: ExperimentConfig, steps: dict[str, int]) -> StagesConfig:
    """An experiment's stages at other lengths."""
    changed: dict[str, Any] = {
        name: replace(base.stages.of(name), steps=count) for name, count in steps.items()
    }
    return replace(base.stages, **changed)
