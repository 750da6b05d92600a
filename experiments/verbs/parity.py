"""The verb `parity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.verbs.parser import EXIT_FAILED, EXIT_OK, Verbs, add_verb


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parity = add_verb(
        verbs,
        "parity",
        "compare with arrays and texts recorded from the reference",
        "parity ../shared/golden\n"
        "exit code: 0 when all is equal, 1 when a case differs or fails, or a file that index.json "
        "lists is\nabsent, 2 when there are no recordings. Files of no known case are named, no "
        "more.",
        compare_with_recordings,
    )
    parity.add_argument("folder", type=Path, help="a directory of recordings, with index.json")
    parity.add_argument("--all", action="store_true", help="print every array, not only failures")


def compare_with_recordings(options: argparse.Namespace) -> int:
    """Cases of a golden directory."""
    from experiments.parity.run import run_parity

    console = Console(soft_wrap=True, highlight=False)
    return EXIT_OK if run_parity(options.folder, console, every=options.all) else EXIT_FAILED
