"""The map of a location as flat arrays of line segments, read from the map expansion.

The index holds these arrays, so that a worker needs neither the expansion's JSON nor the devkit's
NuScenesMap, whose opening takes seconds and whose objects take hundreds of megabytes.

Shape legend: S segments of a location, E elements (lines or polygons).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from datamodules.poses import FloatArray
from odvla.errors import UserError


@dataclass(frozen=True)
class Segments:
    """Line segments of one kind; those of one element stand together, in drawing order."""

    start: FloatArray  # [S, 2] global metres
    end: FloatArray  # [S, 2]
    element: NDArray[np.int64]  # [S] number of the line or polygon: 0, 1, ...

    def whole_near(self, centre: FloatArray, reach_m: float) -> NDArray[np.int64]:
        """Segments of the elements whose bounding box comes within a square around `centre`.

        Filling needs whole rings: a ring around the car may have no segment near it.
        """
        near = ((self._low - centre <= reach_m) & (self._high - centre >= -reach_m)).all(1)
        first = self._first
        spans = [np.arange(first[e], first[e + 1]) for e in np.flatnonzero(near)]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def near(self, centre: FloatArray, reach_m: float) -> NDArray[np.int64]:
        """Segments whose own bounding box comes within that square."""
        rows = self.whole_near(centre, reach_m)
        start, end = self.start[rows] - centre, self.end[rows] - centre
        outside = ((start > reach_m) & (end > reach_m)) | ((start < -reach_m) & (end < -reach_m))
        return rows[~outside.any(1)]

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """First segment of each element, and one past the last segment."""
        return np.append(np.flatnonzero(np.diff(self.element, prepend=-1)), len(self.element))

    @cached_property
    def _low(self) -> FloatArray:
        """Lower corner of each element's bounding box, [E, 2]."""
        return self._corner(np.minimum)

    @cached_property
    def _high(self) -> FloatArray:
        """Upper corner of each element's bounding box, [E, 2]."""
        return self._corner(np.maximum)

    def _corner(self, extreme: np.ufunc) -> FloatArray:
        if not len(self.element):
            return np.zeros((0, 2))
        return extreme.reduceat(extreme(self.start, self.end), self._first[:-1])


@dataclass(frozen=True)
class LocationMap:
    """The layers of one location."""

    dividers: Segments
    crossings: Segments  # closed rings
    drivable: Segments  # closed rings: exteriors counter-clockwise, holes clockwise
    boundaries: Segments  # rings of the union of the drivable area

    def columns(self) -> dict[str, NDArray[Any]]:
        """All arrays by name, for the index."""
        return {
            f"{layer.name}.{part.name}": getattr(getattr(self, layer.name), part.name)
            for layer in fields(self)
            for part in fields(Segments)
        }

    @classmethod
    def of_columns(cls, arrays: dict[str, NDArray[Any]]) -> LocationMap:
        """The map of `columns`' arrays."""
        return cls(
            **{
                layer.name: Segments(
                    **{part.name: arrays[f"{layer.name}.{part.name}"] for part in fields(Segments)}
                )
                for layer in fields(cls)
            }
        )


def expansion_file(root: Path, location: str) -> Path:
    """The map expansion of a location."""
    return root / "maps" / "expansion" / f"{location}.json"


def location_map(root: Path, location: str) -> LocationMap:
    """Read a location's map expansion.

    Raises:
        UserError: the expansion file is missing, not JSON, or lacks a layer.
    """
    from nuscenes.map_expansion.map_api import NuScenesMap  # a second; workers do without

    path = expansion_file(root, location)
    if not path.is_file():
        raise UserError(f"map expansion {path} is missing (map targets need it)")
    try:
        devkit = NuScenesMap(dataroot=str(root), map_name=location)
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"map expansion {path} cannot be read: {error!r}") from error
    lines = [
        np.array(devkit.extract_line(record["line_token"]).coords)
        for layer in ("road_divider", "lane_divider")
        for record in getattr(devkit, layer)
        if record["line_token"]
    ]
    crossings = [devkit.extract_polygon(record["polygon_token"]) for record in devkit.ped_crossing]
    drivable = [
        devkit.extract_polygon(token)
        for record in devkit.drivable_area
        for token in record["polygon_tokens"]
    ]
    # Real polygons touch themselves here and there; buffer(0) mends them before the union.
    union = shapely.unary_union([polygon.buffer(0) for polygon in drivable])
    merged = [part for part in shapely.get_parts(union) if part.geom_type == "Polygon"]
    return LocationMap(
        dividers=_segments(lines),
        crossings=_segments([r for p in crossings for r in _rings(p)[:1]]),
        drivable=_segments([ring for polygon in merged for ring in _rings(polygon)]),
        boundaries=_segments([ring for polygon in merged for ring in _rings(polygon)]),
    )


def _rings(polygon: shapely.Polygon) -> list[FloatArray]:
    """Closed rings: the exterior counter-clockwise, then the holes clockwise."""
    oriented = shapely.geometry.polygon.orient(polygon)
    return [np.array(ring.coords) for ring in (oriented.exterior, *oriented.interiors)]


def _segments(lines: Iterable[FloatArray]) -> Segments:
    kept = [line[:, :2] for line in lines if len(line) >= 2]
    if not kept:
        return Segments(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    return Segments(
        np.concatenate([line[:-1] for line in kept]),
        np.concatenate([line[1:] for line in kept]),
        np.repeat(np.arange(len(kept)), [len(line) - 1 for line in kept]),
    )
