"""The verbs of one experiment: list, show, fit, test, predict."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.verbs.parser import (
    Verbs,
    add_experiment,
    add_places,
    add_verb,
    experiment_of,
    quiet_libraries,
    runs_of,
    wide_console,
)

HIDDEN = ("no_vision", "other_vision", "no_ego", "no_history", "no_command")


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    add_verb(verbs, "list", "name all experiments and sweeps", "list", list_experiments)

    show = add_verb(
        verbs, "show", "print an experiment's config", "show tiny seed=1", show_experiment
    )
    add_experiment(show)

    fit = add_verb(
        verbs,
        "fit",
        "train an experiment through its stages, then evaluate it",
        "fit tiny stages.planning.steps=200 --runs /tmp/runs",
        fit_experiment,
    )
    add_experiment(fit)
    add_places(fit)
    fit.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="DIR",
        help="a finished stage's folder to start from, e.g. runs/tiny/alignment",
    )

    test = add_verb(
        verbs,
        "test",
        "predict again with the trained stages, then evaluate",
        "test tiny --stage planning --protocol uniad --hide no_ego --hide other_vision",
        test_experiment,
    )
    add_experiment(test)
    add_places(test)
    test.add_argument("--stage", default="", help="only this one, e.g. planning (default: all)")
    test.add_argument(
        "--protocol",
        action="append",
        default=[],
        metavar="NAME",
        help="score plans under this one, too (see score --help); may be given again",
    )
    test.add_argument(
        "--hide",
        action="append",
        default=[],
        choices=(*HIDDEN, "all"),
        help="plan once more without this; may be given again (default: the experiment's)",
    )
    test.add_argument(
        "--keep-predictions", action="store_true", help="score what was predicted before"
    )

    ask = add_verb(
        verbs,
        "predict",
        "plan, or answer a question, at one sample",
        'predict tiny --sample TOKEN --question "What is ahead?"',
        predict_sample,
    )
    add_experiment(ask)
    add_places(ask)
    ask.add_argument("--sample", required=True, metavar="TOKEN", help="token of a key-frame")
    ask.add_argument("--version", help="version of the data root, e.g. v1.0-mini")
    ask.add_argument("--question", help="ask this instead of for a plan")
    ask.add_argument("--picture", type=Path, help="where the picture goes (a .png or .jpg file)")


def list_experiments(options: argparse.Namespace) -> None:
    """Names and first lines of the docstrings."""
    from rich.table import Table

    from experiments.find import experiments, sweeps

    console = Console()
    for title, found in (("experiments", experiments()), ("sweeps", sweeps())):
        table = Table(box=None, show_header=False, title=title, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, (_, line) in found.items():
            table.add_row(name, line)
        console.print(table)


def show_experiment(options: argparse.Namespace) -> None:
    """The config as YAML."""
    from odvla.config import dump

    sys.stdout.write(dump(experiment_of(options)))


def fit_experiment(options: argparse.Namespace) -> None:
    """Train and evaluate."""
    from experiments.output_places import check_folder
    from experiments.pipeline import open_pipeline
    from experiments.strategies import check_sharing

    quiet_libraries()
    config = experiment_of(options)
    check_folder(runs_of(options))
    check_sharing(config)
    pipeline = open_pipeline(config, runs_of(options), options.parent)
    pipeline.fit()
    pipeline.report(wide_console())


def test_experiment(options: argparse.Namespace) -> None:
    """Predict again and evaluate."""
    from experiments.output_places import check_folder
    from experiments.pipeline import open_pipeline
    from odvla.metrics.protocol import protocols_of

    protocols_of(options.protocol)  # a name that does not exist shows before the work
    check_folder(runs_of(options))
    quiet_libraries()
    config = experiment_of(options)
    if options.hide and config.stages.planning is not None:
        hidden: Any = HIDDEN if "all" in options.hide else tuple(dict.fromkeys(options.hide))
        planning = replace(config.stages.planning, ablations=hidden)
        config = replace(config, stages=replace(config.stages, planning=planning))
    pipeline = open_pipeline(config, runs_of(options), trained=True)
    if not options.keep_predictions:
        pipeline.test(options.stage)
    pipeline.report(wide_console(), options.protocol, stage=options.stage, thorough=True)


def predict_sample(options: argparse.Namespace) -> None:
    """One sample."""
    from experiments.output_places import check_file
    from experiments.pictures import PICTURE_ENDINGS
    from experiments.predict import predict
    from experiments.prepare import prepare_data

    quiet_libraries()
    if options.picture:
        check_file(options.picture, PICTURE_ENDINGS)
    config = experiment_of(options)
    if options.version:
        config = replace(config, town=None, data=replace(config.data, version=options.version))
    config = prepare_data(config)
    run = runs_of(options) / config.name
    found = predict(config, run, options.sample, options.question, options.picture)
    console = Console(soft_wrap=True, highlight=False)
    if options.question or found.waypoints is None:
        console.print(found.text, markup=False)
    else:
        for number, (x, y) in enumerate(found.waypoints, start=1):
            console.print(f"{number * 0.5:.1f} s  x {x:7.2f} m  y {y:7.2f} m")
    console.print(f"{found.cost}", markup=False)
    console.print(f"picture: {found.picture}", markup=False)
