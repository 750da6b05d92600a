"""Stages that another sweep or an experiment in the same folder of runs has trained already.

A task's name says all that its result hangs on, so a stage of the same name in another sweep's
folder is the same stage. Sweeps of one base (inputs, streams, sizes) train perception once, and not
even that where `fit` has trained the base: an experiment's stage is the same if its card says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.handoff import CARD, Card, card_sha256, check_files, read_card
from experiments.initial_weights import identity
from experiments.sweeps.graph import MANIFEST, SCORE, SweepPlan, Task
from odvla.errors import UserError
from odvla.weights import file_sha256


def take_over(plan: SweepPlan, runs: Path) -> dict[str, Path]:
    """Give a sweep the finished stages of other sweeps and experiments, where it has none itself.

    Those that it has begun go on at their checkpoints. A stage is taken only together with what it
    was trained from: its card names its parent's, which must be this sweep's. Weights become hard
    links where the disk allows it; both folders may be removed without harm to the other.

    Args:
        plan: the sweep.
        runs: folder of all runs.

    Returns:
        Folders that stages were taken from, by task id.
    """
    taken: dict[str, Path] = {}
    for task in plan.tasks:  # parents stand before children
        if task.kind == SCORE or plan.task_folder(task).exists():
            continue
        for folder in (*_of_sweeps(plan, runs, task), *_of_experiments(plan, runs, task)):
            if _is_whole(folder) and _has_parent(plan, task, read_card(folder)):
                _copy(folder, plan.stage_folder(task))
                taken[task.id] = folder
                break
    return taken


def _of_sweeps(plan: SweepPlan, runs: Path, task: Task) -> Iterator[Path]:
    """Stages of a task's name in other sweeps."""
    for manifest in sorted(runs.glob(f"*/{MANIFEST}")):
        if manifest.parent.resolve() != plan.folder.resolve():
            yield manifest.parent / "stages" / task.id / task.kind


def _of_experiments(plan: SweepPlan, runs: Path, task: Task) -> Iterator[Path]:
    """Stages of experiments whose cards say all that a task's name stands for."""
    config = task.point.config
    wanted: dict[str, str | None] = {
        "stage_hash": config.stage_hash(task.kind),
        "data_fingerprint": plan.fingerprints[task.point.id],
        "init_identity": identity(config.init),
    }
    if task.after or task.kind != "perception":  # others read texts
        vocabulary = plan.vocabularies[task.point.id] / "tokenizer.json"
        wanted["tokenizer_sha256"] = file_sha256(vocabulary)
    for path in sorted(runs.glob(f"*/{task.kind}/{CARD}")):
        try:
            card = read_card(path.parent)
        except UserError:  # of another version, or damaged
            continue
        if all(getattr(card, name) == value for name, value in wanted.items()):
            yield path.parent


def _is_whole(folder: Path) -> bool:
    """Whether a stage is finished and undamaged; if not, it is trained here instead."""
    try:
        check_files(folder, read_card(folder))
    except UserError:
        return False
    return True


def _has_parent(plan: SweepPlan, task: Task, card: Card) -> bool:
    """Whether a stage was trained from this sweep's handoff."""
    if not task.after:
        return card.parent_stage is None
    parent = plan.stage_folder(plan.task(task.after[0]))
    return (parent / CARD).is_file() and card.parent_card_sha256 == card_sha256(parent)


def _copy(source: Path, target: Path) -> None:
    """Copy a stage under another name first, so that half of it is never taken for the whole."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    """A hard link to weights, which are never written in place; a copy of the rest."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            pass
        else:
            return
    shutil.copy2(source, target)
