"""A data root from outside in: folder, tables, files, maps, CAN bus, index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nuscenes.can_bus.can_bus_api import NuScenesCanBus

from datamodules.frames import load_image
from datamodules.index_file import index_places, sources_of, why_unfit, writable
from datamodules.map_geometry import expansion_file, location_map
from datamodules.records import LIDAR, SPLITS
from experiments.doctor.environment import disk_space
from experiments.doctor.findings import Finding, green, red, summed, yellow
from experiments.doctor.tables import RawTables, check_tables
from odvla.errors import UserError
from odvla.types import CAMERAS

SMALLEST_FILE = 500  # bytes; a real camera image has a hundred thousand
DECODED = 24  # images that are decoded, spread evenly
DOWNLOAD = "download or unpack that part of the data set again"


def check_data(root: Path, version: str) -> Iterator[Finding]:
    """Every check of a data root that does not depend on an experiment."""
    if not root.is_dir():
        advice = "set ODVLA_DATA or --data to a nuScenes root, or make one: data make"
        yield red("data root", f"{root} is not a folder", advice)
        return
    folder = root / version
    if version not in SPLITS or not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())) or "none"
        advice = "choose one of them (--version, or data.version=...), or unpack the metadata here"
        yield red("data root", f"{root} has no {version}; versions found: {found}", advice)
        return
    yield green("data root", f"{root} holds {version}")
    tables = RawTables(folder)
    yield from check_tables(tables, version)
    yield disk_space("disk for the index", index_places(root, version)[0].parent)
    if tables.unreadable:
        return
    yield from _files(root, tables)
    yield from _maps(root, tables)
    yield from _can_bus(root, tables)
    yield _index(root, version)


def _files(root: Path, tables: RawTables) -> Iterator[Finding]:
    """The camera and lidar files of the key-frames."""
    cameras = [d for d in tables["sample_data"] if tables.channel(d) in CAMERAS]
    sweeps = [d for d in tables["sample_data"] if tables.channel(d) == LIDAR]
    missing, small = [], []
    broken: list[str] = []
    sizes: list[str] = []
    there = []
    for data in cameras:
        path = root / data["filename"]
        if not path.is_file():
            missing.append(f"camera image {path} is missing")
        elif path.stat().st_size < SMALLEST_FILE:
            small.append(f"camera image {path} has only {path.stat().st_size} bytes")
        else:
            there.append(data)
    yield summed("images", missing, f"all {len(cameras)} camera images are there", DOWNLOAD)
    yield summed("image files", small, "no image file is suspiciously small", DOWNLOAD)
    chosen = there[:: max(1, len(there) // DECODED)]
    for data in chosen:
        size = (data["width"], data["height"])
        path = root / data["filename"]
        try:
            load_image(path, size, size, strict_size=True)
        except UserError as error:
            (sizes if "is not of the size" in str(error) else broken).append(str(error))
    yield summed("image content", broken, f"{len(chosen)} images decode", DOWNLOAD)
    advice = "the calibration would not fit: were the images resized?"
    yield summed("image size", sizes, "images have the size that the tables give", advice)
    lost = [
        f"lidar sweep {root / data['filename']} is missing or empty"
        for data in sweeps
        if not (root / data["filename"]).is_file() or not (root / data["filename"]).stat().st_size
    ]
    fine = f"all {len(sweeps)} lidar sweeps are there"
    yield summed("lidar", lost, fine, "only pictures need them", level="yellow")


def _maps(root: Path, tables: RawTables) -> Iterator[Finding]:
    lost = [
        f"{root / record['filename']}, named by map.json, is missing"
        for record in tables["map"]
        if not (root / record["filename"]).is_file()
    ]
    yield summed("base maps", lost, f"{len(tables['map'])} base maps", "unpack the map archive")
    places = sorted({log["location"] for log in tables["log"]})
    missing, broken = [], []
    for place in places:
        path = expansion_file(root, place)
        if not path.is_file():
            missing.append(f"map expansion {path} is missing")
            continue
        try:
            location_map(root, place)
        except UserError as error:
            broken.append(str(error))
        # Whatever is inside: the devkit raises what its parts raise.
        except (ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
            broken.append(f"map expansion {path} cannot be read: {error!r}")
    yield summed("map expansion", broken, "map expansions can be read", "unpack it again")
    advice = "unpack nuScenes' map expansion 1.3 into maps/; map targets and map texts need it"
    yield summed("map places", missing, f"maps of {', '.join(places)}", advice, level="yellow")


def _can_bus(root: Path, tables: RawTables) -> Iterator[Finding]:
    """A pose file a scene that reaches over the scene's time."""
    without, broken, short = [], [], []
    known_without = {f"scene-{number:04d}" for number in _blacklist(root)}
    bounds: dict[str, list[int]] = {}
    for sample in tables["sample"]:
        bounds.setdefault(sample["scene_token"], []).append(sample["timestamp"])
    for scene in tables["scene"]:
        name = scene["name"]
        path = root / "can_bus" / f"{name}_pose.json"
        if not path.is_file():
            if name not in known_without:
                without.append(f"CAN bus file {path} is missing")
            continue
        times = _times(path)
        if isinstance(times, str):
            broken.append(times)
        elif min(bounds.get(scene["token"], [0])) > times[1] + 1_000_000 or (
            max(bounds.get(scene["token"], [0])) < times[0] - 1_000_000
        ):
            short.append(f"CAN bus file {path} is of another time than {name}")
    yield summed("CAN bus files", broken, "CAN bus files can be read", "unpack can_bus.zip again")
    yield summed("CAN bus time", short, "CAN bus and key-frames are of the same time", DOWNLOAD)
    advice = "unpack can_bus.zip into the root; speeds then come from poses and steering is 0"
    count = len(tables["scene"]) - len(without)
    yield summed("CAN bus", without, f"CAN bus of {count} scenes", advice, level="yellow")


def _blacklist(root: Path) -> list[int]:
    """Scenes that never had a CAN bus, as the devkit lists them."""
    if not (root / "can_bus").is_dir():
        return []
    return list(NuScenesCanBus(dataroot=str(root)).can_blacklist)


def _times(path: Path) -> tuple[int, int] | str:
    """First and last time of a file's messages, or what is wrong with it."""
    try:
        messages: Any = json.loads(path.read_text())
        times = [int(message["utime"]) for message in messages]
        fields = all({"accel", "rotation_rate", "vel"} <= set(message) for message in messages)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        return f"CAN bus file {path} cannot be read: {error!r}"
    if not times or not fields:
        return f"CAN bus file {path} holds no whole messages"
    return min(times), max(times)


def _index(root: Path, version: str) -> Finding:
    """Whether training can start at once."""
    places = index_places(root.resolve(), version)
    sources = sources_of(root, version)
    reasons = []
    for file in places:
        if file.is_file():
            reason = why_unfit(file, root.resolve(), version, sources)
            if reason is None:
                return green("index", f"{file} fits")
            reasons.append(reason)
    if not any(writable(place.parent) for place in places):
        advice = "set ODVLA_CACHE to a folder that can be written to"
        return red("index", f"neither {root} nor {places[-1].parent} can be written to", advice)
    found = reasons[0] if reasons else "there is no index yet"
    return yellow("index", found, f"the next run makes one, or: data index {root}")
