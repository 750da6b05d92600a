"""Where MLflow runs are kept: which store is meant, and whether it answers."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

EXPERIMENT = "odvla"  # name of the MLflow experiment that holds all runs
MEANT_FOR = "odvla.meant_for"  # tag: the server that did not answer when a run began
CONTINUES = "odvla.continues"  # tag: the server's run that went on here when the server had gone
PATIENCE_S = 4.0


def local_store(runs: Path) -> str:
    """URI of the SQLite store of a runs folder."""
    return f"sqlite:///{(runs / 'mlflow.db').resolve()}"


def store_uri(runs: Path) -> str:
    """URI of the store that is meant: MLFLOW_TRACKING_URI, or the local one."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_store(runs)


def shown(uri: str) -> str:
    """A store's URI as it may be told and kept: without a user's name and password."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.username and not parts.password:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def answers(uri: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether a tracking server says anything; stores that are no servers always do.

    MLflow's own client would try for minutes.

    Args:
        uri: of the store.
        patience_s: seconds to wait for.
    """
    if not uri.startswith(("http://", "https://")):
        return True
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=patience_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # a server that wants a password is there; one behind 502 is not
    except (OSError, ValueError):
        return False
