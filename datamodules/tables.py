"""Reads the tables of a nuScenes root, and says in one sentence what is wrong with them.

Of the two tables that also describe every sweep (most of sample_data and ego_pose), only what
belongs to key-frames is kept, as it streams by: a million records that nobody asks for would take
gigabytes. `Tables` has the same names as the devkit's NuScenes, so that code which takes one takes
the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datamodules.table_checks import check_tables
from odvla.errors import UserError

Record = dict[str, Any]
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
STREAMED = ("sample_data", "ego_pose")
_CHUNK = 1 << 22  # characters
_LONGEST = 1 << 25  # characters of a record; more cannot be one
Progress = Callable[[str, int, int], None]  # what is being done, done, of how many


class Tables:
    """Tables of one version; sample_data and ego_pose of the key-frames alone.

    Args:
        folder: the version's folder.
        modalities: sensors whose files are kept.
        sweeps: channels whose files between the key-frames are kept, too.
        progress: told about each table.

    Raises:
        UserError: a table is not JSON, or a record of it does not fit (see table_checks.py): a
            token is there twice or points nowhere, a chain of samples is cut, a value is missing
            or not what it must be.
    """

    def __init__(
        self,
        folder: Path,
        modalities: tuple[str, ...] = ("camera", "lidar"),
        progress: Progress | None = None,
        sweeps: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self._sweeps = sweeps
        self._records: dict[str, list[Record]] = {}
        for done, name in enumerate(n for n in TABLES if n not in STREAMED):
            if progress is not None:
                progress(f"reading {name}", done, len(TABLES))
            self._records[name] = _read_table(folder, name)
        self._rows: dict[str, dict[str, int]] = {}
        check_tables(self._records, folder)
        for done, (name, keep) in enumerate(
            (("sample_data", self._keep_file(modalities)), ("ego_pose", self._keep_pose))
        ):
            if progress is not None:
                progress(f"reading {name}", len(TABLES) - 2 + done, len(TABLES))
            path = folder / f"{name}.json"
            self._records[name] = [record for record in stream_records(path) if keep(record)]
        check_tables(self._records, folder, only=STREAMED)
        self._connect()

    def __getattr__(self, name: str) -> list[Record]:
        """A table by its name."""
        if name.startswith("_") or name not in self._records:
            raise AttributeError(name)
        return self._records[name]

    def get(self, table: str, token: str) -> Record:
        """The record of a token."""
        return self._records[table][self.getind(table, token)]

    def getind(self, table: str, token: str) -> int:
        """The row of a token."""
        if table not in self._rows:
            records = self._records[table]
            self._rows[table] = {record["token"]: row for row, record in enumerate(records)}
        return self._rows[table][token]

    def _keep_file(self, modalities: tuple[str, ...]) -> Callable[[Record], bool]:
        """Key-frames of the wanted sensors; remembers their poses."""
        self._poses: set[str] = set()
        sensors = {s["token"]: s for s in self._records["sensor"]}
        self._channel = {
            c["token"]: sensors[c["sensor_token"]]["channel"]
            for c in self._records["calibrated_sensor"]
            if sensors[c["sensor_token"]]["modality"] in modalities
        }
        known = {c["token"] for c in self._records["calibrated_sensor"]}

        def keep(record: Record) -> bool:
            # As texts, whatever they are: the check of the links names those that are none.
            calibration = str(record.get("calibrated_sensor_token"))
            wanted = calibration in self._channel or calibration not in known
            between = self._channel.get(calibration) in self._sweeps
            if not (wanted and (record.get("is_key_frame") or between)):
                return False
            self._poses.add(str(record.get("ego_pose_token")))
            return True

        return keep

    def _keep_pose(self, record: Record) -> bool:
        return record["token"] in self._poses

    def _connect(self) -> None:
        """Give samples their files and boxes, and boxes their category, as the devkit does."""
        for sample in self._records["sample"]:
            sample["data"], sample["anns"] = {}, []
        for record in self._records["sample_data"]:
            if not record.get("is_key_frame"):
                continue
            channel = self._channel[record["calibrated_sensor_token"]]
            data = self.get("sample", record["sample_token"])["data"]
            if channel in data:
                raise UserError(
                    f"sample {record['sample_token']} has two key-frames of {channel} in "
                    f"{self.folder / 'sample_data.json'}: {data[channel]} and {record['token']}"
                )
            data[channel] = record["token"]
        for record in self._records["sample_annotation"]:
            instance = self.get("instance", record["instance_token"])
            record["category_name"] = self.get("category", instance["category_token"])["name"]
            self.get("sample", record["sample_token"])["anns"].append(record["token"])


def open_tables(
    root: Path, version: str, progress: Progress | None = None, sweeps: tuple[str, ...] = ()
) -> Tables:
    """Load all tables of one version, checked.

    Args:
        root: folder that holds the version's folder, samples/, maps/.
        version: v1.0-mini, v1.0-trainval or v1.0-test.
        progress: told about each table.
        sweeps: see Tables.

    Raises:
        UserError: the root, the version, a table or a map file is missing, or a table does not fit
            (see Tables); the sentence names it.
    """
    folder = check_root(root, version)
    maps = _read_table(folder, "map")
    check_tables({"map": maps}, folder)
    for record in maps:
        if not (root / record["filename"]).is_file():
            raise UserError(
                f"{root / record['filename']}, named by {folder / 'map.json'}, is missing"
            )
    return Tables(folder, progress=progress, sweeps=sweeps)


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


def stream_records(path: Path) -> Iterator[Record]:
    """The records of a table one after another, without holding the whole file.

    Raises:
        UserError: the file is not a JSON list of records with a token; it names the place.
    """
    try:
        yield from _stream(path)
    except UnicodeDecodeError as error:
        raise UserError(f"table {path} is not JSON: {error}") from error


def _stream(path: Path) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at, read = file.read(_CHUNK), 0, 0
        at = _skip(text, 0)
        if text[at : at + 1] != "[":
            raise UserError(f"table {path} is not a list of records with a token")
        at += 1
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                rest = chain((text[at + 1 :],), iter(lambda: file.read(_CHUNK), ""))
                if any(part.strip(" \t\r\n") for part in rest):
                    raise UserError(
                        f"table {path} is not JSON: its list ends at character {read + at}, but "
                        "text follows"
                    )
                return
            try:
                record, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK) if len(text) - at < _LONGEST else ""
                if not more:
                    place = read + error.pos
                    raise UserError(
                        f"table {path} is not JSON: {error.msg} at character {place}"
                    ) from error
                read += at
                text, at = text[at:] + more, 0
                continue
            if not isinstance(record, dict) or not isinstance(record.get("token"), str):
                raise UserError(f"table {path} is not a list of records with a token")
            yield record
            at = end


def _skip(text: str, at: int) -> int:
    """Past white space and the comma between records."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _read_table(folder: Path, name: str) -> list[Record]:
    return list(stream_records(folder / f"{name}.json"))
