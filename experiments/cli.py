"""The command line. Heavy imports happen inside the verbs, so that help comes at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from odvla.errors import UserError

if TYPE_CHECKING:
    from experiments.schema import ExperimentConfig

PROGRAM = "lightning_app.py"
PACKAGES = ("odvla", "stages", "datamodules", "callbacks", "experiments")
WIDTH = 120
EXIT_OK, EXIT_FAILED = 0, 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: of the command line; None: the process's own.

    Returns:
        0; 1 when a comparison failed; 2 for a mistake of the user's, which is printed as one
        sentence; 130 when interrupted.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives overrides that stand behind an option to the rest.
    stray = [text for text in rest if text.startswith("-") or "=" not in text]
    if stray or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized argument {(stray or rest)[0]!r}")
    if rest:
        options.overrides += rest
    os.environ.setdefault("TQDM_DISABLE", "1")  # the devkit's bars; read when tqdm is imported
    try:
        code = options.run(options)
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", markup=False, style="red"
        )
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes an exit of an interruption.
        if not isinstance(stop.__context__ or stop, KeyboardInterrupt):
            raise
        Console(stderr=True).print("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train, test and ask OpenDriveVLA models, stage by stage.",
        epilog=f"example: python {PROGRAM} fit smoke",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    _verb(verbs, "list", "name all experiments", "list", list_experiments)

    show = _verb(verbs, "show", "print an experiment's config", "show tiny seed=1", show_experiment)
    _add_experiment(show)

    fit = _verb(
        verbs,
        "fit",
        "train an experiment through its stages, then evaluate it",
        "fit tiny stages.planning.steps=200 --runs /tmp/runs",
        fit_experiment,
    )
    _add_experiment(fit)
    _add_places(fit)
    fit.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="DIR",
        help="a finished stage's folder to start from, e.g. runs/tiny/alignment",
    )

    test = _verb(
        verbs,
        "test",
        "predict again with the trained stages, then evaluate",
        "test tiny",
        test_experiment,
    )
    _add_experiment(test)
    _add_places(test)

    ask = _verb(
        verbs,
        "predict",
        "plan, or answer a question, at one sample",
        'predict tiny --sample TOKEN --question "What is ahead?"',
        predict_sample,
    )
    _add_experiment(ask)
    _add_places(ask)
    ask.add_argument("--sample", required=True, metavar="TOKEN", help="token of a key-frame")
    ask.add_argument("--version", help="version of the data root, e.g. v1.0-mini")
    ask.add_argument("--question", help="ask this instead of for a plan")
    ask.add_argument("--picture", type=Path, help="where the picture goes (a .png or .jpg file)")

    data = verbs.add_parser("data", help="make data", description="Make data.")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = _verb(
        actions,
        "make",
        "generate a town in nuScenes' format",
        "data make data/town --scenes 10 --image-size 320x180 --seed 0",
        make_data,
    )
    make.add_argument("out", type=Path, help="folder to make; it must not hold anything yet")
    make.add_argument("--scenes", type=int, default=10, help="10 makes a v1.0-mini (default 10)")
    make.add_argument("--image-size", default="320x180", help="width x height (default 320x180)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--workers", type=int, default=2, help="processes (default 2)")

    parity = _verb(
        verbs,
        "parity",
        "compare the vision tower with arrays recorded from the reference",
        "parity ../shared/golden",
        compare_with_recordings,
    )
    parity.add_argument("folder", type=Path, help="a directory of recordings, with index.json")
    parity.add_argument("--all", action="store_true", help="print every array, not only failures")
    return parser


def list_experiments(options: argparse.Namespace) -> None:
    """Names and first lines of the docstrings."""
    from rich.table import Table

    from experiments.find import experiments

    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, (_, line) in experiments().items():
        table.add_row(name, line)
    Console().print(table)


def show_experiment(options: argparse.Namespace) -> None:
    """The config as YAML."""
    from odvla.config import dump

    sys.stdout.write(dump(_experiment(options)))


def fit_experiment(options: argparse.Namespace) -> None:
    """Train and evaluate."""
    from experiments.pipeline import open_pipeline

    _quiet()
    pipeline = open_pipeline(_experiment(options), _runs(options), options.parent)
    pipeline.fit()
    pipeline.report(_console())


def test_experiment(options: argparse.Namespace) -> None:
    """Predict again and evaluate."""
    from experiments.pipeline import open_pipeline

    _quiet()
    pipeline = open_pipeline(_experiment(options), _runs(options))
    pipeline.test()
    pipeline.report(_console())


def predict_sample(options: argparse.Namespace) -> None:
    """One sample."""
    from experiments.predict import predict
    from experiments.prepare import prepare_data

    _quiet()
    config = _experiment(options)
    if options.version:
        config = replace(config, town=None, data=replace(config.data, version=options.version))
    config = prepare_data(config)
    run = _runs(options) / config.name
    found = predict(config, run, options.sample, options.question, options.picture)
    console = Console(soft_wrap=True, highlight=False)
    if options.question or found.waypoints is None:
        console.print(found.text, markup=False)
    else:
        for number, (x, y) in enumerate(found.waypoints, start=1):
            console.print(f"{number * 0.5:.1f} s  x {x:7.2f} m  y {y:7.2f} m")
    console.print(f"picture: {found.picture}", markup=False)


def make_data(options: argparse.Namespace) -> None:
    """A town."""
    from experiments.prepare import make_town_at
    from experiments.schema import TownSettings

    width, cross, height = options.image_size.partition("x")
    if not cross or not width.isdigit() or not height.isdigit():
        raise UserError(f"--image-size is width x height, e.g. 320x180, not {options.image_size!r}")
    town = TownSettings(options.scenes, (int(width), int(height)), options.seed, options.workers)
    made = make_town_at(options.out, town)
    Console(soft_wrap=True).print(f"{options.scenes} scenes ({town.version}) in {made}")


def compare_with_recordings(options: argparse.Namespace) -> int:
    """Cases of a golden directory."""
    from experiments.parity.run import run_parity

    console = Console(soft_wrap=True, highlight=False)
    return EXIT_OK if run_parity(options.folder, console, every=options.all) else EXIT_FAILED


def _verb(
    parent: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    purpose: str,
    example: str,
    run: object,
) -> argparse.ArgumentParser:
    parser = parent.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example: python {PROGRAM} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a name from `list`, or package.module:function")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changed settings, e.g. stages.planning.steps=10 (see `show`)",
    )
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--data", metavar="ROOT", help="data root (default: $ODVLA_DATA, or data)")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of runs (default: $ODVLA_RUNS, or runs)"
    )


def _experiment(options: argparse.Namespace) -> ExperimentConfig:
    from experiments.find import find_experiment
    from odvla.config import apply_overlay, apply_overrides

    config = find_experiment(options.experiment)
    if options.overlay:
        config = apply_overlay(config, options.overlay)
    config = apply_overrides(config, options.overrides)
    if options.data:
        config = replace(config, data=replace(config.data, root=options.data))
    return config


def _runs(options: argparse.Namespace) -> Path:
    return options.runs or Path(os.environ.get("ODVLA_RUNS", "runs")).expanduser()


def _console() -> Console:
    """The terminal; a file or pipe gets lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _quiet() -> None:
    """Our own messages are shown, other libraries' chatter is not.

    Called when those libraries are imported: they set their levels then.
    """
    handler = RichHandler(show_time=False, show_path=False, show_level=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if first else logging.ERROR)
        logger.handlers = [handler]
        logger.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
