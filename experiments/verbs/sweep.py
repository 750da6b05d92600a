"""The verbs of sweeps: `sweep`, and `sweep-task`, which launchers call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.verbs.parser import (
    EXIT_FAILED,
    EXIT_OK,
    Verbs,
    add_places,
    add_verb,
    quiet_libraries,
    runs_of,
)
from odvla.errors import UserError

if TYPE_CHECKING:
    from experiments.sweeps.graph import SweepPlan
    from experiments.sweeps.schedule import Engine

LAUNCHERS = ("in-process", "processes", "slurm", "ray")


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    sweep = add_verb(
        verbs,
        "sweep",
        "train and evaluate every point of a sweep that is not finished",
        "sweep smoke_sweep --launcher processes --workers 2",
        run_sweep,
    )
    _add_sweep(sweep)
    sweep.add_argument("--launcher", choices=LAUNCHERS, default="in-process")
    sweep.add_argument("--workers", type=int, default=2, help="tasks at once (processes)")
    sweep.add_argument("--retries", type=int, default=1, help="attempts after a crash (default 1)")
    sweep.add_argument("--address", help="of a Ray cluster (default: $RAY_ADDRESS, or a local one)")
    sweep.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="e.g. --sbatch=--mem=32G"
    )
    sweep.add_argument("--dry-run", action="store_true", help="show points and tasks, make nothing")
    task = add_verb(
        verbs,
        "sweep-task",
        "do one task of a sweep; launchers call this",
        "sweep-task smoke_sweep perception-0123456789",
        run_one_task,
    )
    _add_sweep(task)
    task.add_argument("task", help="its id, see <sweep>/sweep.json")
    task.add_argument("--mlflow-parent", help="id of the sweep's MLflow run")


def run_sweep(options: argparse.Namespace) -> int:
    """Settle the plan, then do its tasks."""
    from experiments.handoff import read_card
    from experiments.sweeps.definition import base_of
    from experiments.sweeps.graph import write_manifest
    from experiments.sweeps.schedule import run_tasks
    from experiments.sweeps.shared_stages import take_over
    from experiments.sweeps.validation import validate
    from experiments.sweeps.view import SweepView
    from experiments.sweeps.work import close_sweep_run

    quiet_libraries()
    console = Console(highlight=False)
    _check_launcher(options)
    plan = _plan(options, dry_run=options.dry_run)
    if options.dry_run:
        console.print(_overview(plan))
        for folder in plan.missing:
            console.print(
                f"{folder} does not hold the data yet: names of tasks will be others",
                soft_wrap=True,
            )
        return EXIT_OK
    validate(plan)
    base = base_of(plan.sweep, plan.overrides)
    write_manifest(plan, base)
    for task, folder in take_over(plan, runs_of(options)).items():
        made_by = read_card(folder).git_commit
        console.print(f"kept     {task:<26} of {folder} (commit {made_by[:9]})", soft_wrap=True)
    if options.launcher == "slurm":
        return _submit(plan, options, console)
    engine = _engine(plan, options)
    try:
        live = options.launcher != "in-process"
        with SweepView(console, plan, live=live) as watch:
            board = run_tasks(
                plan.tasks, plan.is_done, engine, retries=options.retries, watch=watch
            )
    except BaseException as error:
        close_sweep_run(plan, runs_of(options), error)
        raise
    finally:
        engine.close()
    close_sweep_run(plan, runs_of(options))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in board.counts().items())
    console.print(f"{len(plan.points)} points, {len(plan.tasks)} tasks: {counts}")
    return EXIT_FAILED if board.failed else EXIT_OK


def run_one_task(options: argparse.Namespace) -> None:
    """Do one task."""
    from experiments.sweeps.work import run_task

    quiet_libraries()
    plan = _plan(options)
    run_task(plan, runs_of(options), plan.task(options.task), mlflow_parent=options.mlflow_parent)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help="a name from `list`, or package.module:function")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="key=value",
        help="change the base, e.g. --set stages.planning.steps=10",
    )
    parser.add_argument(
        "--seed",
        dest="seeds",
        action="append",
        type=int,
        metavar="N",
        help="instead of the seeds declared; once for each",
    )
    parser.add_argument("--data", metavar="ROOT", help="data root (default: $ODVLA_DATA, or data)")
    add_places(parser)


def _plan(options: argparse.Namespace, *, dry_run: bool = False) -> SweepPlan:
    from experiments.find import find_sweep
    from experiments.sweeps.graph import plan_sweep

    sweep = find_sweep(options.sweep)
    if options.seeds:
        sweep = replace(sweep, seeds=tuple(options.seeds))
    return plan_sweep(
        sweep, options.sweep, runs_of(options), options.overrides, options.data, dry_run=dry_run
    )


def _check_launcher(options: argparse.Namespace) -> None:
    """Find out that an engine is missing before anything is done."""
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, not {options.workers}")
    if options.launcher == "ray":
        from experiments.sweeps.launchers.ray_cluster import require_ray

        require_ray()
    if options.launcher == "slurm" and not options.dry_run:
        from experiments.sweeps.launchers.slurm import require_slurm

        require_slurm()


def _arguments(options: argparse.Namespace) -> tuple[str, ...]:
    """What `sweep-task` needs to find the same plan, less the task."""
    given = [options.sweep, "--runs", str(runs_of(options).resolve())]
    data = options.data or os.environ.get("ODVLA_DATA")
    if data:
        given += ["--data", str(Path(data).expanduser().resolve())]
    for seed in options.seeds or ():
        given += ["--seed", str(seed)]
    for override in options.overrides:
        given += ["--set", override]
    return tuple(given)


def _engine(plan: SweepPlan, options: argparse.Namespace) -> Engine:
    from experiments.sweeps.launchers.local import InProcess, Processes, task_command
    from experiments.sweeps.launchers.ray_cluster import RayCluster
    from experiments.sweeps.work import open_sweep_run, run_task

    runs = runs_of(options)
    parent = open_sweep_run(plan, runs)
    arguments = _arguments(options)
    more = ("--mlflow-parent", parent)
    memories: dict[str, Any] = {}
    engines: Mapping[str, Callable[[], Engine]] = {
        "in-process": lambda: InProcess(
            lambda task: run_task(
                plan, runs, task, progress=True, memories=memories, mlflow_parent=parent
            )
        ),
        "processes": lambda: Processes(
            task_command(["sweep-task", *arguments, *more]),
            plan.task_folder,
            options.workers,
            plan.sweep.resources,
        ),
        "ray": lambda: RayCluster((*arguments, *more), plan.sweep.resources, options.address),
    }
    return engines[options.launcher]()


def _submit(plan: SweepPlan, options: argparse.Namespace, console: Console) -> int:
    from experiments.sweeps.launchers.local import task_command
    from experiments.sweeps.launchers.slurm import submit, write_script
    from experiments.sweeps.work import open_sweep_run

    parent = open_sweep_run(plan, runs_of(options))
    command = task_command(["sweep-task", *_arguments(options), "--mlflow-parent", parent])
    script = write_script(plan, command, plan.sweep.resources, options.sbatch)
    console.print(f"script: {script}", soft_wrap=True)
    console.print(submit(script), markup=False)
    return EXIT_OK


def _overview(plan: SweepPlan) -> Table:
    """Points, and which of their stages they share."""
    table = Table(title=f"{plan.sweep.name}: {len(plan.points)} points, {len(plan.tasks)} tasks")
    for axis in plan.sweep.axes:
        table.add_column(axis.name)
    for column in ("seed", "point", "tasks (shared ones once)"):
        table.add_column(column)
    seen: set[str] = set()
    for point in plan.points:
        chain = plan.stage_tasks(point)
        words = [f"({task.id})" if task.id in seen else task.id for task in chain]
        seen |= {task.id for task in chain}
        table.add_row(*point.labels, str(point.seed), point.id, " ".join(words))
    return table
