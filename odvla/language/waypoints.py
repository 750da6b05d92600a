"""Waypoints as text and back.

A plan is written `<traj_start>[(x,y),...,(x,y)]<traj_end>`: six points 0.5 s apart in the LIDAR_TOP
frame of t0 (x right, y forward), metres with two decimals, no spaces. The future of another agent
is written the same way without the tags, in the agent's own frame, and a point that is not known
is `(UN,UN)`.

Reading is strict: anything but one such text is a ParseFailure, to be counted. `reference_repair`
is the released code's lenient way, for scoring texts that other programs wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from odvla.types import WAYPOINTS

# Positions of the six points, or the motion from each to the next (from the origin to the first).
PlanForm = Literal["points", "steps"]
TRAJ_START, TRAJ_END = "<traj_start>", "<traj_end>"
UNKNOWN = "UN"
DECIMALS = 2

_NUMBER = r"-?\d+\.\d{2}"
_POINT = rf"\(({_NUMBER}),({_NUMBER})\)"
_FUTURE_POINT = rf"\((?:({_NUMBER}),({_NUMBER})|{UNKNOWN},{UNKNOWN})\)"
_PLAN = re.compile(re.escape(TRAJ_START) + r"\[(.*)\]" + re.escape(TRAJ_END))
_FUTURE = re.compile(r"\[(.*)\]")
# What the released evaluation mends before it looks for pairs, in its order; inferred from what it
# makes of 87 malformed texts.
_REPAIRS = (
    (r"[A-Za-z]+", ""),
    (r"\[", "("),
    (r"\]", ")"),
    (r"\.{2,}", "."),  # 1..5 is 1.5
    (r"(\d+\.\d+)\.(\d+)", r"\1\2"),  # 1.5.2 is 1.52
    (r"\.-", "."),
    (r"(\d+\.\d+)-(\d+\.\d+)", r"\1,\2"),  # a dash or space instead of a comma
    (r"(\d+\.\d+)\s+(\d+\.\d+)", r"\1,\2"),
    (r"\s+", ""),
    (r"(\d+\.\d+,\d+\.\d+),\d+\.\d+", r"\1"),  # a third coordinate
)
_LOOSE_POINT = re.compile(r"\(([-+.\d]+),([-+.\d]+)\)")


@dataclass(frozen=True)
class Waypoints:
    """Points read from a text; `known` is False (and xy NaN) where the text says UN."""

    xy: NDArray[np.float64]  # [6, 2] metres
    known: NDArray[np.bool_]  # [6]


@dataclass(frozen=True)
class ParseFailure:
    """Why a text is not a trajectory."""

    reason: str


def format_number(value: float) -> str:
    """Two decimals; a zero has no sign (what rounds to -0.00 is written 0.00)."""
    text = f"{value:.{DECIMALS}f}"
    return text[1:] if float(text) == 0.0 and text.startswith("-") else text


def format_waypoints(waypoints: ArrayLike, form: PlanForm = "points") -> str:
    """Write a plan.

    Args:
        waypoints: [6, 2] metres, x right, y forward.
        form: what is written of it. Steps are differences of rounded positions, so that reading
            them back gives the same numbers as points do.

    Raises:
        ValueError: another shape, or a number that is not finite.
    """
    written = np.asarray(waypoints, dtype=np.float64)
    if form == "steps" and written.ndim == 2:
        written = np.diff(written.round(DECIMALS), axis=0, prepend=0.0)
    return f"{TRAJ_START}{format_future(written)}{TRAJ_END}"


def format_future(positions: ArrayLike, known: ArrayLike | None = None) -> str:
    """Write the future of an agent.

    Args:
        positions: [6, 2] metres, in the agent's own frame.
        known: [6] False where the position is not known; None means that all are.

    Raises:
        ValueError: another shape, or a known number that is not finite.
    """
    xy = np.asarray(positions, dtype=np.float64)
    mask = np.ones(WAYPOINTS, dtype=bool) if known is None else np.asarray(known, dtype=bool)
    if xy.shape != (WAYPOINTS, 2) or mask.shape != (WAYPOINTS,):
        raise ValueError(
            f"a trajectory has shape ({WAYPOINTS}, 2) and a mask of {WAYPOINTS}, "
            f"not {xy.shape} and {mask.shape}"
        )
    if not np.isfinite(xy[mask]).all():
        raise ValueError("a trajectory must be finite to be written")
    points = [
        f"({format_number(x)},{format_number(y)})" if is_known else f"({UNKNOWN},{UNKNOWN})"
        for (x, y), is_known in zip(xy.tolist(), mask.tolist(), strict=True)
    ]
    return f"[{','.join(points)}]"


def parse_waypoints(text: str, form: PlanForm = "points") -> Waypoints | ParseFailure:
    """Read a plan: the whole text must be what `format_waypoints` may write in that form."""
    found = _PLAN.fullmatch(text.strip())
    if found is None:
        return ParseFailure(f"not of the form {TRAJ_START}[...]{TRAJ_END}")
    plan = _parse_points(found[1], _POINT)
    if form == "points" or isinstance(plan, ParseFailure):
        return plan
    return Waypoints(plan.xy.cumsum(axis=0).round(DECIMALS), plan.known)


def parse_future(text: str) -> Waypoints | ParseFailure:
    """Read an agent's future: the whole text must be what `format_future` may write."""
    found = _FUTURE.fullmatch(text.strip())
    if found is None:
        return ParseFailure("not of the form [...]")
    return _parse_points(found[1], _FUTURE_POINT)


def _parse_points(text: str, point: str) -> Waypoints | ParseFailure:
    """Read `(x,y),(x,y),...` where every point matches the pattern `point`."""
    if re.fullmatch(rf"{point}(?:,{point})*", text) is None:
        return ParseFailure("a point is malformed")
    pairs = re.findall(point, text)
    if len(pairs) != WAYPOINTS:
        return ParseFailure(f"{len(pairs)} points instead of {WAYPOINTS}")
    known = np.array([x != "" for x, _ in pairs])
    xy = np.array([(float(x or "nan"), float(y or "nan")) for x, y in pairs])
    return Waypoints(xy, known)


def reference_repair(text: str) -> Waypoints | ParseFailure:
    """Read and mend a text as the released evaluation does.

    A short list of points is filled up with its last one and a long one cut. Where the released
    code stops the whole evaluation (no pair at all, a malformed number), this is a ParseFailure.
    """
    for pattern, replacement in _REPAIRS:
        text = re.sub(pattern, replacement, text)
    try:
        pairs = [(float(x), float(y)) for x, y in _LOOSE_POINT.findall(text)]
    except ValueError:
        return ParseFailure("a number is malformed")
    if not pairs:
        return ParseFailure("no pair of numbers")
    pairs = (pairs + [pairs[-1]] * WAYPOINTS)[:WAYPOINTS]
    return Waypoints(np.array(pairs), np.ones(WAYPOINTS, dtype=bool))
