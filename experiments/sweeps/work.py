"""Doing one task of a sweep, in whichever process it is done."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
from filelock import FileLock
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from experiments.handoff import card_sha256, fingerprint_of, git_commit
from experiments.pipeline import Pipeline
from experiments.prepare import build_model, prepare_data
from experiments.stage_run import StageRun, Workshop
from experiments.strategies import check_sharing
from experiments.sweeps.graph import FAILED, SCORE, SweepPlan, Task
from experiments.tracking import Tracker
from odvla.config import flat
from odvla.language.tokenizer import ChatTokenizer
from odvla.token_memory import TokenMemory
from odvla.weights import write_atomically

log = logging.getLogger(__name__)
STATUS, LOCK = "status.json", ".task.lock"
STATUS_EVERY_S = 2.0


class Heartbeat(Callback):
    """Says now and then how far a stage is, in a file that whoever watches the sweep can read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, unless it was written a moment ago."""
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last >= STATUS_EVERY_S:
            self._last = now
            loss = trainer.callback_metrics.get("train/loss")
            write_status(
                self.path,
                step=trainer.global_step,
                steps=trainer.max_steps,
                loss=None if loss is None else round(float(loss), 4),
            )


def write_status(path: Path, **more: Any) -> None:
    """Who works on a task, and how far it is."""
    content = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **more}
    write_atomically(path, json.dumps(content).encode())


@dataclass(frozen=True)
class SweepRuns:
    """The MLflow runs of a sweep: stages and points are children of one run."""

    runs: Path
    plan: SweepPlan
    parent_id: str | None = None

    def tags(self, task: Task) -> dict[str, Any]:
        """Tags of a task's run."""
        tags: dict[str, Any] = {"sweep": self.plan.sweep.name, "git_commit": git_commit()}
        tags["task"] = task.id
        if task.kind == SCORE:
            axes = (axis.name for axis in self.plan.sweep.axes)
            tags |= {
                f"axis.{name}": label for name, label in zip(axes, task.point.labels, strict=True)
            }
            tags["seed"] = task.point.seed
        return tags

    def tracker(self, task: Task) -> Tracker:
        """The tracker of a task."""
        return Tracker(
            self.plan.task_folder(task),
            self.runs,
            f"{self.plan.sweep.name}/{task.id}",
            active=True,
            parent_id=self.parent_id,
        )


def run_task(
    plan: SweepPlan,
    runs: Path,
    task: Task,
    *,
    progress: bool = False,
    memories: dict[str, TokenMemory] | None = None,
    mlflow_parent: str | None = None,
) -> None:
    """Do a task, unless it is done; whoever comes while another process does it waits.

    Args:
        plan: the sweep.
        runs: folder of all runs.
        task: what to do; the tasks it comes after must be done.
        progress: show a stage's progress bars.
        memories: what tasks of this process remember of frozen vision halves.
        mlflow_parent: id of the sweep's run.

    Raises:
        Exception: whatever stopped the task; it is also recorded in its folder, unless the task was
            stopped from outside (Ctrl-C, SIGTERM).
    """
    folder = plan.task_folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        if plan.is_done(task):
            return
        (folder / FAILED).unlink(missing_ok=True)
        write_status(folder / STATUS)
        tracked = SweepRuns(runs, plan, mlflow_parent)
        started = time.time()
        try:
            if task.kind == SCORE:
                _score(plan, task, tracked)
            else:
                _train(plan, task, tracked, progress, {} if memories is None else memories)
        except (KeyboardInterrupt, SystemExit):
            raise  # stopped from outside, no failure; its status stays, as after a kill
        except BaseException as error:
            _record_failure(folder / FAILED, error, started)
            (folder / STATUS).unlink(missing_ok=True)
            raise
        (folder / STATUS).unlink(missing_ok=True)


def _train(
    plan: SweepPlan,
    task: Task,
    tracked: SweepRuns,
    progress: bool,
    memories: dict[str, TokenMemory],
) -> None:
    """Train one stage from the handoff of the task before it."""
    check_sharing(task.point.config)
    shop = _workshop(plan, task, tracked, progress, memories)
    shop.tracker.start(flat(shop.config), tracked.tags(task))
    parent = plan.stage_folder(plan.task(task.after[0])) if task.after else None
    try:
        StageRun(shop, task.kind, parent).run()
    except BaseException as error:
        shop.tracker.close("", error)
        raise
    shop.tracker.close("")


def _score(plan: SweepPlan, task: Task, tracked: SweepRuns) -> None:
    """Evaluate a point: link to its stages, then what `fit` does at its end."""
    chain = plan.stage_tasks(task.point)
    folder = plan.point_folder(task.point)
    for stage in chain:
        link = folder / stage.kind
        if link.is_symlink():
            link.unlink()
        target = Path(os.path.relpath(plan.stage_folder(stage), folder))
        link.symlink_to(target, target_is_directory=True)
    lineage = {f"stage.{stage.kind}": card_sha256(plan.stage_folder(stage)) for stage in chain}
    shop = _workshop(plan, task, tracked, False, {})
    shop.write_config()
    shop.tracker.start(flat(shop.config), {**tracked.tags(task), **lineage})
    Pipeline(shop, tuple(stage.kind for stage in chain), None).report(Console(quiet=True))


def _workshop(
    plan: SweepPlan,
    task: Task,
    tracked: SweepRuns,
    progress: bool,
    memories: dict[str, TokenMemory],
) -> Workshop:
    """What a task works with; the model has its first weights."""
    config = prepare_data(task.point.config, progress=False)
    config = replace(config, name=task.id)
    tokenizer = ChatTokenizer.load(plan.vocabularies[task.point.id])
    folder = plan.task_folder(task)
    return Workshop(
        config,
        folder,
        tracked.runs,
        fingerprint_of(config),
        tokenizer,
        build_model(config, tokenizer),
        tracked.tracker(task),
        progress,
        memories,
        (Heartbeat(folder / STATUS),),
    )


def _record_failure(path: Path, error: BaseException, started: float) -> None:
    """What stopped a task, for the table and for whoever looks for the reason."""
    content: Mapping[str, Any] = {
        "error": f"{type(error).__name__}: {error}".splitlines()[0],
        "traceback": traceback.format_exception(error),
        "seconds": round(time.time() - started, 1),
        "time": time.time(),
    }
    write_atomically(path, json.dumps(content, indent=1).encode())


def open_sweep_run(plan: SweepPlan, runs: Path) -> str:
    """The MLflow run that all runs of the sweep are children of.

    Returns:
        Its id.
    """
    tracker = Tracker(plan.folder, runs, plan.sweep.name, active=True)
    axes = {f"axis.{axis.name}": list(axis.values) for axis in plan.sweep.axes}
    tags = {"sweep": plan.sweep.name, "kind": "sweep", "git_commit": git_commit()}
    tracker.start({**axes, "seeds": plan.sweep.seeds, "metric": plan.sweep.metric}, tags)
    return tracker.run_id


def close_sweep_run(plan: SweepPlan, runs: Path, error: BaseException | None = None) -> None:
    """End the sweep's MLflow run, well or by an error; the next start goes on in it."""
    Tracker(plan.folder, runs, plan.sweep.name, active=True).close("", error)
