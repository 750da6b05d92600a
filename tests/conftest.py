"""What several tests share."""

import multiprocessing
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# How long an example takes says something about the machine, nothing about the code.
settings.register_profile("odvla", deadline=None)
settings.load_profile("odvla")

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Tests here start whole programs and last a minute each: begun last, one would go on alone.
BEGIN_WITH = ("tests/experiments/", "tests/test_docs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, else as collected; needs xdist's `--no-loadscope-reorder`, or it sorts."""
    items.sort(key=lambda item: not item.nodeid.startswith(BEGIN_WITH))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of roots that may not be written to go to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODVLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_migration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow takes a new database through all versions it ever had, for seconds: here once."""
    import mlflow.store.db.utils as stores

    migrate, migrated = stores._upgrade_db, tmp_path_factory.mktemp("mlflow") / "migrated.db"

    def copy(source: str | Path, target: str | Path) -> None:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)

    def upgrade(engine: Any) -> None:
        if migrated.is_file():
            copy(migrated, engine.url.database)
        else:
            migrate(engine)
            copy(engine.url.database, migrated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_upgrade_db", upgrade)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference recordings and real nuScenes fragments, where it exists."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("ODVLA_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"the folder {folder} with reference recordings is not here (ODVLA_SHARED)")
    return folder


@pytest.fixture(scope="session")
def town_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole town of two train scenes and one val scene (v1.0-trainval) with small images."""
    from datamodules.town.make import TownConfig, make_town

    out = tmp_path_factory.mktemp("town") / "root"
    return make_town(TownConfig(str(out), scenes=3, image_size=(96, 54), workers=1))


# What these start has imported everything already, which takes a new process ten seconds.
FORK = multiprocessing.get_context("fork")
PATIENCE_S = 250


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    returncode: int | None
    stdout: str
    stderr: str


@pytest.fixture
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """A function that runs another in a process of its own: `forked(work, *arguments, folder=F)`.

    As with a script, its exit status is the number it returns, F is its folder and the first place
    that it imports from.
    """

    def run(work: Callable[..., Any], *arguments: Any, folder: Path) -> Ended:
        said = [tmp_path_factory.mktemp("said") / name for name in ("stdout", "stderr")]
        process = FORK.Process(target=_as_a_script, args=(said, folder, work, *arguments))
        process.start()
        process.join(PATIENCE_S)
        process.kill()  # nothing, where it has ended
        process.join()
        return Ended(process.exitcode, *(path.read_text() for path in said))

    return run


def _as_a_script(said: list[Path], folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    sys.stdout, sys.stderr = (path.open("w", buffering=1) for path in said)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    code = work(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


@pytest.fixture
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int | None]]:
    """A function that runs work(rank, ...) in processes that know one another (gloo).

    `in_processes(count, work, *arguments)` returns their exit codes. With `kill_the_rest`, the
    first one that dies takes the others along, as torchrun has it.
    """

    def run(
        count: int, work: Callable[..., None], *arguments: Any, kill_the_rest: bool = False
    ) -> list[int | None]:
        # By a file: a store's own threads, copied in the middle of something, would stand still.
        place = f"file://{tmp_path_factory.mktemp('rendezvous') / 'file'}"
        started = [
            FORK.Process(target=_joined, args=(rank, count, place, work, *arguments))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        while kill_the_rest and all(process.is_alive() for process in started):
            time.sleep(0.05)
        for process in started:
            if kill_the_rest:
                process.kill()
            process.join(PATIENCE_S)
        for process in started:
            process.kill()  # nothing, where it has ended
            process.join()
        return [process.exitcode for process in started]

    return run


def _joined(rank: int, count: int, place: str, work: Callable[..., None], *arguments: Any) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
