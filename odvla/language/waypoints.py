"""Waypoints as text and back.

A plan is written `<traj_start>[(x,y),...,(x,y)]<traj_end>`: six points 0.5 s apart in the LIDAR_TOP
frame of t0 (x right, y forward), metres with two decimals, no spaces. The future of another agent
is written the same way without the tags, in the agent's own frame, and a point that is not known
is `(UN,UN)`. A PlanForm may write fewer decimals, motion instead of points, or action tokens
instead of digits.

Reading is strict: anything but one such text is a ParseFailure, to be counted. `reference_repair`
is the released code's lenient way, for scoring texts that other programs wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from odvla.errors import UserError
from odvla.language.action_bins import ActionBins
from odvla.types import WAYPOINTS

TRAJ_START, TRAJ_END = "<traj_start>", "<traj_end>"
UNKNOWN = "UN"
DECIMALS = 2
PlanValues = Literal["points", "offsets", "changes", "tokens"]

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
class PlanForm:
    """How the six points of a plan become numbers.

    Args:
        values: "points", the positions, as the paper writes them. "offsets", the motion from each
            point to the next, from the origin to the first. "changes", the offsets less the car's
            own motion in the last 0.5 s: nothing but zeros says "drive on as you do", so that a
            model that can hardly read starts from constant velocity and learns what differs from
            it. "tokens", the bin of each coordinate as one token, see action_bins.py.
        decimals: of every number. What rounding leaves of one step goes into the next, so that it
            never adds up. The car's own motion is not rounded: else its last digits, which the
            model does not write, would make those that it writes jump.
        signed_zero: a number that rounds to zero from below is written with a minus, as in the
            released dialect.
        bins: of "tokens", those of the weights; without them such a plan is neither written nor
            read.

    Raises:
        UserError: there is no such form.
    """

    values: PlanValues = "points"
    decimals: int = DECIMALS
    signed_zero: bool = False
    bins: ActionBins | None = None

    def __post_init__(self) -> None:
        """Check both settings."""
        if self.values not in get_args(PlanValues):
            raise UserError(
                f"a plan is written as {', '.join(get_args(PlanValues))}, not {self.values!r}"
            )
        if not 1 <= self.decimals <= DECIMALS:
            raise UserError(f"a plan has 1 or {DECIMALS} decimals, not {self.decimals}")

    @classmethod
    def from_meta(cls, meta: Mapping[str, str], bins: ActionBins | None = None) -> PlanForm:
        """The form that a conversation's plan is written in (`Conversation.meta`)."""
        signed_zero = meta.get("signed_zero") == "yes"
        return cls(cast(PlanValues, meta["form"]), int(meta["decimals"]), signed_zero, bins)

    def as_meta(self) -> dict[str, str]:
        """What `from_meta` reads."""
        signed = {"signed_zero": "yes"} if self.signed_zero else {}
        return {"form": self.values, "decimals": str(self.decimals), **signed}

    def numbers(self, positions: NDArray[np.float64], last_step: ArrayLike) -> NDArray[np.float64]:
        """Positions [6, 2] as what is written of them; see `format_waypoints`."""
        if self.values == "points":
            return positions
        base = self._base(last_step)
        numbers, reached = np.empty_like(positions), np.zeros(2)
        for number, position in zip(numbers, positions, strict=True):
            number[:] = (position - reached - base).round(self.decimals)
            reached = reached + number + base
        return numbers

    def positions(self, numbers: NDArray[np.float64], last_step: ArrayLike) -> NDArray[np.float64]:
        """The way back."""
        if self.values == "points":
            return numbers
        return (numbers + self._base(last_step)).cumsum(axis=0)

    @property
    def known_bins(self) -> ActionBins:
        """The bins of a plan of tokens.

        Raises:
            UserError: there are none.
        """
        if self.bins is None:
            raise UserError(
                "a plan of action tokens needs action bins, which come with the weights of a "
                "planning stage that learned such plans"
            )
        return self.bins

    def _base(self, last_step: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(last_step if self.values == "changes" else STANDING, dtype=np.float64)


STANDING = (0.0, 0.0)
POINTS = PlanForm()


@dataclass(frozen=True)
class Waypoints:
    """Points read from a text; `known` is False (and xy NaN) where the text says UN."""

    xy: NDArray[np.float64]  # [6, 2] metres
    known: NDArray[np.bool_]  # [6]


@dataclass(frozen=True)
class ParseFailure:
    """Why a text is not a trajectory.

    `exception` names what the released code would have stopped its evaluation with; "" where it is
    not the released code's way that failed.
    """

    reason: str
    exception: str = ""


def format_number(value: float, decimals: int = DECIMALS, *, signed_zero: bool = False) -> str:
    """Two decimals or fewer; what rounds to -0.00 is written 0.00, unless zeros have a sign."""
    text = f"{value:.{decimals}f}"
    unsigned = float(text) == 0.0 and text.startswith("-") and not signed_zero
    return text[1:] if unsigned else text


def format_waypoints(
    waypoints: ArrayLike, form: PlanForm = POINTS, last_step: ArrayLike = STANDING
) -> str:
    """Write a plan.

    Args:
        waypoints: [6, 2] metres, x right, y forward.
        form: what is written of it.
        last_step: [2] metres that the car moved in the 0.5 s before t0, for forms that need it.

    Raises:
        ValueError: another shape, or a number that is not finite.
        UserError: a form of tokens has no bins.
    """
    written = np.asarray(waypoints, dtype=np.float64)
    if form.values == "tokens":
        format_future(written)  # refuses what is no plan
        return form.known_bins.text(written)
    if written.ndim == 2:
        written = form.numbers(written, last_step)
    points = format_future(written, decimals=form.decimals, signed_zero=form.signed_zero)
    return f"{TRAJ_START}{points}{TRAJ_END}"


def format_future(
    positions: ArrayLike,
    known: ArrayLike | None = None,
    decimals: int = DECIMALS,
    *,
    signed_zero: bool = False,
) -> str:
    """Write the future of an agent.

    Args:
        positions: [6, 2] metres, in the agent's own frame.
        known: [6] False where the position is not known; None means that all are.
        decimals: of every number.
        signed_zero: see `PlanForm`.

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

    def written(value: float) -> str:
        return format_number(value, decimals, signed_zero=signed_zero)

    points = [
        f"({written(x)},{written(y)})" if is_known else f"({UNKNOWN},{UNKNOWN})"
        for (x, y), is_known in zip(xy.tolist(), mask.tolist(), strict=True)
    ]
    return f"[{','.join(points)}]"


def parse_waypoints(
    text: str, form: PlanForm = POINTS, last_step: ArrayLike = STANDING
) -> Waypoints | ParseFailure:
    """Read a plan: the whole text must be what `format_waypoints` may write in that form."""
    if form.values == "tokens":
        read = form.known_bins.read(text.strip())
        if isinstance(read, str):
            return ParseFailure(read)
        return Waypoints(read, np.ones(WAYPOINTS, dtype=bool))
    found = _PLAN.fullmatch(text.strip())
    if found is None:
        return ParseFailure(f"not of the form {TRAJ_START}[...]{TRAJ_END}")
    plan = _parse_points(found[1], form.decimals, unknown_allowed=False)
    if isinstance(plan, ParseFailure):
        return plan
    return Waypoints(form.positions(plan.xy, last_step), plan.known)


def median_plan(texts: Sequence[str], form: PlanForm, last_step: ArrayLike) -> str:
    """The plan in the middle of several: the median of each coordinate.

    Of all plans it is the one with the least expected distance, coordinate by coordinate, where the
    texts are drawn from what the model believes (minimum Bayes risk decoding, Kumar and Byrne
    2004). The most likely text need not be near the middle.

    Returns:
        The plan as text; where none of the texts is a plan, the first of them.
    """
    plans = [parse_waypoints(text, form, last_step) for text in texts]
    read = [plan.xy for plan in plans if isinstance(plan, Waypoints)]
    if not read:
        return texts[0]
    return format_waypoints(np.median(read, axis=0), form, last_step)


def future_as_json(positions: ArrayLike, known: ArrayLike) -> str:
    """The future of an agent for metrics, to the millimetre: a text rounds it to its decimals.

    Args:
        positions: [6, 2] metres, in the agent's own frame.
        known: [6] False where the position is not known, which becomes [null, null].
    """
    xy = np.asarray(positions, dtype=np.float64).round(3).tolist()
    mask = np.asarray(known, dtype=bool)
    return json.dumps(
        [[*point] if told else [None, None] for point, told in zip(xy, mask, strict=True)]
    )


def parse_future(text: str, decimals: int = DECIMALS) -> Waypoints | ParseFailure:
    """Read an agent's future: the whole text must be what `format_future` may write."""
    found = _FUTURE.fullmatch(text.strip())
    if found is None:
        return ParseFailure("not of the form [...]")
    return _parse_points(found[1], decimals, unknown_allowed=True)


def _parse_points(text: str, decimals: int, *, unknown_allowed: bool) -> Waypoints | ParseFailure:
    """Read `(x,y),(x,y),...`."""
    # [0-9], not \d: that also takes the digits of other scripts.
    number = rf"(-?(?:0|[1-9][0-9]*)\.[0-9]{{{decimals}}})"
    point = rf"\({number},{number}\)"
    if unknown_allowed:
        point = rf"\((?:{number},{number}|{UNKNOWN},{UNKNOWN})\)"
    if re.fullmatch(rf"{point}(?:,{point})*", text) is None:
        return ParseFailure("a point is malformed")
    pairs = re.findall(point, text)
    if len(pairs) != WAYPOINTS:
        return ParseFailure(f"{len(pairs)} points instead of {WAYPOINTS}")
    known = np.array([x != "" for x, _ in pairs])
    xy = np.array([(float(x or "nan"), float(y or "nan")) for x, y in pairs])
    if np.isinf(xy).any():
        return ParseFailure("a number is too large")
    return Waypoints(xy, known)


def reference_repair(text: str) -> Waypoints | ParseFailure:
    """Read and mend a text as the released evaluation does.

    A short list of points is filled up with its last one and a long one cut. Where the released
    code stops the whole evaluation (no pair at all, a malformed number), this is a ParseFailure
    that names its exception.
    """
    for pattern, replacement in _REPAIRS:
        text = re.sub(pattern, replacement, text)
    try:
        pairs = [(float(x), float(y)) for x, y in _LOOSE_POINT.findall(text)]
    except ValueError:
        return ParseFailure("a number is malformed", "ValueError")
    if not pairs:
        return ParseFailure("no pair of numbers", "IndexError")
    pairs = (pairs + [pairs[-1]] * WAYPOINTS)[:WAYPOINTS]
    return Waypoints(np.array(pairs), np.ones(WAYPOINTS, dtype=bool))
