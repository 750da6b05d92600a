"""What can be wrong with the tables of a data root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nuscenes.utils.splits import create_splits_scenes

from datamodules.records import LIDAR, SPLITS
from datamodules.table_checks import broken_chains, broken_links, broken_values, doubled_tokens
from datamodules.tables import STREAMED, TABLES, stream_records
from experiments.doctor.findings import Finding, green, summed
from odvla.errors import UserError
from odvla.types import CAMERAS

Record = dict[str, Any]
POSES, BOXES = ("calibrated_sensor", "ego_pose"), ("sample_annotation",)
AGAIN = "unpack the archive of the metadata again"


class RawTables:
    """The tables that can be read; of sample_data and ego_pose what belongs to key-frames.

    Args:
        folder: the version's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []
        self.records: dict[str, list[Record]] = {}
        for name in TABLES:
            if name not in STREAMED:
                self._read(name, lambda _: True)
        self._read("sample_data", lambda record: record.get("is_key_frame", False))
        poses = {record.get("ego_pose_token") for record in self["sample_data"]}
        self._read("ego_pose", lambda record: record["token"] in poses)
        if not self.unreadable:
            # What every other check goes by: texts and times.
            others = set(TABLES).difference(POSES, BOXES)
            self.unreadable += broken_values(self.records, folder, others)
        self.by_token = {
            name: {record["token"]: record for record in records}
            for name, records in self.records.items()
        }

    def __getitem__(self, table: str) -> list[Record]:
        return self.records.get(table, [])

    def _read(self, name: str, keep: Callable[[Record], bool]) -> None:
        path = self.folder / f"{name}.json"
        try:
            self.records[name] = [record for record in stream_records(path) if keep(record)]
        except OSError:
            self.unreadable.append(f"table {path} is missing")
        except UserError as error:
            self.unreadable.append(str(error))

    def channel(self, data: Record) -> str:
        """Sensor of a sample_data record; "" where its tokens lead nowhere."""
        calibration = self.by_token["calibrated_sensor"].get(
            data.get("calibrated_sensor_token", "")
        )
        sensor = self.by_token["sensor"].get((calibration or {}).get("sensor_token", ""))
        return (sensor or {}).get("channel", "")


def check_tables(tables: RawTables, version: str) -> Iterator[Finding]:
    """All checks of the tables' content. Where tables cannot be read, nothing else is checked."""
    fine = f"all {len(TABLES)} tables of {version} can be read"
    yield summed("tables", tables.unreadable, fine, AGAIN)
    if tables.unreadable:
        return
    twice = doubled_tokens(tables.records, tables.folder)
    yield summed("tokens twice", twice, "every token names one record", AGAIN)
    links = list(broken_links(tables.records, tables.folder))
    yield summed("links", links, "every token leads to a record", AGAIN)
    yield summed("chains", broken_chains(tables.records, tables.folder), _counts(tables), AGAIN)
    yield summed(
        "sensors",
        _sensors(tables),
        f"every key-frame has {len(CAMERAS)} cameras and {LIDAR}",
        "a camera cannot be left out; get the whole sample_data table",
    )
    poses = broken_values(tables.records, tables.folder, POSES)
    yield summed("calibration", poses, "calibration and poses are numbers", AGAIN)
    boxes = broken_values(tables.records, tables.folder, BOXES)
    yield summed("boxes", boxes, f"{len(tables['sample_annotation'])} boxes", AGAIN)
    yield _splits(tables, version)
    yield summed(
        "leaks",
        _leaks(tables, version),
        "no file or key-frame belongs to both training and evaluation",
        "every score would be wrong: remove what is doubled",
    )


def _counts(tables: RawTables) -> str:
    return f"{len(tables['scene'])} scenes of {len(tables['sample'])} key-frames in order"


def _sensors(tables: RawTables) -> Iterator[str]:
    found: dict[str, Counter[str]] = {}
    for data in tables["sample_data"]:
        found.setdefault(data.get("sample_token", ""), Counter())[tables.channel(data)] += 1
    for sample in tables["sample"]:
        channels = found.get(sample["token"], Counter())
        for name in (LIDAR, *CAMERAS):
            if channels[name] != 1:
                yield f"sample {sample['token']} has {channels[name]} key-frames of {name}, not 1"


def _splits(tables: RawTables, version: str) -> Finding:
    official = create_splits_scenes()
    names = [scene.get("name") for scene in tables["scene"]]
    counts = {
        split: sum(name in official[key] for name in names)
        for split, key in SPLITS[version].items()
    }
    strange = len(names) - sum(counts.values())
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    if strange:
        found = f"{strange} of {len(names)} scenes are in no split of {version} ({listed})"
        advice = f"is {version} the right version? Scenes without a split are not used"
        return Finding("splits", "yellow", found, advice)
    empty = [split for split, count in counts.items() if not count]
    if empty:
        found = f"no scene of the {empty[0]} split is there ({listed})"
        return Finding("splits", "yellow", found, "fit needs train and val scenes, test val scenes")
    return green("splits", f"scenes: {listed}")


def _leaks(tables: RawTables, version: str) -> Iterator[str]:
    official = create_splits_scenes()
    scenes = tables["scene"]
    for name, count in Counter(scene.get("name") for scene in scenes).items():
        if count > 1:
            yield f"{count} scenes are called {name}"
    training = SPLITS[version].get("train")
    train = set(official[training]) if training else set()
    scene_of = {s["token"]: s.get("scene_token", "") for s in tables["sample"]}
    name_of = {scene["token"]: scene.get("name", "") for scene in scenes}
    used: dict[str, set[str]] = {}
    for data in tables["sample_data"]:
        scene = name_of.get(scene_of.get(data.get("sample_token", ""), ""), "")
        used.setdefault(data.get("filename", ""), set()).add(scene)
    for file, names in used.items():
        if len({name in train for name in names}) > 1:
            yield f"{file} belongs to {' and '.join(sorted(names))}, of different splits"
