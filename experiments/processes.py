"""The processes of a training that spans machines meet before anything is decided.

On one machine Lightning starts the other processes itself, when the first one has made data,
tokenizer and folders ready. torchrun and srun start all of them at once: so they join here first,
and the first goes ahead wherever something is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from experiments.schema import TrainerConfig
from odvla.errors import UserError

# How long the others wait while the first makes a town or converts TOD3Cap's captions.
PATIENCE = timedelta(hours=2)


def join_processes(settings: TrainerConfig, *, any_number: bool = False) -> None:
    """Form the process group that torchrun or srun started this process for, if one did.

    Args:
        settings: how many machines and processes the experiment wants.
        any_number: what is to be done is the same by any number of processes, unlike training.

    Raises:
        UserError: another number of processes was started, or several machines are wanted and
            neither torchrun nor srun started this process.
    """
    launcher = _launcher()
    if launcher is None or launcher.world_size() == 1:
        if settings.nodes > 1 and not any_number and not torch.distributed.is_initialized():
            raise UserError(
                f"trainer.nodes={settings.nodes} needs torchrun or srun to start a process for "
                "each device (docs/multi-node.md)"
            )
        return
    if launcher.world_size() != settings.processes and not any_number:
        raise UserError(
            f"{launcher.world_size()} processes were started, but trainer.nodes={settings.nodes} "
            f"times trainer.devices={settings.devices} makes {settings.processes}"
        )
    if torch.distributed.is_initialized():
        return
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launcher.local_rank())
    os.environ["MASTER_ADDR"] = launcher.main_address
    os.environ["MASTER_PORT"] = str(launcher.main_port)
    torch.distributed.init_process_group(
        # Decisions are passed on through gloo: no GPU is touched before the training starts.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        rank=launcher.global_rank(),
        world_size=launcher.world_size(),
        timeout=PATIENCE,
    )


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process through the block, then the others."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not together or torch.distributed.get_rank() == 0
    if together and not first:
        torch.distributed.barrier()
    yield
    if together and first:
        torch.distributed.barrier()


def _launcher() -> ClusterEnvironment | None:
    """What started this process; None: a person, or Lightning."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment()
    return None
