"""The command line. Heavy imports happen inside the verbs, so that help comes at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from rich.console import Console

from experiments.verbs import (
    cache,
    compare,
    data,
    doctor,
    parity,
    plan,
    run,
    runs,
    score,
    sweep,
    weights,
)
from experiments.verbs.parser import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, PROGRAM
from odvla.errors import UserError

# In the order of the help.
GROUPS = (run, cache, sweep, compare, runs, plan, score, data, doctor, weights, parity)

# Turns of a loop in which a numerical thread waits for the others before it sleeps.
SPIN_COUNT = "10000"


def _wait_briefly() -> None:
    """Keep numerical threads from waiting at full load; before torch, whose library reads this.

    GNU's OpenMP, which torch's Linux builds use, waits some milliseconds awake. With another
    process on a core the thread that is waited for cannot run, and all of that time is lost, again
    and again (docs/decisions.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: of the command line; None: the process's own.

    Returns:
        0; 1 when a comparison failed; 2 for a mistake of the user's or a file that the system
        refuses, which is printed as one sentence; 130 when interrupted.
    """
    _wait_briefly()
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives overrides that stand behind an option to the rest.
    stray = [text for text in rest if text.startswith("-") or "=" not in text]
    if stray or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized argument {(stray or rest)[0]!r}")
    if rest:
        options.overrides += rest
    os.environ.setdefault("TQDM_DISABLE", "1")  # the devkit's bars; read when tqdm is imported
    # MLflow would tell its makers over the network what it is used for.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        code = options.run(options)
    except UserError as error:
        _print_error(str(error))
        return EXIT_USER_ERROR
    except OSError as error:
        # The file system's own: a full disk, no permission. Others name no path.
        if error.filename is None:
            raise
        _print_error(f"{error.filename2 or error.filename}: {error.strerror}")
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes an exit of an interruption.
        if not isinstance(stop.__context__ or stop, KeyboardInterrupt):
            raise
        Console(stderr=True).print("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    return code or EXIT_OK


def _print_error(sentence: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {sentence}", markup=False, style="red")


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train, test and ask OpenDriveVLA models, stage by stage.",
        epilog=f"example: python {PROGRAM} fit smoke",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in GROUPS:
        group.add(verbs)
    return parser
