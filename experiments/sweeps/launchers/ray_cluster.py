"""Tasks on a Ray cluster: for sweeps that have outgrown one machine.

Every machine of the cluster needs this package, and the runs and data folders at the same paths.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import Future
from typing import Any

from experiments.sweeps.definition import Resources
from experiments.sweeps.graph import Task
from odvla.errors import UserError


class RayCluster:
    """Tasks as Ray tasks; a worker that dies takes one attempt of its task with it, no more.

    Args:
        job: arguments of `do_job`, less the task's name.
        resources: of one task.
        address: of the cluster; None: the one RAY_ADDRESS names, or one started here.

    Raises:
        UserError: ray is not installed, or the cluster has no place for a task.
    """

    def __init__(
        self, job: tuple[Any, ...], resources: Resources, address: str | None = None
    ) -> None:
        require_ray()
        import ray

        self._own = not ray.is_initialized()
        if self._own:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        self._job = job
        # Failed attempts are counted by the schedule, which knows a user's mistake from a crash.
        self._remote: Any = ray.remote(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0
        )(do_job)
        total = ray.cluster_resources()
        places = total.get("CPU", 0) // resources.cpus
        if resources.gpus:
            places = min(places, total.get("GPU", 0) // resources.gpus)
        if places < 1:
            self.close()
            raise UserError(
                f"a task wants {resources.cpus} CPUs and {resources.gpus} GPUs, but the Ray "
                f"cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}"
            )
        self.capacity = int(places)

    def submit(self, task: Task) -> Future[None]:
        """Hand a task to the cluster."""
        return self._remote.remote(*self._job, task.id).future()

    def close(self) -> None:
        """Let go of the cluster; one that was started here ends."""
        import ray

        if self._own:
            ray.shutdown()


def require_ray() -> None:
    """Check that Ray can be imported.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "the ray launcher needs Ray, which is not installed: pip install 'odvla[ray]'"
        )


def do_job(*arguments: str) -> None:
    """On a worker: what `sweep-task` does on a command line.

    Raises:
        Exception: what stopped the task.
    """
    from experiments.cli import build_parser

    options = build_parser().parse_args(["sweep-task", *arguments])
    options.run(options)
