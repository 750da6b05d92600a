"""The verb `compare`: what a sweep has found."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.verbs.parser import (
    Verbs,
    add_places,
    add_verb,
    quiet_libraries,
    runs_of,
    wide_console,
)


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    verb = add_verb(
        verbs,
        "compare",
        "compare the finished points of a sweep: tables, plots, a page",
        "compare smoke_sweep",
        compare_points,
    )
    verb.add_argument(
        "sweep", help="a name from `list`, package.module:function, or the sweep's folder"
    )
    verb.add_argument(
        "--metric",
        default="",
        metavar="PATH",
        help="another number of the points' results.json than the sweep's own, by its dotted path; "
        "its files go to a folder of its name, and not to MLflow",
    )
    verb.add_argument("--higher-is-better", action="store_true", help="of --metric")
    verb.add_argument(
        "--out", type=Path, metavar="DIR", help="where files go (default: the sweep's folder)"
    )
    add_places(verb)


def compare_points(options: argparse.Namespace) -> None:
    """Tables in the terminal, Markdown, JSON and a page, and the same in MLflow."""
    from experiments.output_places import check_folder
    from experiments.sweeps.comparison import compare_sweep
    from experiments.sweeps.comparison_page import (
        PAGE,
        tables_of,
        track_comparison,
        write_comparison,
    )
    from odvla.errors import UserError

    quiet_libraries()
    folder = _folder(options.sweep, runs_of(options))
    console = wide_console()
    if options.out:
        check_folder(options.out)
    if options.higher_is_better and not options.metric:
        raise UserError("--higher-is-better says something about --metric, which is not there")
    found = compare_sweep(folder, options.metric, higher_is_better=options.higher_is_better)
    for table in tables_of(found):
        console.print(table.rich())
    out = options.out or folder / options.metric
    files = write_comparison(found, out)
    run = None if options.metric else track_comparison(folder, files)
    console.print(f"page: {out / PAGE}", markup=False, highlight=False, soft_wrap=True)
    if run:
        console.print(f"logged to MLflow run {run}", markup=False, highlight=False, soft_wrap=True)


def _folder(name: str, runs: Path) -> Path:
    """Folder of a sweep.

    Raises:
        UserError: there is neither a folder nor a sweep of this name.
    """
    from experiments.find import find_sweep
    from experiments.sweeps.graph import MANIFEST

    for folder in (Path(name), runs / name):
        if (folder / MANIFEST).is_file():
            return folder
    return runs / find_sweep(name).name
