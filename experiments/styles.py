"""Other systems' distinguishing ideas as experiments on the town, each a change of `tiny`.

`*_style` says that the idea is here, not the original: sizes, data and training are this toolkit's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.schema import ExperimentConfig
from experiments.tiny import tiny, tiny_no_agents
from odvla.encoders.lidar_pillars import LidarPillarsConfig
from odvla.encoders.lift_splat import LiftSplatConfig
from odvla.encoders.vision_patches import VisionPatchesConfig
from odvla.queries.scene import SceneSamplerConfig


def lift_splat() -> ExperimentConfig:
    """`tiny` with another road to the bird's-eye view: a depth distribution a pixel (LSS)."""
    return _with_encoder("lift_splat", tiny(), LiftSplatConfig())


def lidar_llm_style() -> ExperimentConfig:
    """LiDAR-LLM: the language model sees the bird's-eye view of the lidar, and no camera."""
    return _with_encoder("lidar_llm_style", tiny(), LidarPillarsConfig())


def emma_style() -> ExperimentConfig:
    """EMMA: patches of the camera images go to the language model; no view from above, no queries.

    There is nothing to supervise before the language model, so there is no stage 0, and all of the
    encoder trains in stages 1 to 3.
    """
    base = tiny_no_agents()
    sampler = SceneSamplerConfig(source="levels", rows=3, columns=5, pooling="mean")
    changed: dict[str, Any] = {}
    for name in ("alignment", "instruction", "planning"):
        stage: Any = base.stages.of(name)
        freeze = replace(stage.freeze, train=(*stage.freeze.train, "encoder.*"))
        changed[name] = replace(stage, freeze=freeze, remember_tokens=False)
    return replace(
        base,
        name="emma_style",
        model=replace(base.model, encoder=VisionPatchesConfig(), queries=(sampler,)),
        data=replace(
            base.data,
            alignment=replace(base.data.alignment, streams=("scene",)),
        ),
        stages=replace(base.stages, **changed),
        run=("alignment", "instruction", "planning"),
    )


def _with_encoder(name: str, base: ExperimentConfig, encoder: Any) -> ExperimentConfig:
    """An experiment under another name, with another encoder."""
    return replace(base, name=name, model=replace(base.model, encoder=encoder))
