"""Where an imported file and what we make of the same key-frames disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from datamodules.array_pickles import PackedBits
from datamodules.exchange.formats import ForeignFile, our_record
from datamodules.exchange.schema import BOXES, CAMERA, SENSOR, Field, Flat, Value
from datamodules.exchange.source import Source
from datamodules.records import Index
from odvla.types import CAMERAS

TOLERANCE = 1e-3
# Ways a raster may be turned; the axes are those of [6, 200, 200] as stored.
FLIPS: dict[str, tuple[int, ...]] = {
    "its last axis": (-1,),
    "its second last axis": (-2,),
    "its last two axes": (-1, -2),
}
# A flip explains a disagreement that it brings below this part.
EXPLAINED = 0.1
Tick = Callable[[int, int], None]  # records done, of how many


@dataclass(frozen=True)
class FieldDifference:
    """One field over all key-frames that both have."""

    name: str
    compared: int
    differing: int  # records beyond the tolerance, texts that are not equal, other shapes
    other_shape: int  # of these, records with another number of rows
    largest: float | None  # of all numbers; None for texts and where only shapes differ
    median: float | None  # over the records, of each one's largest
    worst_token: str  # "" where none differs


@dataclass(frozen=True)
class RasterDifference:
    """Rasters over all key-frames that both have."""

    compared: int
    differing: int  # records with any cell that differs
    cells: int  # that differ
    filled_there: int
    filled_here: int
    worst_cells: int
    worst_token: str
    flipped: dict[str, int]  # cells that differ where the file is flipped so
    explained_by: str  # "" or one of FLIPS


@dataclass(frozen=True)
class Difference:
    """What `data diff` says."""

    file: str
    format: str
    tolerance: float
    both: int
    only_there: list[str]
    only_here: list[str]
    fields: list[FieldDifference]
    rasters: RasterDifference | None
    reordered: int  # records whose boxes come in another order; they were put into ours
    more_fields: list[str]  # that only the file has

    @property
    def equal(self) -> bool:
        """Whether there is nothing to say. Fields that only the file has do not count."""
        alike = not any(field.differing for field in self.fields)
        cells = self.rasters is None or self.rasters.cells == 0
        return alike and cells and not (self.only_there or self.only_here or self.reordered)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare(
    file: ForeignFile,
    source: Source,
    *,
    split: str = "",
    tolerance: float = TOLERANCE,
    tick: Tick | None = None,
) -> Difference:
    """Make what the file holds ourselves, for the same key-frames, and compare.

    Args:
        file: somebody's.
        source: of ours.
        split: whose key-frames the file should have; "": every split it has any of.
        tolerance: numbers that differ by less are equal; in each field's own unit. Angles differ
            modulo 2 pi, and of paths only "samples/..." or "sweeps/..." counts.
        tick: told about each record.
    """
    expected = expected_tokens(source.index, file.records, split)
    shared = [token for token in file.records if token in source.index.number_of_token]
    known = set(shared)
    tally = _RasterTally() if file.format.rasters else _FieldTally(file, tolerance)
    for done, token in enumerate(shared):
        if tick is not None:
            tick(done, len(shared))
        ours = our_record(file.format, source, source.index.frame(token))
        tally.add(token, file.records[token], ours)
    if tick is not None:
        tick(len(shared), len(shared))
    return Difference(
        file=str(file.path),
        format=file.format.name,
        tolerance=tolerance,
        both=len(shared),
        only_there=[token for token in file.records if token not in known],
        only_here=[token for token in expected if token not in known],
        fields=tally.result() if isinstance(tally, _FieldTally) else [],
        rasters=tally.result() if isinstance(tally, _RasterTally) and shared else None,
        reordered=tally.reordered if isinstance(tally, _FieldTally) else 0,
        more_fields=list(file.more),
    )


def expected_tokens(index: Index, tokens: Iterable[str], split: str = "") -> list[str]:
    """Key-frames that a file with these tokens should have.

    Raises:
        UserError: there is no such split.
    """
    if split:
        scenes = list(index.scenes_of(split))
    else:
        numbers = [index.number_of_token[t] for t in tokens if t in index.number_of_token]
        touched = {index.scenes[index.frames[n].scene].split for n in numbers}
        scenes = [scene for scene in index.scenes if scene.split in touched]
    return [index.frames[n].token for scene in scenes for n in range(scene.first, scene.last)]


class _FieldTally:
    """Adds up the differences of records, field by field."""

    def __init__(self, file: ForeignFile, tolerance: float) -> None:
        self.form, self.tolerance = file.format, tolerance
        self.by_name = _fields_by_name() if file.format.nested else {}
        self.by_name |= {field.name: field for field in file.format.fields}
        self.found: dict[str, list[tuple[float, str]]] = {}
        self.shapes: dict[str, int] = {}
        self.reordered = 0

    def add(self, token: str, theirs: Any, ours: Any) -> None:
        """One record."""
        theirs = self._in_our_order(theirs, ours)
        for name, value in ours.items():
            if name not in theirs:
                continue  # an optional field
            field = self.by_name.get(name)
            difference = value_difference(theirs[name], value, field)
            if difference is None:
                self.shapes[name] = self.shapes.get(name, 0) + 1
                difference = np.inf
            self.found.setdefault(name, []).append((difference, token))

    def _in_our_order(self, theirs: Flat, ours: Flat) -> Flat:
        """Boxes that are the same ones in another order, in ours."""
        key = self.form.row_key
        there, here = theirs.get(key), ours.get(key)
        if not isinstance(there, list) or not isinstance(here, list):
            return theirs
        if there == here or sorted(there) != sorted(here) or len(set(here)) < len(here):
            return theirs
        self.reordered += 1
        place = {name: row for row, name in enumerate(there)}
        order = [place[name] for name in here]
        sorted_ones = {}
        for field in self.form.fields:
            value = theirs.get(field.name)
            if value is not None and BOXES in field.shape:
                sorted_ones[field.name] = _rows(value, order)
        return theirs | sorted_ones

    def result(self) -> list[FieldDifference]:
        """One line a field, in the order of the record."""
        lines = []
        for name, values in self.found.items():
            beyond = [(d, token) for d, token in values if d > self.tolerance]
            sizes = [d for d, _ in values if np.isfinite(d)]
            numeric = bool(sizes) and not self._is_text(name)
            lines.append(
                FieldDifference(
                    name=name,
                    compared=len(values),
                    differing=len(beyond),
                    other_shape=self.shapes.get(name, 0),
                    largest=max(sizes) if numeric else None,
                    median=median(sizes) if numeric else None,
                    worst_token=max(beyond, key=lambda one: one[0])[1] if beyond else "",
                )
            )
        return lines

    def _is_text(self, name: str) -> bool:
        field = self.by_name.get(name)
        return field is not None and field.kind != "numbers"


def _fields_by_name() -> dict[str, Field]:
    """Fields of cameras and sweeps by their flat names."""
    found = {f"cams.{name}.{field.name}": field for name in CAMERAS for field in CAMERA}
    return found | {f"sweeps.{field.name}": field for field in SENSOR}


def _rows(value: Value, order: list[int]) -> Value:
    return [value[k] for k in order] if isinstance(value, list) else np.asarray(value)[order]


def value_difference(theirs: Value, ours: Value, field: Field | None) -> float | None:
    """How far two values are apart: the largest difference of numbers, 0 or inf for texts.

    None where there are more rows on one side. NaN equals NaN and nothing else.
    """
    if isinstance(ours, str) or isinstance(theirs, str):
        is_path = field is not None and field.kind == "path"
        same = _inside(theirs) == _inside(ours) if is_path else theirs == ours
        return 0.0 if same else np.inf
    if isinstance(ours, list) or isinstance(theirs, list):
        if len(theirs) != len(ours):
            return None
        is_path = field is not None and field.kind == "path"
        pairs = zip(theirs, ours, strict=True)
        same = all(_inside(a) == _inside(b) if is_path else a == b for a, b in pairs)
        return 0.0 if same else np.inf
    a, b = np.asarray(theirs, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if a.shape != b.shape:
        return None
    apart = np.abs(a - b)
    if field is not None and field.angles is not None and a.ndim:
        turns = apart[..., list(field.angles)] % (2 * np.pi)
        apart[..., list(field.angles)] = np.minimum(turns, 2 * np.pi - turns)
    both = np.isnan(a) & np.isnan(b)
    apart = np.where(both, 0.0, np.where(np.isnan(apart), np.inf, apart))
    return float(apart.max()) if apart.size else 0.0


def _inside(path: Any) -> str:
    """A file's path inside its root: from "samples/" or "sweeps/" on."""
    text = str(path).replace("\\", "/")
    places = [text.rfind(f"{folder}/") for folder in ("samples", "sweeps")]
    return text[max(places) :] if max(places) >= 0 else text


