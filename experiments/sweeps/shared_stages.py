"""Stages that another sweep in the same folder of runs has trained already.

A task's name says all that its result hangs on, so a stage of the same name in another sweep's
folder is the same stage. Sweeps of one base (inputs, streams, sizes) train perception once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.handoff import CARD, card_sha256, check_files, read_card
from experiments.sweeps.graph import MANIFEST, SCORE, SweepPlan, Task
from odvla.errors import UserError


def take_over(plan: SweepPlan, runs: Path) -> dict[str, Path]:
    """Give a sweep the finished stages that other sweeps have, where it has not begun them itself.

    A stage is taken only together with what it was trained from: its card names its parent's, which
    must be this sweep's. Weights become hard links where the disk allows it; both sweeps may be
    removed without harm to the other.

    Args:
        plan: the sweep.
        runs: folder of all runs.

    Returns:
        Folders that stages were taken from, by task id.
    """
    taken: dict[str, Path] = {}
    for task in plan.tasks:  # parents stand before children
        if task.kind == SCORE or plan.task_folder(task).exists():
            continue  # one that was begun here goes on at its checkpoint
        for folder in _elsewhere(plan, runs, task):
            if _fits(plan, task, folder):
                _copy(folder, plan.stage_folder(task))
                taken[task.id] = folder
                break
    return taken


def _elsewhere(plan: SweepPlan, runs: Path, task: Task) -> Iterator[Path]:
    """Finished stages of a task's name in other sweeps."""
    for manifest in sorted(runs.glob(f"*/{MANIFEST}")):
        folder = manifest.parent / "stages" / task.id / task.kind
        if manifest.parent.resolve() != plan.folder.resolve() and (folder / CARD).is_file():
            yield folder


def _fits(plan: SweepPlan, task: Task, folder: Path) -> bool:
    """Whether a finished stage is whole, and was trained from this sweep's handoff."""
    try:
        card = read_card(folder)
        check_files(folder, card)
    except UserError:  # damaged or unfinished: it is trained here instead
        return False
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
