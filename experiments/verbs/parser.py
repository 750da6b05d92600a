"""What the verbs have in common: how one is declared, and the options that many share."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

if TYPE_CHECKING:
    from experiments.schema import ExperimentConfig

PROGRAM = "lightning_app.py"
PACKAGES = ("odvla", "stages", "datamodules", "callbacks", "experiments")
WIDTH = 120
EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
Verbs = argparse._SubParsersAction  # of ArgumentParsers; argparse has no public name for it


def add_verb(
    parent: Verbs,
    name: str,
    purpose: str,
    example: str,
    run: Callable[[argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    """Declare a verb; its help is made of its purpose and an example."""
    parser = parent.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example: python {PROGRAM} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_experiment(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The experiment, and how it is changed."""
    parser.add_argument(
        "experiment",
        nargs=None if required else "?",
        help="a name from `list`, or package.module:function",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changed settings, e.g. stages.planning.steps=10 (see `show`)",
    )
    parser.add_argument(
        "--overlay",
        dest="overlays",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of settings; may be given again: of two values the later file's counts",
    )
    parser.add_argument(
        "--force-dialect",
        action="store_true",
        help="take weights that were trained on other prompts all the same",
    )
    parser.add_argument("--data", metavar="ROOT", help="data root (default: $ODVLA_DATA, or data)")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where runs lie."""
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of runs (default: $ODVLA_RUNS, or runs)"
    )


def experiment_of(options: argparse.Namespace) -> ExperimentConfig:
    """The experiment that the options name, with all changes to it."""
    from experiments.find import find_experiment
    from odvla.config import apply_overlay, apply_overrides

    config = find_experiment(options.experiment)
    for overlay in options.overlays:
        config = apply_overlay(config, overlay)
    config = apply_overrides(config, options.overrides)
    if options.force_dialect:
        config = replace(config, force_dialect=True)
    if options.data:
        config = replace(config, data=replace(config.data, root=options.data))
    return config


def runs_of(options: argparse.Namespace) -> Path:
    """Folder of all runs."""
    return options.runs or Path(os.environ.get("ODVLA_RUNS", "runs")).expanduser()


def wide_console() -> Console:
    """The terminal; a file or pipe gets lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def quiet_libraries(*, json: bool = False) -> None:
    """Our own messages are shown, other libraries' chatter is not.

    Called when those libraries are imported: they set their levels then.

    Args:
        json: the output is for a program, so that messages go to stderr. Otherwise they share the
            console of the progress bars.
    """
    handler = RichHandler(
        console=Console(stderr=True) if json else None,
        show_time=False,
        show_path=False,
        show_level=False,
        markup=False,
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if first else logging.ERROR)
        logger.handlers = [handler]
        logger.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    # The oldest transformers that we take may know the old name only.
    warnings.filterwarnings("ignore", message=".gradient_checkpointing_enable. is deprecated")
