"""Sweeps that come with the toolkit: the paper's ablations, on the town."""

from __future__ import annotations

from dataclasses import replace

from experiments.schema import ExperimentConfig
from experiments.sweeps.definition import Axis, Sweep, settings
from experiments.tiny import smoke, tiny


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


def without_ego_state(base: ExperimentConfig) -> ExperimentConfig:
    """Neither ego state nor history, in text or as a token."""
    return replace(
        base,
        model=replace(base.model, ego_token=False),
        dialect=replace(base.dialect, without=(*base.dialect.without, "ego")),
    )
