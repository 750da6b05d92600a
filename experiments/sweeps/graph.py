"""Stages that points have in common are one task: trained once, handed to all of them.

    <runs>/<sweep>/sweep.json                what was declared, and the tasks it came to
    <runs>/<sweep>/vocabulary-<hash>/        a tokenizer for all points that may share one
    <runs>/<sweep>/stages/<task>/<stage>/    a stage's handoff, see handoff.py
    <runs>/<sweep>/points/<point>/           links to its stages, and its results

A task's name is its stage and a hash of all that its result hangs on: the settings of the stage and
of every stage before it, the data, the vocabulary, and the weights that the first one starts from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.handoff import CARD, fingerprint_of
from experiments.initial_weights import identity
from experiments.prepare import kept_tokenizer, prepare_data, settle_root
from experiments.schema import SPEED_SETTINGS, ExperimentConfig
from experiments.sweeps.definition import ID_LENGTH, Point, Sweep, base_of, points_of, shared_run
from odvla.config import config_hash, flat, to_tree
from odvla.errors import UserError
from odvla.weights import write_atomically

MANIFEST, FAILED, RESULTS = "sweep.json", "failed.json", "results.json"
SCORE = "score"  # kind of the tasks that evaluate a point
FORMAT = 1


@dataclass(frozen=True)
class Task:
    """One thing to do: train a stage, or evaluate a point."""

    id: str
    kind: str  # a stage, or SCORE
    point: Point  # one of those it is done for
    after: tuple[str, ...]  # ids of tasks that must be done before


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with everything settled: points with their data root, vocabularies, tasks."""

    sweep: Sweep
    reference: str  # what `find_sweep` takes
    overrides: tuple[str, ...]
    folder: Path
    points: tuple[Point, ...]
    tasks: tuple[Task, ...]  # in an order that may be followed
    vocabularies: dict[str, Path]  # by point id
    fingerprints: dict[str, str]  # of the data, by point id
    missing: tuple[Path, ...] = ()  # data roots that are not there yet (dry runs)

    def task(self, name: str) -> Task:
        """A task by its id.

        Raises:
            UserError: there is none.
        """
        for task in self.tasks:
            if task.id == name:
                return task
        raise UserError(f"sweep {self.sweep.name!r} has no task {name!r}")

    def stage_folder(self, task: Task) -> Path:
        """Where a stage task leaves its handoff."""
        return self.folder / "stages" / task.id / task.kind

    def task_folder(self, task: Task) -> Path:
        """Where a task writes."""
        if task.kind == SCORE:
            return self.point_folder(task.point)
        return self.folder / "stages" / task.id

    def point_folder(self, point: Point) -> Path:
        """Where a point's results are."""
        return self.folder / "points" / point.id

    def chain(self, point: Point) -> list[Task]:
        """All tasks of a point, in order; its evaluation is the last."""
        by_id = {task.id: task for task in self.tasks}
        found = [by_id[f"{SCORE}-{point.id}"]]
        while found[-1].after:
            found.append(by_id[found[-1].after[0]])
        return found[::-1]

    def stage_tasks(self, point: Point) -> list[Task]:
        """The tasks of a point's stages, in order."""
        return self.chain(point)[:-1]

    def is_done(self, task: Task) -> bool:
        """Whether the task's result is there."""
        if task.kind == SCORE:
            return (self.point_folder(task.point) / RESULTS).is_file()
        return (self.stage_folder(task) / CARD).is_file()


def plan_sweep(
    sweep: Sweep,
    reference: str,
    runs: Path,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
    *,
    progress: bool = True,
    dry_run: bool = False,
) -> SweepPlan:
    """Settle points, data, vocabularies and tasks; nothing is trained.

    Data and vocabularies are made where they are not there.

    Args:
        sweep: what is declared.
        reference: name that `find_sweep` finds it by.
        runs: folder of all runs.
        overrides: of the base.
        data_root: instead of the base's; points have the same ids wherever it is.
        progress: show a bar where data must be made.
        dry_run: make nothing. Where data is not there, its folder's name stands for it in the
            hashes of tasks: they share what they will share, by other names.

    Raises:
        UserError: a point does not fit, or the folder holds another sweep of this name.
    """
    base = base_of(sweep, overrides)
    points = points_of(sweep, base)
    if data_root:
        points = tuple(_moved(point, base.data.root, data_root) for point in points)
    folder = runs / sweep.name
    _check_unchanged(folder, sweep, base)
    settle = settle_root if dry_run else partial(prepare_data, progress=progress)
    prepared = [replace(point, config=settle(point.config)) for point in points]
    vocabularies: dict[str, Path] = {}
    tasks: dict[str, Task] = {}
    of_data = {point.config.data: fingerprint_of(point.config) for point in prepared}
    missing = {data: data.folder for data in of_data if not (data.folder / data.version).is_dir()}
    of_data |= {data: str(folder) for data, folder in missing.items()}
    fingerprints: dict[str, str] = {}
    for given, point in zip(points, prepared, strict=True):
        fingerprint = fingerprints[given.id] = of_data[point.config.data]
        vocabulary = _vocabulary(
            point, shared_run(prepared), folder, fingerprint, write=not dry_run
        )
        # Of the point as given: what `prepare_data` settles is of this machine.
        vocabularies[given.id] = vocabulary
        _add_tasks(tasks, given, point, vocabulary.name, fingerprint)
    return SweepPlan(
        sweep,
        reference,
        tuple(overrides),
        folder,
        points,
        tuple(tasks.values()),
        vocabularies,
        fingerprints,
        tuple(dict.fromkeys(missing.values())),
    )


