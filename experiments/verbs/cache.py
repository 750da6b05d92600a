"""The verb `cache`: what a frozen vision half sees, computed ahead.

Started by torchrun or srun, all processes do it together, however many they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.verbs.parser import (
    Verbs,
    add_experiment,
    add_places,
    add_verb,
    experiment_of,
    quiet_libraries,
    runs_of,
)

MEGABYTE = 10**6


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    cache = add_verb(
        verbs,
        "cache",
        "encode the key-frames of a stage ahead, for stages.*.feature_cache",
        "cache tiny --stage alignment",
        cache_experiment,
    )
    add_experiment(cache)
    add_places(cache)
    cache.add_argument(
        "--stage", default="", help="which stage (default: the first that talks about images)"
    )
    cache.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="DIR",
        help="a finished stage's folder to start from, as in fit",
    )


def cache_experiment(options: argparse.Namespace) -> None:
    """Fill and verify a stage's cache."""
    from experiments.cache_ahead import cache_ahead
    from experiments.output_places import check_folder
    from experiments.pipeline import open_pipeline
    from experiments.stage_run import is_first_process

    quiet_libraries()
    check_folder(runs_of(options))
    pipeline = open_pipeline(
        experiment_of(options), runs_of(options), options.parent, any_number=True
    )
    shards = cache_ahead(pipeline, options.stage).shards
    if not is_first_process():
        return
    size = shards.size_bytes()
    Console(soft_wrap=True, highlight=False).print(
        f"{len(shards)} key-frames, {size / MEGABYTE:.1f} MB, in {shards.folder}", markup=False
    )
