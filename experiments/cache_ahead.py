"""Feature caches made before the stages that learn from them."""

from __future__ import annotations

import logging

import torch

from callbacks.feature_cache import FeatureCache
from experiments.handoff import CARD
from experiments.pipeline import Pipeline
from experiments.schema import ExperimentConfig
from experiments.stage_run import StageRun
from odvla.errors import UserError
from stages.talk import TalkConfig

log = logging.getLogger(__name__)


def caching_stages(config: ExperimentConfig) -> list[str]:
    """Stages of an experiment that could learn from a cache: they read images and talk."""
    return [
        stage
        for stage in config.run
        if stage != "language" and isinstance(config.stages.of(stage), TalkConfig)
    ]


def cache_ahead(pipeline: Pipeline, stage: str = "") -> FeatureCache:
    """Make a stage's cache with the weights that the stage will start from.

    All processes that torchrun or srun started take part, each with the device that is its own.

    Args:
        pipeline: the experiment.
        stage: which; "": the first one that talks about images. Later ones share its cache where
            encoder, queries and how they are shown the key-frames stay the same.

    Raises:
        UserError: there is no such stage, the one before it is not finished, or the stage cannot
            learn from a cache.
    """
    config = pipeline.shop.config
    stages = caching_stages(config)
    stage = stage or (stages[0] if stages else "")
    if stage not in stages:
        raise UserError(
            f"stage {stage!r} of {config.name} cannot learn from a cache, only "
            f"{', '.join(stages) or 'none'}"
        )
    if stage not in pipeline.stages:
        raise UserError(f"stage {stage} comes before the handoff {pipeline.parent}")
    number = pipeline.stages.index(stage)
    parent = pipeline.shop.folder / pipeline.stages[number - 1] if number else pipeline.parent
    if parent is not None and not (parent / CARD).is_file():
        raise UserError(
            f"stage {stage} starts from {parent}, which is not finished; fit that stage first, "
            f"e.g. with 'run=[{','.join(config.run[:number])}]'"
        )
    device = torch.device("cpu")
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # see join_processes
    if config.trainer.processes > 1 and not torch.distributed.is_initialized():
        log.info("one process does it all; torchrun or srun starts more (docs/multi-node.md)")
    return StageRun(pipeline.shop, stage, parent).cache(device)