def _moved(point: Point, declared: str, root: str) -> Point:
    """A point whose data lies elsewhere than declared; one with a root of its own keeps it."""
    data = point.config.data
    if data.root != declared:
        return point
    return replace(point, config=replace(point.config, data=replace(data, root=root)))


def _add_tasks(
    tasks: dict[str, Task], given: Point, prepared: Point, vocabulary: str, fingerprint: str
) -> None:
    """The chain of a point's stages; stages that are there already are shared."""
    parent, start = "", identity(prepared.config.init)
    for stage in prepared.config.run:
        # Perception reads no text: where it comes first, no vocabulary stands behind it.
        words = vocabulary if parent or stage != "perception" else None
        depends = [stage, prepared.config.stage_hash(stage), parent, words, fingerprint]
        if start is not None:
            depends.append(start)
        key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:ID_LENGTH]
        name = f"{stage}-{key}"
        tasks.setdefault(name, Task(name, stage, given, (parent,) if parent else ()))
        parent = name
    name = f"{SCORE}-{given.id}"
    tasks[name] = Task(name, SCORE, given, (parent,))


def _vocabulary(
    point: Point, run: tuple[str, ...], folder: Path, fingerprint: str, *, write: bool
) -> Path:
    """A tokenizer's folder; points whose data, dialect and size agree have the same one.

    Where `write` is set, it is made: of the texts of all stages that the sweep runs, or points that
    run other stages could not share what they have in common.
    """
    config = point.config
    stages = tuple(
        stage
        for stage in run
        if getattr(config.data, stage) is not None and config.stages.of(stage) is not None
    )
    parts = [to_tree(config.tokenizer), to_tree(config.dialect), stages, fingerprint]
    where = folder / f"vocabulary-{config_hash(parts)[:ID_LENGTH]}"
    if write:
        kept_tokenizer(replace(config, run=stages), where, fingerprint, write=True)
    return where


def _check_unchanged(folder: Path, sweep: Sweep, base: ExperimentConfig) -> None:
    """A folder belongs to one base: results of two would stand in one table.

    Settings that change no result may be others than before.

    Raises:
        UserError: naming a setting that differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    before = read_manifest(path)["base"]
    now = _leaves(base)
    differ = sorted(
        key
        for key in {*before, *now}
        if before.get(key) != now.get(key) and not set(key.split(".")) & set(SPEED_SETTINGS)
    )
    if differ:
        key = differ[0]
        raise UserError(
            f"sweep {sweep.name!r} in {folder} was begun from another base: {key} was "
            f"{before.get(key)!r} and is now {now.get(key)!r} ({len(differ)} settings differ); "
            "name the sweep anew, or remove the folder"
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """A sweep.json.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep's record {path} cannot be read: {error}") from error
    if content.get("format") != FORMAT:
        raise UserError(f"the sweep's record {path} is of format {content.get('format')!r}")
    return content


def write_manifest(plan: SweepPlan, base: ExperimentConfig) -> None:
    """Record what was declared and what it came to."""
    content = {
        "format": FORMAT,
        "name": plan.sweep.name,
        "reference": plan.reference,
        "overrides": list(plan.overrides),
        "metric": plan.sweep.metric,
        "higher_is_better": plan.sweep.higher_is_better,
        "axes": {axis.name: list(axis.values) for axis in plan.sweep.axes},
        "seeds": list(plan.sweep.seeds),
        "base": _leaves(base),
        "points": [
            {
                "id": point.id,
                "labels": dict(
                    zip((axis.name for axis in plan.sweep.axes), point.labels, strict=True)
                ),
                "seed": point.seed,
                "stages": {task.kind: task.id for task in plan.stage_tasks(point)},
            }
            for point in plan.points
        ],
        "tasks": [{"id": t.id, "kind": t.kind, "after": list(t.after)} for t in plan.tasks],
    }
    write_atomically(plan.folder / MANIFEST, json.dumps(content, indent=1).encode())


def _leaves(base: ExperimentConfig) -> dict[str, Any]:
    """Settings of the base by dotted key, where its data lies left out."""
    places = ("data.root", "data.language_root")
    return json.loads(
        json.dumps({key: value for key, value in flat(base).items() if key not in places})
    )


def depth(plan: SweepPlan, task: Task) -> int:
    """How many tasks stand one after the other before this one."""
    return 1 + max((depth(plan, plan.task(name)) for name in task.after), default=-1)
