"""How several processes share the work: Lightning's strategies by name.

| name | what a process holds |
|---|---|
| ddp | everything |
| fsdp2 | its part of weights, gradients and optimiser state |
| deepspeed_2 | the weights, its part of gradients and optimiser state |
| deepspeed_3 | its part of everything |
"""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy

from experiments.schema import TrainerConfig
from odvla.errors import UserError


def strategy_of(settings: TrainerConfig) -> Any:
    """The strategy of a stage's training.

    Raises:
        UserError: DeepSpeed is wanted and not installed.
    """
    name = settings.sharing
    if name == "ddp":
        # Which parameters a batch uses depends on its texts: one without <MAP> leaves the map
        # projector without a gradient.
        return DDPStrategy(find_unused_parameters=True)
    if name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=settings.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    if name.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                f"trainer.strategy {name} needs DeepSpeed: install the extra with "
                "pip install 'odvla[deepspeed]', or set trainer.strategy=fsdp2"
            )
        return DeepSpeedStrategy(stage=int(name[-1]))
    return "auto"


def is_sharded(settings: TrainerConfig) -> bool:
    """Whether no process holds all weights in training."""
    return settings.sharing in ("fsdp2", "deepspeed_3")


def evaluation_strategy(settings: TrainerConfig) -> Any:
    """The strategy of an evaluation, where every process has a whole model."""
    return DDPStrategy() if settings.processes > 1 else "auto"
