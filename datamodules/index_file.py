"""Where the index of a nuScenes root lies, whether it fits the root, and how it comes about.

`load_index` is what data modules call: it maps the index beside the data (or in the cache folder,
where the root may not be written to) and builds it first where there is none that fits. An index
knows the files it was made from by name, size and time; `map_index` refuses one that is of another
schema, another version or other files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from numpy.typing import NDArray

from datamodules.columns import Columns, open_columns, partial_path, write_columns
from datamodules.records import SPLITS, Index, index_of_arrays
from datamodules.tables import TABLES, Progress, check_root, open_tables
from odvla.errors import UserError

log = logging.getLogger(__name__)
KIND = "odvla index"
SCHEMA_VERSION = 3  # raised with every change of the arrays' names, units or meaning
Arrays = dict[str, NDArray[Any]]
Sources = dict[str, list[int]]  # file relative to the root -> size in bytes, time in ns


def load_index(root: str | Path, version: str) -> Index:
    """The index of a root, built if there is none that fits, and kept in memory per process.

    Args:
        root: a nuScenes root (or a generated town).
        version: v1.0-mini, v1.0-trainval or v1.0-test.

    Raises:
        UserError: anything missing or inconsistent; the sentence names it.
    """
    folder = Path(root).expanduser().resolve()
    tables = check_version(folder, version)
    # The time of the largest table tells a regenerated root from the one in memory.
    return _load_index(folder, version, (tables / "sample_data.json").stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load_index(root: Path, version: str, _modified_ns: int) -> Index:
    return map_index(ensure_index(root, version), root)


def ensure_index(root: Path, version: str, progress: Progress | None = None) -> Path:
    """The file of an index that fits the root, built if there is none.

    Args:
        root: the data root.
        version: of the tables.
        progress: told about a build.

    Raises:
        UserError: anything missing or inconsistent; the sentence names it.
    """
    root = root.expanduser().resolve()
    check_version(root, version)
    places = index_places(root, version)
    sources = sources_of(root, version)
    for file in places:
        if file.is_file() and why_unfit(file, root, version, sources) is None:
            return file
    file = next((place for place in places if writable(place.parent)), places[-1])
    # Whoever comes second waits, and finds the index made.
    name = hashlib.sha256(str(file).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"odvla-index-{name}.lock"):
        reason = why_unfit(file, root, version, sources) if file.is_file() else "there is none yet"
        if reason is not None:
            log.info("building the index %s (%s)", file, reason)
            build_index(root, version, file, progress)
    return file


def check_version(root: Path, version: str) -> Path:
    """Folder of a version's tables; see check_root."""
    if version not in SPLITS:
        raise UserError(f"data version {version!r} is not one of {', '.join(SPLITS)}")
    return check_root(root, version)


def index_places(root: Path, version: str) -> tuple[Path, ...]:
    """Where an index may lie: beside the data, or in ODVLA_CACHE (~/.cache/odvla)."""
    beside = root / f"odvla-index-{version}.arrow"
    name = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    return beside, cache_folder() / f"{root.name}-{name}-{version}.arrow"


