"""What several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says something about the machine, nothing about the code.
settings.register_profile("odvla", deadline=None)
settings.load_profile("odvla")

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
