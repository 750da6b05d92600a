"""Opening the index against the devkit's load of the same tables: seconds and memory.

    python benchmarks/index.py [--base ROOT] [--scenes 850] [--frames 34149] [--keep DIR]

The root is as large as v1.0-trainval's key-frames, in tables only: a few simulated scenes (of
--base, or of a town of three that is made first) are repeated under new tokens and the official
scene names; some get one more key-frame, a copy of their last, until there are --frames in all. It
has no images and no sweeps. Each way of opening runs in a process of its own; memory is what
opening adds to a process that has imported the libraries: resident (with the pages of the file that
were touched, which all processes share) and private (what every further worker takes again).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamodules.town.make import TownConfig, make_town
from datamodules.town.scenes import scene_names

VERSION = "v1.0-trainval"
SHARED = ("category", "attribute", "visibility", "sensor")  # tables that are not repeated
MEASURE = """
import json, os, sys, time
def memory():
    rows = [line.split() for line in open("/proc/self/smaps_rollup").read().splitlines()[1:]]
    kb = {row[0]: int(row[1]) for row in rows}
    return kb["Rss:"] / 1024, kb["Anonymous:"] / 1024
root, version = sys.argv[1:]
started = time.perf_counter()
IMPORT
imported = time.perf_counter()
before = memory()
at = time.perf_counter()
OPEN
seconds = time.perf_counter() - at
after = memory()
extra = {}
READ
print(json.dumps({
    "import_s": imported - started, "open_s": seconds,
    "resident_mb": after[0] - before[0], "private_mb": after[1] - before[1], **extra,
}))
"""
DEVKIT = {
    "IMPORT": "from nuscenes.nuscenes import NuScenes",
    "OPEN": "tables = NuScenes(version, root, verbose=False); count = len(tables.sample)",
    "READ": "extra['frames'] = count",
}
INDEX = {
    "IMPORT": "from datamodules.index_file import load_index",
    "OPEN": "index = load_index(root, version); count = len(index.frames)",
    "READ": """
from datamodules.agents import agent_targets
from datamodules.ego_state import ego_state, plan_targets
import random
numbers = random.Random(0).sample(range(count), min(2000, count))
at = time.perf_counter()
for number in numbers:
    frame = index.frames[number]
    ego_state(index, frame)
    plan_targets(index, frame)
    agent_targets(index, frame, (-51.2, 51.2, -51.2, 51.2))
extra["read_ms"] = 1e3 * (time.perf_counter() - at) / len(numbers)
extra["read_resident_mb"], extra["read_private_mb"] = (a - b for a, b in zip(memory(), before))
extra["frames"] = count
""",
}
BUILD = {
    "IMPORT": """
from pathlib import Path
from datamodules.index_file import build_index, index_places
""",
    "OPEN": """
