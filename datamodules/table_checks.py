"""What can be wrong inside nuScenes tables, one sentence for each record that does not fit.

Readers stop at the first sentence (`check_tables`), the doctor prints all of them.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from odvla.errors import UserError

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # table name -> records, each with a token
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
TEXT, WHOLE, NUMBER = "a text", "a whole number", "a finite number"
VECTOR, SIZE = "three finite numbers", "three finite numbers above 0"
QUADRUPLE, ROTATION = "four finite numbers", "a unit quaternion"
INTRINSICS = "a 3 x 3 matrix with focal lengths"
# (table, field, what it must be): all that readers take from a record besides its links.
VALUES = (
    ("attribute", "name", TEXT),
    ("calibrated_sensor", "translation", VECTOR),
    ("calibrated_sensor", "rotation", ROTATION),
    ("calibrated_sensor", "camera_intrinsic", INTRINSICS),
    ("category", "name", TEXT),
    ("ego_pose", "translation", VECTOR),
    ("ego_pose", "rotation", ROTATION),
    ("log", "location", TEXT),
    ("map", "filename", TEXT),
    ("sample", "timestamp", WHOLE),
    ("sample_annotation", "translation", VECTOR),
    ("sample_annotation", "size", SIZE),
    ("sample_annotation", "rotation", ROTATION),
    ("sample_annotation", "num_lidar_pts", WHOLE),
    ("sample_annotation", "num_radar_pts", WHOLE),
    ("sample_data", "filename", TEXT),
    ("sample_data", "timestamp", WHOLE),
    ("sample_data", "width", WHOLE),
    ("sample_data", "height", WHOLE),
    ("scene", "name", TEXT),
    ("scene", "description", TEXT),
    ("sensor", "channel", TEXT),
    ("sensor", "modality", TEXT),
)
_SHAPES = {
    NUMBER: (),
    VECTOR: (3,),
    SIZE: (3,),
    QUADRUPLE: (4,),
    ROTATION: (4,),
    INTRINSICS: (3, 3),
}
_UNIT_TOLERANCE = 1e-2  # of a quaternion's length


def check_tables(tables: Records, folder: Path, only: Collection[str] | None = None) -> None:
    """Look at every record.

    Args:
        tables: table name -> records. Fields that point into a table that is not there wait.
        folder: where they came from, for the message.
        only: tables whose records are looked at; None: all that are there.

    Raises:
        UserError: naming table and record of the first that does not fit.
    """
    looked_at = {name: tables[name] for name in (tables if only is None else only)}
    problems = chain(
        doubled_tokens(looked_at, folder),
        broken_links(tables, folder, looked_at),
        broken_values(looked_at, folder),
        broken_chains(looked_at, folder) if "sample" in looked_at else (),
    )
    for problem in problems:
        raise UserError(problem)


def doubled_tokens(tables: Records, folder: Path) -> Iterator[str]:
    """A sentence for every token that more than one record of a table has."""
    for table, records in tables.items():
        counts = Counter(record["token"] for record in records)
        for token, count in counts.items():
            if count > 1:
                yield f"table {folder / table}.json has {count} records with the token {token}"


def broken_links(
    tables: Records, folder: Path, only: Collection[str] | None = None
) -> Iterator[str]:
    """A sentence for every token that points nowhere and every missing field; see check_tables."""
    known: dict[str, set[str]] = {}
    for table, field, target, may_be_empty in LINKS:
        if table not in tables or target not in tables or table not in (only or tables):
            continue
        if target not in known:
            known[target] = {record["token"] for record in tables[target]}
        tokens = known[target]
        for record in tables[table]:
            if field not in record:
                yield f"record {record['token']} of {folder / table}.json has no {field!r}"
                continue
            value = record[field]
            many = isinstance(value, list) and field.endswith("tokens")
            for token in value if many else (value,):
                if isinstance(token, str) and (token in tokens or (may_be_empty and not token)):
                    continue
                yield (
                    f"record {record['token']} of {folder / table}.json: {field} {token!r} "
                    f"is not in {target}.json"
                )


def broken_values(
    tables: Records, folder: Path, only: Collection[str] | None = None
) -> Iterator[str]:
    """A sentence for every value that is not what it must be; see check_tables."""
    for table, field, kind in VALUES:
        if table not in (tables if only is None else only):
            continue
        records = tables[table]
        if kind == INTRINSICS:  # lidars and radars have none
            cameras = {s["token"] for s in tables["sensor"] if s.get("modality") == "camera"}
            records = [record for record in records if record.get("sensor_token") in cameras]
        for number, problem in unfit(records, field, kind):
            yield f"record {records[number]['token']} of {folder / table}.json{problem}"


def unfit(records: Sequence[Mapping[str, Any]], field: str, kind: str) -> Iterator[tuple[int, str]]:
    """Number of every record whose field is not of a kind, and how the sentence about it ends."""
    # All at once, because almost always all of a million are fine.
    if fit([record.get(field) for record in records], kind):
        return
    for number, record in enumerate(records):
        if field not in record:
            yield number, f" has no {field!r}"
        elif not fit([record[field]], kind):
            yield number, f": {field} {reprlib.repr(record[field])} is not {kind}"


def fit(values: Sequence[Any], kind: str) -> bool:
    """Whether all values, as JSON has them, are of a kind (TEXT and so on)."""
    if not values:
        return True
    if kind == TEXT:
        # JSON can name half a character, which no file can hold.
        return all(isinstance(v, str) and v.encode(errors="ignore").decode() == v for v in values)
    if kind == WHOLE:
        return all(type(value) is int and -(2**63) <= value < 2**63 for value in values)
    try:
        numbers = np.array(values)
    except ValueError:  # lists of several lengths
        return False
    if numbers.dtype.kind not in "if" or numbers.shape[1:] != _SHAPES[kind]:
        return False
    if kind == ROTATION:
        off = np.abs(np.linalg.norm(numbers, axis=1) - 1)
        return bool((off < _UNIT_TOLERANCE).all())
    if kind == SIZE and not (numbers > 0).all():
        return False
    if kind == INTRINSICS and not (numbers[:, [0, 1], [0, 1]] > 0).all():
        return False
    return bool(np.isfinite(numbers).all())


def broken_chains(tables: Records, folder: Path) -> Iterator[str]:
    """A sentence for every sample that is not where its scene has it.

    Samples of a scene follow one another, forwards and backwards, and in time; they are as many as
    the scene says and end where it says, and no sample is left over.
    """
    samples = {sample["token"]: sample for sample in tables["sample"]}
    reached: set[str] = set()
    for scene in tables["scene"]:
        name, token, before = scene.get("name"), scene.get("first_sample_token", ""), None
        first = len(reached)
        while isinstance(token, str) and token in samples:
            sample = samples[token]
            if token in reached or sample.get("scene_token") != scene["token"]:
                yield f"sample {token} does not belong where the chain of {name} has it"
                break
            if sample.get("prev") != (before["token"] if before else ""):
                yield f"sample {token} of {name} does not lead back to the one before it"
            if before and sample["timestamp"] <= before["timestamp"]:
                yield f"sample {token} of {name} is not later than the one before it"
            reached.add(token)
            before, token = sample, sample.get("next", "")
        last, count = before["token"] if before else "", len(reached) - first
        if last != scene.get("last_sample_token"):
            yield (
                f"the chain of {name} ends with sample {last}, its last_sample_token is "
                f"{scene.get('last_sample_token')}"
            )
        if count != scene.get("nbr_samples"):
            yield (
                f"{name} should have {scene.get('nbr_samples')} key-frames, {count} are linked, "
                f"the last of them {last}"
            )
    for token in samples:
        if token not in reached:
            yield f"sample {token} of {folder / 'sample.json'} belongs to no scene's chain"
