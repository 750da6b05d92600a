"""The verb `doctor`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from experiments.verbs.data import version_of
from experiments.verbs.parser import (
    EXIT_FAILED,
    EXIT_OK,
    Verbs,
    add_experiment,
    add_places,
    add_verb,
    experiment_of,
    quiet_libraries,
    runs_of,
)


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    doctor = add_verb(
        verbs,
        "doctor",
        "check machine, data and files before a run does",
        "doctor tiny --data data/nuscenes",
        examine,
    )
    add_experiment(doctor, required=False)
    doctor.add_argument("--version", help="e.g. v1.0-trainval (default: the only one there is)")
    doctor.add_argument("--json", action="store_true", help="print a JSON list")
    add_places(doctor)


def examine(options: argparse.Namespace) -> int:
    """All checks; 1 where one is red."""
    quiet_libraries(json=options.json)
    from dataclasses import replace

    from experiments.doctor.run import findings, run_doctor

    config = None
    options.root = Path(options.data or os.environ.get("ODVLA_DATA", "data")).expanduser()
    if options.experiment:
        config = experiment_of(options)
        if options.version:
            config = replace(config, data=replace(config.data, version=options.version))
    version = "" if config is not None or not options.root.is_dir() else version_of(options)
    found = findings(options.root, version, runs_of(options), config)
    console = Console(soft_wrap=True, highlight=False)
    return EXIT_OK if run_doctor(found, console, as_json=options.json) else EXIT_FAILED
