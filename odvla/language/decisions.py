"""What a car is to do next, in words: the meta-actions of a plan.

DriveVLM (Tian et al. 2024) has its model name meta-actions such as "slow down" and "turn left"
before it writes waypoints; its annotators wrote them down. Here they are read off the driven path,
as a pair of a change of speed and a direction, so that there are twelve of them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

SPEEDS = ("speed up", "keep the speed", "slow down", "stop")
DIRECTIONS = ("turn left", "go straight", "turn right")
# Metres in 0.5 s. Under STANDING a car stands; the speed changes where the last step of the plan is
# longer or shorter than the step before it by more than CHANGE.
STANDING_M = 0.25
CHANGE_M = 0.75
TURN_RAD = math.radians(15.0)  # of the last step, seen from the car


def decision_of(waypoints: ArrayLike, last_step: ArrayLike) -> str:
    """The decision that a plan carries out.

    Args:
        waypoints: [6, 2] metres, x right, y forward, 0.5 s apart.
        last_step: [2] metres that the car moved in the 0.5 s before.
    """
    plan = np.asarray(waypoints, dtype=np.float64)
    steps = np.diff(plan, axis=0, prepend=np.zeros((1, 2)))
    before, after = float(np.linalg.norm(last_step)), float(np.linalg.norm(steps[-1]))
    if after < STANDING_M:
        speed = "stop"
    elif abs(after - before) <= CHANGE_M:
        speed = "keep the speed"
    else:
        speed = "speed up" if after > before else "slow down"
    # The heading of the last step that is long enough to have one.
    moving = [step for step in steps if np.linalg.norm(step) >= STANDING_M]
    turned = math.atan2(-moving[-1][0], moving[-1][1]) if moving else 0.0
    direction = "go straight"
    if abs(turned) >= TURN_RAD:
        direction = "turn left" if turned > 0 else "turn right"
    return f"{speed}, {direction}."


def all_decisions() -> tuple[str, ...]:
    """Every text that `decision_of` may give; none is the beginning of another."""
    return tuple(f"{speed}, {direction}." for speed in SPEEDS for direction in DIRECTIONS)
