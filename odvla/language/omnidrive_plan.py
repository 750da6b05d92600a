"""OmniDrive's plans as text: `[PT, (+4.50, 0.0), (+9.02, +0.12), ...]`.

Six points 0.5 s apart of the middle of the rear axle, in the ego frame of t0: x forward, y left,
metres. Numbers carry their sign and two decimals, but what rounds to a centimetre or less is
written `0.0` (OmniDrive's transform_3d.py, format_number).
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

from odvla.language.waypoints import ParseFailure
from odvla.types import WAYPOINTS

MARK = "[PT,"
ZERO_M = 0.01  # what rounds to no more than this is 0.0
_NUMBER = r"[+-]?[0-9]+\.[0-9]+"
_POINT = rf"\(({_NUMBER}), ({_NUMBER})\)"
_PLAN = re.compile(rf"\[PT, {_POINT}(?:, {_POINT})*\]")


def format_rear_axle_plan(points: ArrayLike) -> str:
    """Write a plan.

    Args:
        points: [6, 2] metres, x forward, y left.

    Raises:
        ValueError: another shape, or a number that is not finite.
    """
    xy = np.asarray(points, dtype=np.float64)
    if xy.shape != (WAYPOINTS, 2) or not np.isfinite(xy).all():
        raise ValueError(f"a plan is {WAYPOINTS} x 2 finite numbers, not {xy.shape}: {xy}")
    told = ", ".join(f"({_signed(x)}, {_signed(y)})" for x, y in xy.tolist())
    return f"{MARK} {told}]"


def parse_rear_axle_plan(text: str) -> NDArray[np.float64] | ParseFailure:
    """Points [6, 2] of the first plan in a text."""
    found = _PLAN.search(text)
    if found is None:
        return ParseFailure("no [PT, (x, y), ...] in it")
    pairs = re.findall(_POINT, found[0])
    if len(pairs) != WAYPOINTS:
        return ParseFailure(f"{len(pairs)} points instead of {WAYPOINTS}")
    return np.array(pairs, dtype=np.float64)


def _signed(value: float) -> str:
    rounded = round(value, 2)
    return "0.0" if abs(rounded) <= ZERO_M else f"{value:+.2f}"
