"""What a sweep is: a base experiment, axes along which it changes, and seeds.

    Sweep(
        name="steps_and_agents",
        base=tiny,
        axes=(
            settings("stages.planning.steps", 600, 300),
            Axis("agents", {"yes": (), "no": without_agents}),
        ),
        seeds=(0, 1),
    )

Every combination of one value an axis and one seed is a point. The first value of every axis is the
base that the others are compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.schema import SPEED_SETTINGS, STAGES, ExperimentConfig, without
from odvla.config import apply_overrides, config_hash, flat, to_tree
from odvla.errors import UserError

# What makes a value of an axis: overrides, or a function that replaces a part of the experiment.
Change = tuple[str, ...] | Callable[[ExperimentConfig], ExperimentConfig]
ID_LENGTH = 10  # hexadecimal digits of a hash that names a folder
# Settings that decide how a point is computed and called, not what it is.
_NOT_IDENTITY = ("name", *SPEED_SETTINGS)


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Args:
        name: column of the tables, tag of the runs.
        values: label -> what it changes in the base; an empty tuple changes nothing.

    Raises:
        UserError: there is no value.
    """

    name: str
    values: Mapping[str, Change]

    def __post_init__(self) -> None:
        """An axis without values would make a sweep without points."""
        if not self.values:
            raise UserError(f"axis {self.name!r} has no values")


def settings(key: str, *values: Any) -> Axis:
    """The axis of one config key.

    Args:
        key: e.g. "stages.planning.steps"; its last part names the axis.
        values: as they would be written in an override.
    """
    return Axis(key.rpartition(".")[2], {str(value): (f"{key}={value}",) for value in values})


@dataclass(frozen=True)
class Resources:
    """What one task of a sweep may use."""

    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A declared ablation; see the module's head.

    Args:
        name: folder under the runs, and name of the MLflow run.
        base: the experiment, or the function that makes it.
        axes: at least one.
        seeds: of the experiments; intervals come from them and from the samples.
        metric: number of a point's results.json that tables lead with, as a dotted path.
        higher_is_better: whether more of it is better.
        resources: of one task.

    Raises:
        UserError: no axes, two of one name, no seeds, or a seed twice.
    """

    name: str
    base: ExperimentConfig | Callable[[], ExperimentConfig]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...] = (0,)
    metric: str = "planning.planning.OpenDriveVLA.mean_up_to_t.l2_average_m"
    higher_is_better: bool = False
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        """Check what does not depend on the base."""
        names = [axis.name for axis in self.axes]
        if not names:
            raise UserError(f"sweep {self.name!r} has no axes")
        if len(set(names)) < len(names):
            raise UserError(f"sweep {self.name!r} has two axes of one name ({', '.join(names)})")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"sweep {self.name!r} needs seeds, each of them once: {self.seeds}")


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep."""

    labels: tuple[str, ...]  # one an axis
    seed: int
    config: ExperimentConfig
    # Hash of the config as declared: the same experiment has the same id, whatever its name and
    # wherever its data lies on the machine that asks.
    id: str

    @property
    def title(self) -> str:
        """Labels and seed in one line."""
        return f"{', '.join(self.labels)}, seed {self.seed}"


def base_of(sweep: Sweep, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The base experiment with overrides of the command line.

    Raises:
        UserError: an override does not fit.
    """
    base = sweep.base if isinstance(sweep.base, ExperimentConfig) else sweep.base()
    return apply_overrides(base, overrides)


def points_of(sweep: Sweep, base: ExperimentConfig) -> tuple[Point, ...]:
    """All points, the base first.

    Raises:
        UserError: an axis names no config key, a value has the wrong type or does not fit, two axes
            change the same setting, or two labels make the same experiment.
    """
    _check_conflicts(sweep, base)
    found: dict[str, Point] = {}
    for labels in itertools.product(*(axis.values for axis in sweep.axes)):
        for seed in sweep.seeds:
            config = replace(_changed(sweep, base, labels), seed=seed)
            name = config_hash(without(to_tree(config), _NOT_IDENTITY))[:ID_LENGTH]
            point = Point(labels, seed, replace(config, name=f"{sweep.name}-{seed}"), name)
            if point.id in found:
                raise UserError(
                    f"sweep {sweep.name!r}: {found[point.id].title!r} and {point.title!r} are the "
                    "same experiment"
                )
            found[point.id] = point
    return tuple(found.values())


def shared_run(points: Sequence[Point]) -> tuple[str, ...]:
    """Every stage that some point runs, in order: whose texts the common vocabulary is made of."""
    used = {stage for point in points for stage in point.config.run}
    return tuple(stage for stage in STAGES if stage in used)


def _changed(sweep: Sweep, base: ExperimentConfig, labels: Sequence[str]) -> ExperimentConfig:
    """The base with one value of each axis.

    Overrides of all axes are laid over at once, because some settings only fit together.
    """
    overrides: list[str] = []
    config = base
    for axis, label in zip(sweep.axes, labels, strict=True):
        change = axis.values[label]
        if callable(change):
            config = _called(axis, label, change, config)
        else:
            overrides += change
    try:
        return apply_overrides(config, overrides)
    except UserError as error:
        raise UserError(f"sweep {sweep.name!r}, {', '.join(labels)}: {error}") from error


def _called(
    axis: Axis,
    label: str,
    change: Callable[[ExperimentConfig], ExperimentConfig],
    config: ExperimentConfig,
) -> ExperimentConfig:
    try:
        changed = change(config)
    except (UserError, ValueError) as error:
        raise UserError(f"axis {axis.name!r}, value {label!r}: {error}") from error
    if not isinstance(changed, ExperimentConfig):
        raise UserError(
            f"axis {axis.name!r}, value {label!r} gave a {type(changed).__name__}, not an "
            "ExperimentConfig"
        )
    return changed


def _check_conflicts(sweep: Sweep, base: ExperimentConfig) -> None:
    """No setting may be changed by two axes: the order of the axes would decide.

    Raises:
        UserError: naming the setting and both axes.
    """
    owner: dict[str, str] = {}
    for axis in sweep.axes:
        for key in sorted(_keys_changed(axis, base)):
            if owner.setdefault(key, axis.name) != axis.name:
                raise UserError(
                    f"sweep {sweep.name!r}: axes {owner[key]!r} and {axis.name!r} both change {key}"
                )
    if "seed" in owner:
        raise UserError(
            f"sweep {sweep.name!r}: axis {owner['seed']!r} changes the seed; list seeds in `seeds`"
        )


def _keys_changed(axis: Axis, base: ExperimentConfig) -> set[str]:
    """Settings that some value of the axis names, or changes in the base."""
    keys: set[str] = set()
    for label, change in axis.values.items():
        if callable(change):
            keys |= _differing(base, _called(axis, label, change, base))
        else:
            # An override that repeats the base's value still claims its key.
            keys |= {override.partition("=")[0].strip() for override in change}
    return keys - {"name"}


def _differing(first: ExperimentConfig, second: ExperimentConfig) -> set[str]:
    a, b = flat(first), flat(second)
    return {key for key in {*a, *b} if a.get(key) != b.get(key)}