class _RasterTally:
    """Adds up the differences of rasters, as they are and flipped."""

    def __init__(self) -> None:
        self.cells: list[tuple[int, str]] = []
        self.flipped = dict.fromkeys(FLIPS, 0)
        self.there, self.here = 0, 0

    def add(self, token: str, theirs: Any, ours: Any) -> None:
        """One record."""
        assert isinstance(theirs, PackedBits)
        assert isinstance(ours, np.ndarray)
        cells = theirs.unpacked()
        self.there += int(cells.sum())
        self.here += int(ours.sum())
        self.cells.append((int((cells ^ ours).sum()), token))
        for name, axes in FLIPS.items():
            self.flipped[name] += int((np.flip(cells, axes) ^ ours).sum())

    def result(self) -> RasterDifference:
        """All of it."""
        total = sum(count for count, _ in self.cells)
        worst, token = max(self.cells)
        best = min(self.flipped, key=lambda name: self.flipped[name])
        return RasterDifference(
            compared=len(self.cells),
            differing=sum(count > 0 for count, _ in self.cells),
            cells=total,
            filled_there=self.there,
            filled_here=self.here,
            worst_cells=worst,
            worst_token=token if worst else "",
            flipped=self.flipped,
            explained_by=best if self.flipped[best] < EXPLAINED * total else "",
        )
