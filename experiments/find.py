"""Experiments by name: the functions of some modules are the registry."""

from __future__ import annotations

import ast
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from odvla.errors import UserError

if TYPE_CHECKING:
    from experiments.schema import ExperimentConfig

# Modules whose public functions that return an ExperimentConfig are experiments.
MODULES = ("experiments.tiny", "experiments.opendrivevla")


def experiments() -> dict[str, tuple[str, str]]:
    """Name -> (module, first line of the docstring) of the experiments that come with the toolkit.

    The sources are read, not imported: a list of names should come at once.
    """
    found = {}
    for module in MODULES:
        path = Path(__file__).parent.parent / Path(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and isinstance(node.returns, ast.Name)
                and node.returns.id == "ExperimentConfig"
            ):
                line = (ast.get_docstring(node) or "").split("\n")[0]
                found[node.name] = (module, line)
    return found


def find_experiment(name: str) -> ExperimentConfig:
    """The config of an experiment.

    Args:
        name: of one in this package, or `package.module:function` of one's own.

    Raises:
        UserError: there is no such experiment or module, or it returns something else.
    """
    if ":" in name:
        return _foreign(name)
    known = experiments()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"there is no experiment {name!r}; {hint}")
    return getattr(importlib.import_module(known[name][0]), name)()


def _foreign(name: str) -> ExperimentConfig:
    from experiments.schema import ExperimentConfig

    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # the installed command does not look here by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but imports a missing one is named as well.
        raise UserError(f"experiment {name!r}: there is no module {error.name!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"experiment {name!r}: {module_name} has no function {function_name!r}")
    config = function()
    if not isinstance(config, ExperimentConfig):
        raise UserError(
            f"experiment {name!r} returned a {type(config).__name__}, not an ExperimentConfig"
        )
    return config
