"""Ground truth of plans from somebody's files instead of the data root.

Driven paths and masks are those of gt_traj.pkl and gt_traj_mask.pkl, rasters those of
planing_gt_segmentation_val and vad_gt_seg.pkl (datamodules/exchange). Which key-frames belong to a
split, their ego states, and everything that no file has still come from the data root.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.array_pickles import PackedBits
from datamodules.exchange.formats import FORMATS, ForeignFile, format_of, read_file
from experiments.planning_truth import GivenRasters, PlanningTruth
from experiments.submissions import named
from odvla.errors import UserError
from odvla.types import WAYPOINTS

MASK_FILE = "gt_traj_mask.pkl"
# Whom the rasters of a format show.
OCCUPANCY = {"planning-segmentation": "vehicles", "vad-segmentation": "vehicles+pedestrians"}
TELL_M = 0.1  # paths that are farther from those of the data root are told of
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class TruthFiles:
    """Files that stand for a part of the ground truth."""

    paths: Path | None = None  # gt_traj.pkl
    mask: Path | None = None  # None: gt_traj_mask.pkl beside it
    rasters: tuple[Path, ...] = ()  # their names tell which they are

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.paths or self.mask or self.rasters)


@dataclass(frozen=True)
class Apart:
    """How far driven paths are from those of the data root, at steps that both know."""

    largest_m: float
    median_m: float  # over key-frames, of each one's largest
    worst: str  # sample token
    other_masks: int  # key-frames in which other steps are known


@dataclass(frozen=True)
class FileCounts:
    """Key-frames of a split beside those of one file."""

    file: Path
    used: int
    missing: tuple[str, ...]  # key-frames of the split that the file does not have
    extra: tuple[str, ...]  # its tokens that are no key-frame of the split
    apart: Apart | None = None  # of driven paths

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "file": str(self.file),
            "used": self.used,
            "n_missing": len(self.missing),
            "n_extra": len(self.extra),
            "missing": list(self.missing),
            "extra": list(self.extra),
            **({} if self.apart is None else {"from_data_root": asdict(self.apart)}),
        }

    def sentences(self) -> list[str]:
        """What the user should know."""
        said = []
        if self.missing:
            said.append(
                f"{len(self.missing)} key-frames of the split are not in {self.file} and are left "
                f"out: {named(self.missing)}"
            )
        if self.extra:
            said.append(
                f"{len(self.extra)} samples of {self.file} are no key-frames of the split: "
                f"{named(self.extra)}"
            )
        if self.apart is not None and self.apart.largest_m > TELL_M:
            said.append(
                f"driven paths of {self.file} are up to {self.apart.largest_m:.2f} m from those of "
                f"the data root (median over key-frames {self.apart.median_m:.2f} m), the farthest "
                f"in {self.apart.worst}"
            )
        if self.apart is not None and self.apart.other_masks:
            said.append(
                f"{self.file} knows other steps than the data root in {self.apart.other_masks} "
                "key-frames"
            )
        return said


def truth_of_files(
    truth: PlanningTruth, files: TruthFiles
) -> tuple[PlanningTruth, tuple[FileCounts, ...]]:
    """The truth with what the files hold, of the key-frames that all of them have.

    Where a mask says that a step is not known, the last known point is repeated, as in the truth of
    a data root (files have 0 there).

    Args:
        truth: of the data root.
        files: what replaces parts of it.

    Returns:
        The truth, and for each file what it has and lacks.

    Raises:
        UserError: a file is missing or does not fit, or has no key-frame of the split.
    """
    read: list[ForeignFile] = []
    if files.mask is not None and files.paths is None:
        raise UserError("--truth-mask needs the driven paths that it belongs to: --truth FILE")
    if files.paths is not None:
        read += _paths_and_mask(files.paths, files.mask)
    read += _raster_files(files.rasters)
    counts = tuple(_counted(file, truth) for file in read)
    known = [
        row
        for row, token in enumerate(truth.split.tokens)
        if all(token in file.records for file in read)
    ]
    if not known:
        raise UserError(
            f"no key-frame of the {truth.split_name} split of {truth.data.config.folder} is in all "
            f"of {', '.join(str(file.path) for file in read)}"
        )
    chosen = truth.rows(known)
    tokens = chosen.split.tokens
    if files.paths is not None:
        path, mask = _driven(read[0], read[1], tokens)
        counts = (replace(counts[0], apart=_apart(chosen, path, mask)), *counts[1:])
        split = replace(chosen.split, waypoints=torch.from_numpy(path), mask=torch.from_numpy(mask))
        chosen = replace(chosen, split=split, source=_hash(tokens, path, mask))
    rasters = {
        OCCUPANCY[file.format.name]: _given(file, tokens)
        for file in read
        if file.format.name in OCCUPANCY
    }
    return replace(chosen, rasters=rasters), counts


def _paths_and_mask(paths: Path, mask: Path | None) -> list[ForeignFile]:
    """Both files; every path has its mask.

    Raises:
        UserError: one is missing or does not fit, or they are of different samples.
    """
    beside = paths.with_name(MASK_FILE)
    if mask is None and not beside.is_file():
        raise UserError(
            f"{paths} does not tell where futures are known: there is no {beside}; name the file "
            "of masks with --truth-mask"
        )
    driven = read_file(paths, FORMATS["gt-traj"], bare=True)
    masks = read_file(mask or beside, FORMATS["gt-traj-mask"], bare=True)
    for one, other in ((driven, masks), (masks, driven)):
        lacking = [token for token in one.records if token not in other.records]
        if lacking:
            raise UserError(
                f"{len(lacking)} samples of {one.path} are not in {other.path}: {named(lacking)}"
            )
    return [driven, masks]


def _raster_files(paths: Sequence[Path]) -> list[ForeignFile]:
    found: dict[str, ForeignFile] = {}
    for path in paths:
        form = format_of(path)
        if form.name not in OCCUPANCY:
            raise UserError(f"{path} holds no rasters, by its name: it is {form.what}")
        if form.name in found:
            raise UserError(
                f"{path} and {found[form.name].path} hold {form.what} both; give one of them"
            )
        found[form.name] = read_file(path, form)
    return list(found.values())


def _counted(file: ForeignFile, truth: PlanningTruth) -> FileCounts:
    tokens = truth.split.tokens
    known = set(tokens)
    missing = tuple(token for token in tokens if token not in file.records)
    extra = tuple(token for token in file.records if token not in known)
    return FileCounts(file.path, len(tokens) - len(missing), missing, extra)


def _driven(
    paths: ForeignFile, masks: ForeignFile, tokens: Sequence[str]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Driven paths [S, 6, 2] and where they are known [S, 6].

    Raises:
        UserError: a mask holds something else than 0 and 1, or knows x where it does not know y.
    """
    path = np.zeros((len(tokens), WAYPOINTS, 2), dtype=np.float32)
    mask = np.zeros((len(tokens), WAYPOINTS), dtype=bool)
    for row, token in enumerate(tokens):
        known = np.asarray(_values(masks, token, "mask"))[0]
        if not np.isin(known, (0, 1)).all() or (known[:, 0] != known[:, 1]).any():
            raise UserError(
                f"{masks.path}, {token}: a mask must be 0 or 1, alike for x and y of a step"
            )
        mask[row] = known[:, 0] > 0
        path[row] = np.asarray(_values(paths, token, "path"))[0]
    for step in range(WAYPOINTS):
        before = path[:, step - 1] if step else np.zeros_like(path[:, 0])
        path[:, step] = np.where(mask[:, step, None], path[:, step], before)
    return path, mask


