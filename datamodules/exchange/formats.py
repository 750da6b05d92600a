"""The six formats by name: how a file is read, checked, made and written."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.array_pickles import (
    PackedBits,
    load_arrays,
    load_packed,
    write_dict,
    write_infos,
)
from datamodules.exchange.frames import cached_info, uniad_info
from datamodules.exchange.planning import (
    UNIAD_FLIPS,
    VAD_FLIPS,
    driven_mask,
    driven_path,
    six_steps,
    vehicles,
    vehicles_and_pedestrians,
)
from datamodules.exchange.schema import CACHE, FRAME, UNIAD_AGENTS, Checker, Field, Flat, flatten
from datamodules.exchange.source import Source
from datamodules.records import SPLITS, FrameRecord, Index
from odvla.errors import UserError
from odvla.types import WAYPOINTS

ALL = "all"
PATH = Field("path", shape=(1, WAYPOINTS, 2))
MASK = Field("mask", shape=(1, WAYPOINTS, 2))


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    name: str
    files: tuple[str, ...]  # names such files have, as patterns
    what: str
    make: Callable[[Source, FrameRecord], Any]  # a key-frame -> what the file holds for it
    fields: tuple[Field, ...] = ()  # of a record; () for rasters
    listed: bool = False  # {"infos": [...], "metadata"} instead of a dict by token
    nested: bool = False  # records have cameras and sweeps
    flips: tuple[int, ...] = ()  # axes of rasters that the evaluation flips
    row_key: str = ""  # field that names the boxes
    split: str = "val"  # that is exported unless said otherwise

    @property
    def rasters(self) -> bool:
        """Whether it holds rasters."""
        return not self.fields


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            "uniad-infos",
            ("*infos_temporal_*.pkl",),
            "UniAD's key-frames: cameras, sweeps, boxes, futures",
            uniad_info,
            (*FRAME, *UNIAD_AGENTS),
            listed=True,
            nested=True,
            row_key="gt_ins_tokens",
        ),
        Format(
            "gpt-driver-cache",
            ("cached_nuscenes_info*.pkl",),
            "GPT-Driver's key-frames: as above, the car's history, plan and state",
            cached_info,
            CACHE,
            nested=True,
            row_key="gt_tokens",
            split=ALL,
        ),
        Format("gt-traj", ("gt_traj.pkl",), "driven paths of the score", driven_path, (PATH,)),
        Format("gt-traj-mask", ("gt_traj_mask.pkl",), "where known", driven_mask, (MASK,)),
        Format(
            "planning-segmentation",
            ("planing_gt_segmentation_val*", "planning_gt_segmentation_val*"),
            "cells of vehicles",
            vehicles,
            flips=UNIAD_FLIPS,
        ),
        Format(
            "vad-segmentation",
            ("vad_gt_seg*", "stp3_gt_seg*"),
            "cells of vehicles and pedestrians",
            vehicles_and_pedestrians,
            flips=VAD_FLIPS,
        ),
    )
}  # fmt: skip


def format_of(path: Path, name: str = "") -> Format:
    """The format of that name, or the one that a file's name tells.

    Raises:
        UserError: there is none.
    """
    if name:
        if name not in FORMATS:
            raise UserError(f"there is no format {name!r}, only {', '.join(FORMATS)}")
        return FORMATS[name]
    for one in FORMATS.values():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in one.files):
            return one
    raise UserError(
        f"the name of {path} does not tell its format; say it with --format: {', '.join(FORMATS)}"
    )


@dataclass(frozen=True)
class ForeignFile:
    """A file that was read and checked."""

    path: Path
    format: Format
    records: Mapping[str, Flat | PackedBits]  # by sample token
    version: str = ""  # of the tables, where the file tells
    more: tuple[str, ...] = ()  # fields of its records that the format does not have


def read_file(path: Path, form: Format, *, bare: bool = False) -> ForeignFile:
    """Read a file and check every record.

    Args:
        path: the file.
        form: what it should hold.
        bare: paths and masks may be [6, 2] instead of [1, 6, 2], as some have them.

    Raises:
        UserError: the file is missing, refused, broken or of another form, or a record does not
            fit; the sentence names file, token and field.
    """
    content = load_packed(path) if form.rasters else load_arrays(path)
    version = ""
    if form.listed:
        content, version = _listed(content, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dict by sample token, not {type(content).__name__}")
    if not content:
        raise UserError(f"{path} is empty")
    fields = FRAME if version == "v1.0-test" else form.fields
    more: dict[str, None] = {}
    records: dict[str, Flat | PackedBits] = {}
    for token in list(content):
        record = content.pop(token)  # what was checked takes its place, not more memory
        if not isinstance(token, str):
            raise UserError(f"{path}: a key must be a sample token, not {token!r:.80}")
        if form.nested and isinstance(record, dict):
            more |= dict.fromkeys(set(record) - {f.name for f in fields} - {"cams", "sweeps"})
        if bare and _is_bare(record):
            record = [record]
        records[token] = _checked(record, form, fields, path, token)
    return ForeignFile(path, form, records, version, tuple(sorted(map(str, more))))


def _is_bare(record: Any) -> bool:
    """Whether it is six steps without anything around them."""
    if isinstance(record, np.ndarray):
        return record.ndim == 2
    return isinstance(record, list) and len(record) == WAYPOINTS


def _listed(content: Any, path: Path) -> tuple[dict[str, Any], str]:
    """The infos by token, and the version of the tables."""
    infos = content.get("infos") if isinstance(content, dict) else None
    if not isinstance(infos, list):
        raise UserError(f"{path} must hold a dict with a list 'infos'")
    by_token: dict[str, Any] = {}
    for number, info in enumerate(infos):
        token = info.get("token") if isinstance(info, dict) else None
        if not isinstance(token, str):
            raise UserError(f"{path}, info {number}: field 'token' must be a text, it is {token!r}")
        if token in by_token:
            raise UserError(f"{path}: sample {token} comes twice, the second time as info {number}")
        by_token[token] = info
    metadata = content.get("metadata")
    version = metadata.get("version", "") if isinstance(metadata, dict) else ""
    return by_token, str(version)


def _checked(
    record: Any, form: Format, fields: Sequence[Field], path: Path, token: str
) -> Flat | PackedBits:
    if form.rasters:
        return _raster(record, path, token)
    if not form.nested:
        (field,) = fields
        return {field.name: Checker(path, token).value(record, field, field.name, {})}
    flat = flatten(record, fields, path, token)
    if flat["token"] != token:
        raise UserError(
            f"{path}, {token}: field 'token' is that of another sample, {flat['token']}"
        )
    return flat


def _raster(record: Any, path: Path, token: str) -> PackedBits:
    """The six steps of a raster, bit by bit."""
    if isinstance(record, np.ndarray):  # it was a tensor
        record = PackedBits.of(record)
    if not isinstance(record, PackedBits):
        raise UserError(f"{path}, {token}: a raster must be an array, not {type(record).__name__}")
    try:
        return PackedBits.of(six_steps(record.unpacked()))
    except ValueError as error:
        raise UserError(
            f"{path}, {token}: a raster must have shape {error}, its shape is {record.shape}"
        ) from error


def our_record(form: Format, source: Source, frame: FrameRecord) -> Flat | NDArray[np.bool_]:
    """A key-frame made from raw data, in the form that read_file gives."""
    made = form.make(source, frame)
    if form.rasters:
        return six_steps(made > 0)
    fields = FRAME if source.index.version == "v1.0-test" else form.fields
    checked = _checked(made, form, fields, source.index.root, frame.token)
    assert not isinstance(checked, PackedBits)
    return checked


def write_file(path: Path, form: Format, source: Source, frames: Iterable[FrameRecord]) -> int:
    """Write key-frames in a format, one after another; the file appears whole or not at all.

    Returns:
        How many records it has.

    Raises:
        UserError: a table is missing or inconsistent, or the format needs boxes that a v1.0-test
            root does not have.
    """
    version = source.index.version
    if version == "v1.0-test" and not form.listed:
        raise UserError(f"{version} has no boxes and no known futures, which {form.name} needs")
    records: Iterator[tuple[str, Any]] = ((f.token, form.make(source, f)) for f in frames)
    if form.listed:
        return write_infos(path, (info for _, info in records), {"version": version})
    return write_dict(path, records)


def frames_of(index: Index, split: str) -> list[FrameRecord]:
    """Key-frames of a split ("all": of every split of the version), scene by scene.

    Raises:
        UserError: the version has no such split or no scene of it.
    """
    splits = SPLITS[index.version] if split == ALL else (split,)
    found: list[FrameRecord] = []
    for name in splits:
        if split == ALL and not any(scene.split == name for scene in index.scenes):
            continue
        for scene in index.scenes_of(name):
            found.extend(index.frames[scene.first : scene.last])
    return found
