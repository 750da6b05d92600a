"""Sweeps that come with the toolkit: the paper's ablations, on the town."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.schema import ExperimentConfig
from experiments.styles import with_lift_splat, with_patches, with_pillars
from experiments.sweeps.definition import Axis, Sweep, settings
from experiments.tiny import smoke, tiny
from odvla.planner import PlannerConfig


def stages_table() -> Sweep:
    """The paper's Table V: which stages stand before planning."""
    return Sweep("stages_table", tiny, (STAGES_BEFORE_PLANNING,), seeds=(0, 1, 2))


def inputs_table() -> Sweep:
    """The paper's Table IV: trained without ego state, history, vision or command."""
    return Sweep(
        "inputs_table",
        tiny,
        (
            Axis(
                "inputs",
                {
                    "all": (),
                    "no ego state": without_ego_state,
                    "no history": ("model.ego_token_history=false",),
                    "no vision": ("model.hidden_streams=[scene,track,map]",),
                    "no command": ("dialect.without=[command]",),
                },
            ),
        ),
        seeds=(0, 1, 2),
    )


def streams_table() -> Sweep:
    """Which tokens planning needs: each stream alone, beside all of them."""
    return Sweep(
        "streams_table",
        tiny,
        (
            Axis(
                "tokens",
                {
                    "scene, agent, map": (),
                    "scene": ("model.hidden_streams=[track,map]",),
                    "agent": ("model.hidden_streams=[scene,map]",),
                    "map": ("model.hidden_streams=[scene,track]",),
                },
            ),
        ),
        seeds=(0, 1, 2),
    )


def sizes_table() -> Sweep:
    """Width and depth of the language model."""
    return Sweep(
        "sizes_table",
        tiny,
        (
            Axis(
                "language model",
                {
                    "3 x 128": (),
                    "2 x 64": (
                        "model.language.hidden=64",
                        "model.language.layers=2",
                        "model.language.heads=2",
                        "model.language.kv_heads=1",
                        "model.language.intermediate=160",
                    ),
                    "4 x 160": (
                        "model.language.hidden=160",
                        "model.language.layers=4",
                        "model.language.heads=5",
                        "model.language.kv_heads=5",
                        "model.language.intermediate=448",
                    ),
                },
            ),
        ),
        seeds=(0, 1, 2),
    )


def actions_table() -> Sweep:
    """What form a plan takes: four of text and tokens, and regressions beside and behind them.

    All share stages 0 to 2.5: prompts and vocabulary are the same, and each model has the action
    tokens and the planner, whether or not it plans with them.
    """
    return Sweep("actions_table", _tiny_for_all_actions, (ACTIONS,), seeds=(0, 1, 2))


def encoders_table() -> Sweep:
    """What sees: a bird's-eye view by deformable attention, lifted pixels, patches, or lidar.

    Patches have no view from above, and so no stage 0, no agents and no stage 2.5.
    """
    return Sweep(
        "encoders_table",
        tiny,
        (
            Axis(
                "encoder",
                {
                    "deformable BEV": (),
                    "lift-splat BEV": with_lift_splat,
                    "patches": with_patches,
                    "lidar pillars": with_pillars,
                },
            ),
        ),
        seeds=(0, 1, 2),
    )


def smoke_sweep() -> Sweep:
    """Every part of a sweep once, a few steps a stage: does it run at all?"""
    return Sweep(
        "smoke_sweep",
        smoke,
        (STAGES_BEFORE_PLANNING, settings("stages.planning.steps", 3, 2)),
    )


STAGES_BEFORE_PLANNING = Axis(
    "stages",
    {
        "1+2+2.5+3": (),
        "1+2+3": ("run=[perception,alignment,instruction,planning]",),
        "1+3": ("run=[perception,alignment,planning]",),
        "3": ("run=[perception,planning]",),
    },
)


# Text of positions and offsets has more digits than the changes that `tiny` writes.
LONGER = "stages.planning.max_new_tokens=110"
OWN_RANGES = ("stages.planning.x_range_m=null", "stages.planning.y_range_m=null")
ACTIONS = Axis(
    "actions",
    {
        "waypoints": ("stages.planning.actions=points", LONGER, *OWN_RANGES),
        "offsets": ("stages.planning.actions=offsets", LONGER, *OWN_RANGES),
        "changes of offsets": ("stages.planning.actions=changes",),
        "action tokens": ("stages.planning.actions=tokens",),
        "regression": (
            "stages.planning.actions=regression",
            "stages.planning.planner_reads=[scene,track,map]",
            "stages.planning.freeze.train=[planner.*]",
        ),
        "regression from the language model": (
            "stages.planning.actions=regression",
            "stages.planning.planner_reads=[language]",
            "stages.planning.freeze.train=[planner.*,projectors.*,language.*]",
        ),
    },
)


def _tiny_for_all_actions() -> ExperimentConfig:
    """`tiny` with all that any form needs; a planner for what the language model reads or makes."""
    base = tiny()
    planning: Any = base.stages.planning
    rates = replace(planning.optimiser.lr, planner=1e-3)
    optimiser = replace(planning.optimiser, lr=rates)
    planner = PlannerConfig(reads=("scene", "track", "map", "language"))
    return replace(
        base,
        tokenizer=replace(base.tokenizer, action_tokens=256),
        model=replace(base.model, planner=planner),
        stages=replace(base.stages, planning=replace(planning, optimiser=optimiser)),
    )


def without_ego_state(base: ExperimentConfig) -> ExperimentConfig:
    """Neither ego state nor history, in text or as a token."""
    return replace(
        base,
        model=replace(base.model, ego_token=False),
        dialect=replace(base.dialect, without=(*base.dialect.without, "ego")),
    )
