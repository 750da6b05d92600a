"""How several processes share the work: Lightning's strategies by name.

| name | what a process holds |
|---|---|
| ddp | everything |
| fsdp2 | its part of weights, gradients and optimiser state |
| deepspeed_2 | the weights, its part of gradients and optimiser state |

DeepSpeed's third stage is not among them: fsdp2 shares the same, and its parts are put together for
a handoff.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy

from experiments.schema import ExperimentConfig, TrainerConfig
from odvla.errors import UserError


def check_sharing(config: ExperimentConfig) -> None:
    """Refuse a strategy that cannot run here, before anything is done for it.

    Raises:
        UserError: DeepSpeed is wanted and not installed, or without a GPU, or with Muon.
    """
    settings = config.trainer
    name = settings.sharing
    if name != "deepspeed_2":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy {name} needs DeepSpeed: install the extra with "
            "pip install 'odvla[deepspeed]', or set trainer.strategy=fsdp2"
        )
    if settings.accelerator == "cpu" or not torch.cuda.is_available():
        raise UserError(
            f"trainer.strategy {name} needs GPUs, and there is none to use; set "
            "trainer.strategy=fsdp2 or ddp"
        )
    for stage in config.run:
        if config.stages.of(stage).optimiser.muon > 0:
            raise UserError(
                f"trainer.strategy {name} makes one long vector of all weights, and "
                f"stages.{stage}.optimiser.muon needs them as matrices: set it to 0, or "
                "trainer.strategy=fsdp2"
            )


class WholeWeights(DeepSpeedPrecision):
    """Weights and batches stay in fp32, as with the other strategies.

    Lightning's bf16-mixed would hand DeepSpeed a model that it casts as a whole, frozen parameters
    too, and would convert the numbers of every batch. Here layers are cast by autocast alone.
    """

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_input(self, data: Any) -> Any:
        """The batch as it is."""
        return data


def _deepspeed_2(precision: str) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(stage=2, precision_plugin=WholeWeights())
    assert isinstance(strategy.config, dict)
    if precision == "bf16-mixed":
        strategy.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return strategy


def strategy_of(settings: TrainerConfig) -> Any:
    """The strategy of a stage's training (see `check_sharing`)."""
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
    if name == "deepspeed_2":
        return _deepspeed_2(settings.precision)
    return "auto"


def is_sharded(settings: TrainerConfig) -> bool:
    """Whether no process holds all weights in training."""
    return settings.sharing == "fsdp2"


def evaluation_strategy(settings: TrainerConfig) -> Any:
    """The strategy of an evaluation, where every process has a whole model."""
    return DDPStrategy() if settings.processes > 1 else "auto"
