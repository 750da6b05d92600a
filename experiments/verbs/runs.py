"""The verbs of the MLflow store: `runs`, `runs push`, and `ui`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from experiments.verbs.parser import (
    Verbs,
    add_places,
    add_verb,
    quiet_libraries,
    runs_of,
    wide_console,
)
from odvla.errors import UserError

PORT = 5000


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    runs = add_verb(
        verbs,
        "runs",
        "list the runs of the MLflow store with what they were made from",
        "runs --runs runs",
        list_runs,
    )
    add_places(runs)
    inner = runs.add_subparsers(dest="runs_verb", metavar="push")
    push = add_verb(
        inner,
        "push",
        "copy runs of the local store to a tracking server that did not answer when they began",
        "runs push http://127.0.0.1:5000",
        push_runs,
    )
    push.add_argument("uri", help="of the server")
    push.add_argument(
        "--run", dest="run_id", default="", metavar="ID", help="one run and its children"
    )
    add_places(push)
    ui = add_verb(verbs, "ui", "start MLflow's pages on the store", "ui --port 5001", show_pages)
    ui.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    add_places(ui)


def list_runs(options: argparse.Namespace) -> None:
    """A table in the terminal."""
    quiet_libraries()
    uri = _store(options)
    from experiments.run_list import run_table

    wide_console().print(run_table(uri).rich())


def push_runs(options: argparse.Namespace) -> None:
    """Copy runs, say what was done."""
    from experiments.run_copies import push
    from experiments.tracking_store import local_store, shown

    quiet_libraries()
    runs = runs_of(options)
    if not (runs / "mlflow.db").is_file():
        raise UserError(f"there are no runs in {runs}: it holds no mlflow.db")
    console = wide_console()
    with console.status("copying"):
        done = push(local_store(runs), options.uri, options.run_id)
    text = f"{len(done.copied)} runs copied to {shown(options.uri)}, {len(done.skipped)} were there"
    if done.running:
        text += (
            f"; {len(done.running)} have not ended and are left out (--run ID takes one as it is)"
        )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_pages(options: argparse.Namespace) -> int:
    """Run `mlflow ui` until it is interrupted."""
    return subprocess.call(ui_command(_store(options), options.port))


def ui_command(uri: str, port: int) -> list[str]:
    """What starts the pages of a store.

    Raises:
        UserError: the port is none.
    """
    if not 0 < port < 65536:
        raise UserError(f"--port must be between 1 and 65535, not {port}")
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]


def _store(options: argparse.Namespace) -> str:
    """The store that is meant.

    Raises:
        UserError: it does not exist, or does not answer.
    """
    from experiments.tracking_store import answers, local_store, shown, store_uri

    runs = runs_of(options)
    uri = store_uri(runs)
    if uri == local_store(runs) and not (runs / "mlflow.db").is_file():
        raise UserError(f"there are no runs in {runs}: it holds no mlflow.db")
    if not answers(uri):
        raise UserError(
            f"the MLflow server {shown(uri)} does not answer; unset MLFLOW_TRACKING_URI to see the "
            "local store"
        )
    return uri
