"""Opens a nuScenes root with the devkit, and says in one sentence what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nuscenes.nuscenes import NuScenes

from odvla.errors import UserError

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
# (table, field, table the field points into, may be empty). map.log_tokens is left out: in the real
# v1.0-mini it names logs that only v1.0-trainval has.
LINKS = (
    ("calibrated_sensor", "sensor_token", "sensor", False),
    ("instance", "category_token", "category", False),
    ("sample", "scene_token", "scene", False),
    ("sample", "prev", "sample", True),
    ("sample", "next", "sample", True),
    ("sample_annotation", "attribute_tokens", "attribute", True),
    ("sample_annotation", "instance_token", "instance", False),
    ("sample_annotation", "next", "sample_annotation", True),
    ("sample_annotation", "prev", "sample_annotation", True),
    ("sample_annotation", "sample_token", "sample", False),
    ("sample_annotation", "visibility_token", "visibility", True),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor", False),
    ("sample_data", "ego_pose_token", "ego_pose", False),
    ("sample_data", "sample_token", "sample", False),
    ("scene", "first_sample_token", "sample", False),
    ("scene", "last_sample_token", "sample", False),
    ("scene", "log_token", "log", False),
)


def open_tables(root: Path, version: str) -> NuScenes:
    """Load all tables of one version, checked.

    Args:
        root: folder that holds the version's folder, samples/, maps/.
        version: v1.0-mini, v1.0-trainval or v1.0-test.

    Returns:
        The devkit's database. It is large: take what is needed and drop it.

    Raises:
        UserError: the root, the version, a table or a map file is missing, a table is not JSON, or
            a token points nowhere; the sentence names it.
    """
    folder = check_root(root, version)
    maps = _read_table(folder, "map")
    for record in maps:
        if not (root / record["filename"]).is_file():
            raise UserError(
                f"{root / record['filename']}, named by {folder / 'map.json'}, is missing"
            )
    try:
        tables = NuScenes(version=version, dataroot=str(root), verbose=False)
    except (KeyError, json.JSONDecodeError) as error:
        # The devkit stops at a bare KeyError; find the record that caused it.
        raw = {name: _read_table(folder, name) for name in TABLES}
        check_links(raw, folder)
        raise UserError(f"{folder} cannot be loaded by the nuScenes devkit: {error!r}") from error
    check_links({name: getattr(tables, name) for name in TABLES}, folder)
    return tables


def check_root(root: Path, version: str) -> Path:
    """Folder of the tables, after checking that it and all thirteen tables are there.

    Raises:
        UserError: naming what is missing, and the versions that are there.
    """
    if not root.is_dir():
        raise UserError(f"data root {root} does not exist (set ODVLA_DATA or data.root)")
    folder = root / version
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())) or "none"
        raise UserError(f"data root {root} has no version {version!r}; versions found: {found}")
    for name in TABLES:
        if not (folder / f"{name}.json").is_file():
            raise UserError(f"table {folder / f'{name}.json'} is missing")
    return folder


def check_links(tables: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path) -> None:
    """Follow every token of every table.

    Args:
        tables: table name -> records.
        folder: where they came from, for the message.

    Raises:
        UserError: naming table, record, field and token of the first that points nowhere.
    """
    known = {name: {record["token"] for record in records} for name, records in tables.items()}
    for table, field, target, may_be_empty in LINKS:
        tokens = known[target]
        for record in tables[table]:
            if field not in record:
                raise UserError(
                    f"record {record['token']} of {folder / table}.json has no {field!r}"
                )
            value = record[field]
            for token in value if isinstance(value, list) else (value,):
                if token in tokens or (may_be_empty and token == ""):
                    continue
                raise UserError(
                    f"record {record['token']} of {folder / table}.json: {field} {token!r} "
                    f"is not in {target}.json"
                )


def _read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    try:
        records = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"table {path} is not JSON: {error}") from error
    if not isinstance(records, list) or any("token" not in record for record in records):
        raise UserError(f"table {path} is not a list of records with a token")
    return records