def _apart(truth: PlanningTruth, path: FloatArray, mask: NDArray[np.bool_]) -> Apart:
    """Compare with the path of the lidar; UniAD's point is centimetres from it at most."""
    split = truth.split
    distance = np.linalg.norm(path - split.waypoints.numpy(), axis=-1)
    both = mask & split.mask.numpy()
    largest = np.where(both, distance, 0.0).max(axis=1)
    return Apart(
        largest_m=float(largest.max()),
        median_m=float(np.median(largest)),
        worst=split.tokens[int(largest.argmax())],
        other_masks=int((mask != split.mask.numpy()).any(axis=1).sum()),
    )


def _values(file: ForeignFile, token: str, name: str) -> Any:
    record = file.records[token]
    assert isinstance(record, dict)
    return record[name]


def _given(file: ForeignFile, tokens: Sequence[str]) -> GivenRasters:
    """Rasters turned as the metric reads them."""

    def packed(token: str) -> PackedBits:
        record = file.records[token]
        assert isinstance(record, PackedBits)
        return record

    def cells(token: str) -> NDArray[np.bool_]:
        return np.flip(packed(token).unpacked(), file.format.flips)

    return GivenRasters(_hash(tokens, *(packed(token).bits for token in tokens)), cells)


def _hash(tokens: Sequence[str], *arrays: NDArray[Any]) -> str:
    """What stands for some values, whatever the file around them."""
    found = hashlib.sha256("\n".join(tokens).encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{found.hexdigest()[:16]}"
