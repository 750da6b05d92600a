"""Paths through the town: lanes joined into one smooth curve, and what is to heed along it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import gaussian_filter1d

from datamodules.town.geometry import (
    FloatArray,
    arc_lengths,
    distances,
    headings,
    resample,
    shifted,
    smooth,
)
from datamodules.town.log import RoadMap

STEP_M = 0.5
ROUNDING_M = 2.5  # corners of the lane graph are rounded over about this length
TURN_RAD = 0.6  # a connector that changes heading by more is a turn
RAMP_M = 15.0  # a car swings out over this length before an obstacle, and back after it


@dataclass(frozen=True)
class Obstacle:
    """Something that stands partly in a lane, where it stands, and how far to swing out."""

    lane: int
    at_m: float  # along the lane's centre
    half_length_m: float
    swing_m: float  # to the left
    name: str  # "a parked truck"


@dataclass(frozen=True)
class Path:
    """A driving line sampled about every STEP_M, tangent- and curvature-continuous."""

    points: FloatArray  # [P, 2]
    lanes: tuple[int, ...]
    lane_start_m: FloatArray  # where each lane begins along the path
    stops: tuple[tuple[float, int], ...]  # (metres along the path, stop line id)
    crossings: tuple[tuple[float, float, int], ...]  # (from, to, crossing index)
    swings: tuple[tuple[float, float, str], ...]  # (beside from, beside to, obstacle's name)
    turns: tuple[tuple[float, float, str], ...] = ()  # (from, to, "left" | "right") at junctions

    @cached_property
    def s(self) -> FloatArray:
        """Metres along the path at each point."""
        return arc_lengths(self.points)

    @cached_property
    def yaw(self) -> FloatArray:
        """Unwrapped heading at each point."""
        return headings(self.points)

    @cached_property
    def curvature(self) -> FloatArray:
        """Signed curvature at each point, 1/m, left positive."""
        return np.gradient(self.yaw, self.s)

    @property
    def length_m(self) -> float:
        """Length of the whole path."""
        return float(self.s[-1])

    def position(self, s: float | FloatArray) -> FloatArray:
        """Points [..., 2] at distances along the path."""
        return np.stack([np.interp(s, self.s, self.points[:, i]) for i in (0, 1)], axis=-1)

    def pose(self, s: float) -> tuple[float, float, float]:
        """(x, y, yaw) at one distance along the path; much faster than the other two."""
        index = min(max(bisect_right(self._distances, s) - 1, 0), len(self._distances) - 2)
        near, far = self._distances[index : index + 2]
        u = min(max((s - near) / (far - near), 0.0), 1.0)
        (x, y, yaw), (next_x, next_y, next_yaw) = self._poses[index : index + 2]
        return x + u * (next_x - x), y + u * (next_y - y), yaw + u * (next_yaw - yaw)

    @cached_property
    def _distances(self) -> list[float]:
        return self.s.tolist()

    @cached_property
    def _poses(self) -> list[tuple[float, float, float]]:
        """Plain numbers: indexing them one at a time is faster than indexing arrays."""
        x, y = self.points.T.tolist()
        return list(zip(x, y, self.yaw.tolist(), strict=True))

    def heading(self, s: float | FloatArray) -> FloatArray:
        """Headings at distances along the path."""
        return np.interp(s, self.s, self.yaw)

    def lane_at(self, s: float) -> int:
        """Lane that the path is on at a distance along it."""
        return self.lanes[int(np.searchsorted(self.lane_start_m, s, side="right")) - 1]


def centre_line(road: RoadMap, lanes: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """The rounded line through the middle of the lanes [P, 2], and where each begins on it [L]."""
    pieces, starts, total = [], [], 0.0
    for number, lane in enumerate(lanes):
        centre = road.lanes[lane].centre
        starts.append(total)
        total += float(arc_lengths(centre)[-1])
        pieces.append(centre if number == len(lanes) - 1 else centre[:-1])
    base = smooth(resample(np.concatenate(pieces), STEP_M), ROUNDING_M, STEP_M)
    # Rounding shortens corners a little; keep lane positions in step with the rounded line.
    return base, np.array(starts) * arc_lengths(base)[-1] / total


def build_path(
    road: RoadMap, lanes: Sequence[int], obstacles: Sequence[Obstacle] = (), left_m: float = 0.0
) -> Path:
    """Join lanes and swing out around the obstacles on them.

    Args:
        road: the map.
        lanes: ids, each a successor of the one before.
        obstacles: of the whole scene; those on other lanes are left alone.
        left_m: constant offset from the lane centre; a bicycle keeps right with a negative one.
    """
    base, start_m = centre_line(road, lanes)
    s = arc_lengths(base)
    offset = np.full(len(base), left_m)
    swings = []
    for obstacle in obstacles:
        if obstacle.lane in lanes:
            at = start_m[lanes.index(obstacle.lane)] + obstacle.at_m
            near, far = at - obstacle.half_length_m - 3.0, at + obstacle.half_length_m + 3.0
            away = np.maximum(np.maximum(near - s, s - far), 0.0)
            swing = obstacle.swing_m * 0.5 * (1 + np.cos(np.pi * np.clip(away / RAMP_M, 0, 1)))
            offset = np.maximum(offset, swing)
            swings.append((near, far, obstacle.name))
    if swings:  # where one swing runs into the next
        offset = gaussian_filter1d(offset, ROUNDING_M / STEP_M, mode="nearest")
    line = shifted(base, offset)
    return Path(
        points=line,
        lanes=tuple(lanes),
        lane_start_m=start_m,
        stops=_stops(road, lanes, start_m),
        crossings=_crossings(road, line),
        swings=tuple(sorted(swings)),
        turns=_turns(road, lanes, start_m),
    )


def random_route(
    road: RoadMap, start: int, length_m: float, rng: np.random.Generator
) -> tuple[int, ...]:
    """Lanes from `start` on, a random successor at every branch, until they are long enough."""
    lanes = [start]
    length = float(arc_lengths(road.lanes[start].centre)[-1])
    while length < length_m and road.lanes[lanes[-1]].successors:
        lanes.append(int(rng.choice(road.lanes[lanes[-1]].successors)))
        length += float(arc_lengths(road.lanes[lanes[-1]].centre)[-1])
    return tuple(lanes)


def _stops(
    road: RoadMap, lanes: Sequence[int], start_m: FloatArray
) -> tuple[tuple[float, int], ...]:
    """Stop lines at the ends of lanes that the path goes on from."""
    stops = []
    for number, lane in enumerate(lanes[:-1]):
        line = road.lanes[lane].stop_line
        if line is not None:
            # The line lies some metres before the lane's end: where the lane passes it.
            centre = road.lanes[lane].centre
            middle = road.stop_lines[line].polygon.mean(0)
            along = road.lanes[lane].centre[-1] - centre[-2]
            back = float(np.dot(centre[-1] - middle, along / np.linalg.norm(along)))
            stops.append((float(start_m[number + 1]) - back - 0.8, line))
    return tuple(stops)


def _turns(
    road: RoadMap, lanes: Sequence[int], start_m: FloatArray
) -> tuple[tuple[float, float, str], ...]:
    """Connectors that turn off at a junction with lights."""
    turns = []
    for number in range(1, len(lanes) - 1):
        yaw = headings(road.lanes[lanes[number]].centre)
        turned = float(yaw[-1] - yaw[0])
        at_junction = road.lanes[lanes[number - 1]].stop_line is not None
        if at_junction and abs(turned) > TURN_RAD:
            side = "left" if turned > 0 else "right"
            turns.append((float(start_m[number]), float(start_m[number + 1]), side))
    return tuple(turns)


def _crossings(road: RoadMap, line: FloatArray) -> tuple[tuple[float, float, int], ...]:
    """Where the path enters and leaves each crossing it goes over."""
    found = []
    s = arc_lengths(line)
    centres = np.array([polygon.mean(0) for polygon in road.ped_crossings]).reshape(-1, 1, 2)
    for number in np.flatnonzero(distances(centres, line).min(1) <= 12).tolist():
        polygon = road.ped_crossings[number]
        a, b, c = polygon[0], polygon[1], polygon[2]
        first, second = b - a, c - b
        local = line - a
        u = local @ first / (first @ first)
        v = local @ second / (second @ second)
        inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
        if inside.any():
            found.append((float(s[inside][0]), float(s[inside][-1]), number))
    return tuple(sorted(found))
