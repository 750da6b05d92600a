"""The verb `parity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.verbs.parser import Verbs, add_verb

EXIT_FAILED = 1


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parity = add_verb(
        verbs,
        "parity",
        "compare the vision tower with arrays recorded from the reference",
        "parity ../shared/golden",
        compare_with_recordings,
    )
    parity.add_argument("folder", type=Path, help="a directory of recordings, with index.json")
    parity.add_argument("--all", action="store_true", help="print every array, not only failures")


def compare_with_recordings(options: argparse.Namespace) -> int:
    """Cases of a golden directory."""
    from experiments.parity.run import run_parity

    console = Console(soft_wrap=True, highlight=False)
    return 0 if run_parity(options.folder, console, every=options.all) else EXIT_FAILED