def cache_folder() -> Path:
    """Where files made from data are kept: ODVLA_CACHE, or ~/.cache/odvla."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "odvla"
    return Path(os.environ.get("ODVLA_CACHE", fallback)).expanduser()


def writable(folder: Path) -> bool:
    """Whether files may be made in a folder (that may not be there yet).

    A folder without any write permission is left alone, even by a user who could write there.
    """
    while not folder.exists():
        folder = folder.parent
    mode = folder.stat().st_mode
    may = mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    return bool(may) and os.access(folder, os.W_OK)


def build_index(root: Path, version: str, out: Path, progress: Progress | None = None) -> Index:
    """Read a root's tables, maps and CAN bus and write its index.

    The file appears whole or not at all. Each step of a build is kept beside it until then; after
    a kill the same call goes on with the step that was not finished.

    Args:
        root: the data root.
        version: of the tables.
        out: the file to write.
        progress: told about each part.

    Raises:
        UserError: anything missing or inconsistent; the sentence names it.
    """
    from datamodules.index_build import index_steps

    check_version(root, version)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_path(out).unlink(missing_ok=True)
    # Before reading: a table that changes meanwhile makes the index stale, not wrong.
    sources = sources_of(root, version)
    metadata = {
        "kind": KIND,
        "schema_version": str(SCHEMA_VERSION),
        "version": version,
        "fingerprint": fingerprint(sources),
    }
    steps = index_steps(lambda: open_tables(root, version, progress), root, version, progress)
    folder = out.with_name(f".{out.name}.steps")
    arrays = _in_steps(steps, folder, metadata)
    if progress is not None:
        progress("writing", 0, 1)
    write_columns(out, arrays, {**metadata, "sources": json.dumps(sources)})
    shutil.rmtree(folder, ignore_errors=True)
    return map_index(out, root)


def _in_steps(
    steps: Mapping[str, Callable[[Arrays], Arrays]], folder: Path, facts: dict[str, str]
) -> Arrays:
    """Take the steps of a build that a folder does not have, and put them there.

    Args:
        steps: each takes the arrays of those before it.
        folder: where they are kept.
        facts: what they are made from; a step that was made from something else is made anew.
    """
    arrays: Arrays = {}
    for name, step in steps.items():
        file = folder / f"{name}.arrow"
        made = _finished(file, facts)
        if made is None:
            made = step(arrays)
            folder.mkdir(exist_ok=True)
            write_columns(file, made, facts)
        else:
            log.info("%s was made before, by a build that did not come to its end", name)
        arrays |= made
    return arrays


def _finished(file: Path, facts: dict[str, str]) -> Arrays | None:
    try:
        step = open_columns(file)
    except UserError:
        return None
    return step.arrays if step.metadata == facts else None


def map_index(file: Path, root: Path) -> Index:
    """Map an index without looking at its sources.

    Raises:
        UserError: it is not a whole index of this schema.
    """
    columns = open_columns(file)
    problem = _why_not_ours(columns)
    if problem is not None:
        raise UserError(problem)
    return index_of_arrays(root, columns.metadata["version"], columns.arrays, file)


def open_index(file: Path, root: Path, version: str) -> Index:
    """Map an index that must fit a root.

    Raises:
        UserError: it is missing, damaged, stale or of another root; the sentence says which.
    """
    check_version(root, version)
    if not file.is_file():
        raise UserError(f"there is no index {file}; make it with `data index {root}`")
    problem = why_unfit(file, root, version, sources_of(root, version))
    if problem is not None:
        raise UserError(f"{problem}; make it anew with `data index {root} --version {version}`")
    return map_index(file, root)


def why_unfit(file: Path, root: Path, version: str, sources: Sources) -> str | None:
    """Why an index is not that of a root in its present state; None: it is."""
    try:
        columns = open_columns(file)
    except UserError as error:
        return str(error)
    problem = _why_not_ours(columns)
    if problem is not None:
        return problem
    facts = columns.metadata
    if facts["version"] != version:
        return f"the index {file} is of {facts['version']}, not of {version}"
    if facts["fingerprint"] == fingerprint(sources):
        return None
    known: dict[str, Any] = json.loads(facts["sources"])
    sizes = [known.get(name, [None])[0] == size for name, (size, _) in sources.items()]
    if not any(sizes[: len(TABLES)]):
        return f"the index {file} was made from other data than {root}"
    changed = [name for name, facts in sources.items() if known.get(name) != facts]
    gone = [name for name in known if name not in sources]
    return (
        f"the index {file} is stale: {len(changed) + len(gone)} of the files it was made from "
        f"changed since, e.g. {(changed or gone)[0]}"
    )


def _why_not_ours(columns: Columns) -> str | None:
    facts = columns.metadata
    if facts.get("kind") != KIND:
        return f"{columns.path} is an Arrow file, but not an index"
    if facts["schema_version"] != str(SCHEMA_VERSION):
        return (
            f"the index {columns.path} has schema version {facts['schema_version']}, "
            f"this program reads {SCHEMA_VERSION}"
        )
    return None


def sources_of(root: Path, version: str) -> Sources:
    """Size and time of every file an index is made from: the tables first, then maps, CAN bus."""
    paths = [root / version / f"{name}.json" for name in TABLES]
    paths += sorted((root / "maps" / "expansion").glob("*.json"))
    for kind in ("pose", "steeranglefeedback"):
        paths += sorted((root / "can_bus").glob(f"*_{kind}.json"))
    found = {}
    for path in paths:
        facts = path.stat()
        found[str(path.relative_to(root))] = [facts.st_size, facts.st_mtime_ns]
    return found


def fingerprint(sources: Sources) -> str:
    """One text for all sources."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
