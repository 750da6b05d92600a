"""From a file of plans to a PlanSet: parse policies, lengths, numbers, and the frame they are in.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.planning_scores import MISSING, PlanSet
from experiments.planning_truth import PlanningTruth
from experiments.submissions import Submission, as_points, named
from odvla.errors import UserError
from odvla.language.waypoints import ParseFailure, parse_waypoints, reference_repair
from odvla.types import WAYPOINTS

FloatArray = NDArray[np.float64]
# How points [..., T, 2] that are meant in another way become points of LIDAR_TOP.
FRAMES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "lidar": lambda points: points,
    # x forward, y left. The 0.94 m from the rear axle to the lidar turn with the car: neglected.
    "ego": lambda points: np.stack([-points[..., 1], points[..., 0]], axis=-1),
    "swapped": lambda points: points[..., ::-1],
    "mirrored": lambda points: points * [-1.0, 1.0],
    "offsets": lambda points: np.cumsum(points, axis=-2),
}
MEANINGS = {
    "ego": "in the ego frame (x forward, y left)",
    "swapped": "with x and y swapped",
    "mirrored": "with x to the left",
    "offsets": "as offsets from step to step",
}
# A frame is called wrong when plans miss the driven paths by more than SUSPICIOUS_M in the median
# and another reading of the same numbers misses by less than half of it. Cars that hardly move say
# nothing about axes.
SUSPICIOUS_M, BETTER, MOVING_M, LEAST_PLANS = 1.0, 0.5, 4.0, 3


@dataclass(frozen=True)
class Counts:
    """What became of every record of a file and every key-frame of the split."""

    in_file: int
    in_split: int
    used: int
    missing: tuple[str, ...]  # key-frames of the split without a plan
    extra: tuple[str, ...]  # tokens that are no key-frame of the split
    doubled: tuple[str, ...]
    conflicting: tuple[str, ...]
    failures: dict[str, tuple[str, ...]]  # reason -> tokens
    repaired: tuple[str, ...]  # lengths that were mended, as the reference does

    def as_dict(self) -> dict[str, Any]:
        """Numbers and all names, for results.json."""
        failures = {reason: list(tokens) for reason, tokens in self.failures.items()}
        return {
            "in_file": self.in_file,
            "in_split": self.in_split,
            "used": self.used,
            "n_missing": len(self.missing),
            "n_extra": len(self.extra),
            "n_doubled": len(self.doubled),
            "n_unusable": sum(len(tokens) for tokens in self.failures.values()),
            "missing": list(self.missing),
            "extra": list(self.extra),
            "doubled": list(self.doubled),
            "conflicting": list(self.conflicting),
            "unusable": failures,
            "repaired": list(self.repaired),
        }

    def sentences(self) -> list[str]:
        """What the user should know."""
        said = []
        if self.missing:
            said.append(
                f"{len(self.missing)} of {self.in_split} key-frames have no plan: "
                f"{named(self.missing)}"
            )
        if self.extra:
            said.append(
                f"{len(self.extra)} plans belong to no key-frame of the split: {named(self.extra)}"
            )
        if self.doubled:
            said.append(
                f"{len(self.doubled)} samples come more than once ({len(self.conflicting)} with "
                f"different plans), the first counts: {named(self.doubled)}"
            )
        for reason, tokens in self.failures.items():
            said.append(f"{len(tokens)} plans cannot be used, {reason}: {named(tokens)}")
        if self.repaired:
            said.append(
                f"{len(self.repaired)} plans were filled up or cut to 6 points: "
                f"{named(self.repaired)}"
            )
        return said


def plan_set(
    submission: Submission,
    truth: PlanningTruth,
    *,
    repair: bool,
    frame: str = "lidar",
    name: str = "",
) -> tuple[PlanSet, Counts]:
    """Plans of a file for every key-frame of the split.

    Args:
        submission: what the file holds.
        truth: the split.
        repair: read texts and lengths as the released code does, or strictly.
        frame: one of FRAMES, what the numbers mean.
        name: of the planner; "": the file's.

    Raises:
        UserError: no plan belongs to the split or none can be used, or the plans are plainly in
            another frame.
    """
    tokens = truth.split.tokens
    known = set(tokens)
    extra = tuple(token for token in submission.plans if token not in known)
    if len(extra) == len(submission.plans):
        raise UserError(
            f"{submission.path}: none of its {len(extra)} samples is a key-frame of the "
            f"{truth.split_name} split of {truth.data.config.folder}, e.g. {extra[0]}"
        )
    points = np.zeros((len(tokens), WAYPOINTS, 2))
    failures: dict[int, str] = {}
    repaired = []
    for row, token in enumerate(tokens):
        if token not in submission.plans:
            failures[row] = MISSING
            continue
        plan, changed = _read(submission.plans[token], repair)
        if isinstance(plan, str):
            failures[row] = plan
        else:
            points[row] = plan
            if changed:
                repaired.append(token)
    usable = [row for row in range(len(tokens)) if row not in failures]
    if not usable:
        reasons = Counter(why for why in failures.values() if why != MISSING).most_common(1)
        raise UserError(
            f"{submission.path}: not one of its {len(submission.plans) - len(extra)} plans can be "
            f"used; the commonest reason: {reasons[0][0]}"
        )
    points[usable] = FRAMES[frame](points[usable])
    # Sixty points that were cut to six say nothing about axes.
    mended = set(repaired)
    told = [row for row in usable if tokens[row] not in mended]
    _check_frame(points, told, truth, submission, frame)
    by_reason: dict[str, list[str]] = {}
    for row, why in failures.items():
        by_reason.setdefault(why, []).append(tokens[row])
    counts = Counts(
        in_file=len(submission.plans),
        in_split=len(tokens),
        used=len(usable),
        missing=tuple(by_reason.pop(MISSING, ())),
        extra=extra,
        doubled=submission.doubled,
        conflicting=submission.conflicting,
        failures={reason: tuple(found) for reason, found in by_reason.items()},
        repaired=tuple(repaired),
    )
    return PlanSet(name or submission.path.name, torch.from_numpy(points), failures), counts


def _read(value: Any, repair: bool) -> tuple[FloatArray | str, bool]:
    """Six points, or why there are none; and whether the length was mended."""
    if value is None:
        return "its own text could not be read", False
    if isinstance(value, str):
        found = reference_repair(value) if repair else parse_waypoints(value)
        return (found.reason if isinstance(found, ParseFailure) else found.xy), False
    points = as_points(value)
    if points is None:
        return "no list of points", False
    if not np.isfinite(points).all():
        return "not finite (NaN or infinite)", False
    if len(points) == WAYPOINTS:
        return points, False
    if not repair or not len(points):
        return f"{len(points)} points instead of {WAYPOINTS}", False
    filled = np.concatenate([points, np.repeat(points[-1:], WAYPOINTS, axis=0)])[:WAYPOINTS]
    return filled, True


def _check_frame(
    points: FloatArray, usable: list[int], truth: PlanningTruth, found: Submission, frame: str
) -> None:
    """Stop where another reading of the same numbers fits the driven paths far better."""
    driven = truth.split.waypoints.double().numpy()[usable]
    mask = truth.split.mask.numpy()[usable]
    last = driven[np.arange(len(driven)), np.maximum(mask.sum(1) - 1, 0)]
    moving = mask.any(1) & (np.linalg.norm(last, axis=-1) > MOVING_M)
    if moving.sum() < LEAST_PLANS:
        return
    plans = points[usable][moving]

    def error(read: FloatArray) -> float:
        distance = np.linalg.norm(read - driven[moving], axis=-1)
        return float(np.median((distance * mask[moving]).sum(1) / mask[moving].sum(1)))

    given = error(plans)
    others = {name: error(change(plans)) for name, change in FRAMES.items() if name != "lidar"}
    best = min(others, key=others.__getitem__)
    if given > SUSPICIOUS_M and others[best] < BETTER * given:
        raise UserError(
            f"{found.path}: read as frame {frame!r}, the plans look as if they were "
            f"{MEANINGS[best]}: the median error is {given:.2f} m as they are and "
            f"{others[best]:.2f} m read that way; if they are, say --frame {best}, for plans are "
            "x right, y forward in LIDAR_TOP at t0"
        )
