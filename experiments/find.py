"""Experiments and sweeps by name: the functions of some modules are the registry."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from odvla.errors import UserError

if TYPE_CHECKING:
    from experiments.schema import ExperimentConfig
    from experiments.sweeps.definition import Sweep

_T = TypeVar("_T")
# Modules whose public functions that return an ExperimentConfig, or a Sweep, are listed.
MODULES = (
    "experiments.tiny",
    "experiments.styles",
    "experiments.uniad_town",
    "experiments.opendrivevla",
)
SWEEP_MODULES = ("experiments.ablations",)


def experiments() -> dict[str, tuple[str, str]]:
    """Name -> (module, first line of the docstring) of the toolkit's own experiments."""
    return _functions(MODULES, "ExperimentConfig")


def sweeps() -> dict[str, tuple[str, str]]:
    """Name -> (module, first line of the docstring) of the toolkit's own sweeps."""
    return _functions(SWEEP_MODULES, "Sweep")


def find_experiment(name: str) -> ExperimentConfig:
    """The config of an experiment.

    Args:
        name: of one in this package, or `package.module:function` of one's own.

    Raises:
        UserError: there is no such experiment or module, or it returns something else.
    """
    from experiments.schema import ExperimentConfig

    return _found(name, "experiment", experiments(), ExperimentConfig)


def find_sweep(name: str) -> Sweep:
    """A declared sweep.

    Args:
        name: of one in this package, or `package.module:function` of one's own.

    Raises:
        UserError: there is no such sweep or module, or it returns something else.
    """
    from experiments.sweeps.definition import Sweep

    return _found(name, "sweep", sweeps(), Sweep)


def _functions(modules: Sequence[str], returned: str) -> dict[str, tuple[str, str]]:
    """Public functions by what they return.

    The sources are read, not imported: a list of names should come at once.
    """
    found = {}
    for module in modules:
        path = Path(__file__).parent.parent / Path(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and not node.args.args  # with some, it changes an experiment
                and isinstance(node.returns, ast.Name)
                and node.returns.id == returned
            ):
                line = (ast.get_docstring(node) or "").split("\n")[0]
                found[node.name] = (module, line)
    return found


def _found(name: str, what: str, known: Mapping[str, tuple[str, str]], kind: type[_T]) -> _T:
    if ":" in name:
        return _foreign(name, what, kind)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"there is no {what} {name!r}; {hint}")
    return getattr(importlib.import_module(known[name][0]), name)()


def _foreign(name: str, what: str, kind: type[_T]) -> _T:
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # the installed command does not look here by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but imports a missing one is named as well.
        raise UserError(f"{what} {name!r}: there is no module {error.name!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{what} {name!r}: {module_name} has no function {function_name!r}")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:  # a class of C has no signature
        raise UserError(f"{what} {name!r} must be a function without arguments: {error}") from error
    made = function()
    if not isinstance(made, kind):
        raise UserError(f"{what} {name!r} returned a {type(made).__name__}, not a {kind.__name__}")
    return made