file = index_places(Path(root), version)[0]
index = build_index(Path(root), version, file)
""",
    "READ": "extra['frames'] = len(index.frames); extra['file_mb'] = file.stat().st_size / 1e6",
}


def large_root(base: Path, version: str, out: Path, scenes: int, frames: int) -> None:
    """Write the tables of a root of so many scenes and key-frames; maps and CAN bus are links."""
    tables = {p.stem: json.loads(p.read_text()) for p in (base / version).glob("*.json")}
    by_scene = [_of_scene(tables, scene) for scene in tables["scene"]]
    extra = frames - sum(len(by_scene[k % len(by_scene)]["sample"]) for k in range(scenes))
    if not 0 <= extra <= scenes:
        raise SystemExit(f"{frames} key-frames cannot be reached with {scenes} of these scenes")
    large: dict[str, list[Any]] = {name: list(tables[name]) for name in SHARED}
    (out / "can_bus").mkdir(parents=True)
    for number, (name, _) in enumerate(scene_names(scenes)):
        original = by_scene[number % len(by_scene)]
        copy = json.loads(_renamed(json.dumps(original), original, number))
        for kind in ("pose", "steeranglefeedback"):
            source = base / "can_bus" / f"{copy['scene'][0]['name']}_{kind}.json"
            if source.is_file():
                (out / "can_bus" / f"{name}_{kind}.json").symlink_to(source.resolve())
        copy["scene"][0]["name"] = name
        if number < extra:
            _one_more(copy, number)
        for table, records in copy.items():
            large.setdefault(table, []).extend(records)
    # A map lists the drives made there: those of the copies are known by what follows the number.
    homes = {token[4:]: record for record in tables["map"] for token in record["log_tokens"]}
    large["map"] = [{**record, "log_tokens": []} for record in tables["map"]]
    by_token = {record["token"]: record for record in large["map"]}
    for record in large["log"]:
        by_token[homes[record["token"][4:]]["token"]]["log_tokens"].append(record["token"])
    (out / "maps").symlink_to((base / "maps").resolve())
    (out / VERSION).mkdir()
    for name, records in large.items():
        (out / VERSION / f"{name}.json").write_text(json.dumps(records))


def _of_scene(tables: dict[str, list[Any]], scene: dict[str, Any]) -> dict[str, list[Any]]:
    """The records of all tables that belong to one scene."""
    samples = [r for r in tables["sample"] if r["scene_token"] == scene["token"]]
    own = {r["token"] for r in samples}
    data = [r for r in tables["sample_data"] if r["sample_token"] in own]
    boxes = [r for r in tables["sample_annotation"] if r["sample_token"] in own]

    def named(table: str, key: str, records: list[Any]) -> list[Any]:
        wanted = {record[key] for record in records}
        return [record for record in tables[table] if record["token"] in wanted]

    return {
        "scene": [scene],
        "log": named("log", "log_token", [scene]),
        "sample": samples,
        "sample_data": data,
        "ego_pose": named("ego_pose", "ego_pose_token", data),
        "calibrated_sensor": named("calibrated_sensor", "calibrated_sensor_token", data),
        "sample_annotation": boxes,
        "instance": named("instance", "instance_token", boxes),
    }


def _renamed(text: str, records: dict[str, list[Any]], number: int) -> str:
    """Every token of a scene's own records starts with the copy's number instead."""
    own = {record["token"] for table in records.values() for record in table}

    def rename(found: re.Match[str]) -> str:
        token = found[1]
        return f'"{number:04x}{token[4:]}"' if token in own else found[0]

    return re.sub(r'"([0-9a-f]{32})"', rename, text)


def _one_more(records: dict[str, list[Any]], number: int) -> None:
    """A last key-frame, like the one before and half a second later, without boxes."""
    last = next(r for r in records["sample"] if not r["next"])
    new = {**last, "token": f"ffff{number:04x}" + last["token"][8:], "prev": last["token"]}
    last["next"] = new["token"]
    new["timestamp"] += 500_000
    records["sample"].append(new)
    records["scene"][0]["last_sample_token"] = new["token"]
    records["scene"][0]["nbr_samples"] += 1
    for data in [r for r in records["sample_data"] if r["sample_token"] == last["token"]]:
        records["sample_data"].append(
            {
                **data,
                "token": f"ffff{number:04x}" + data["token"][8:],
                "sample_token": new["token"],
            }
        )


def measure(root: Path, parts: dict[str, str]) -> dict[str, float]:
    """Run one way of opening in a process of its own."""
    code = MEASURE
    for name, text in parts.items():
        code = code.replace(name, text)
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), VERSION],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="a root whose scenes are repeated")
    parser.add_argument("--version", default=VERSION, help="of the base")
    parser.add_argument("--scenes", type=int, default=850)
    parser.add_argument("--frames", type=int, default=34_149)
    parser.add_argument("--keep", type=Path, help="make the large root here, or take it from here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch) / "large"
        if not (root / VERSION).is_dir():
            base = options.base
            if base is None:
                settings = TownConfig(str(Path(scratch) / "town"), scenes=3, image_size=(64, 36))
                base = make_town(settings)
            large_root(base, options.version, root, options.scenes, options.frames)
        results = {
            "nuScenes devkit": measure(root, DEVKIT),
            "building the index (once)": measure(root, BUILD),
            "opening the index": measure(root, INDEX),
            "opening it again": measure(root, INDEX),
        }
    table = Table(title=f"{results['opening the index']['frames']} key-frames")
    for column in ("", "seconds", "resident MB", "private MB", "import s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, numbers in results.items():
        cells = [numbers[k] for k in ("open_s", "resident_mb", "private_mb", "import_s")]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    console = Console(width=110)
    console.print(table)
    last = results["opening it again"]
    console.print(
        f"index file {results['building the index (once)']['file_mb']:.0f} MB; after reading 2000 "
        f"random key-frames ({last['read_ms']:.2f} ms each): resident "
        f"{last['read_resident_mb']:.0f} MB, private {last['read_private_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
