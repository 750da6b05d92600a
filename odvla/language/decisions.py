"""What a car is to do next, in words: the meta-actions of a plan.

DriveVLM (Tian et al. 2024) has its model name meta-actions such as "slow down" and "turn left"
before it writes waypoints; its annotators wrote them down. Here they are read off the driven path,
as a pair of a change of speed and a direction, so that there are twelve of them. GPT-Driver (Mao et
al. 2023) reads its 31 off the driven path, too, by rules of its own; both are here, each by name.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Decisions = Literal["odvla", "gpt_driver"]  # whose
SPEEDS = ("speed up", "keep the speed", "slow down", "stop")
DIRECTIONS = ("turn left", "go straight", "turn right")
# Metres in 0.5 s. Under STANDING a car stands; the speed changes where the last step of the plan is
# longer or shorter than the step before it by more than CHANGE.
STANDING_M = 0.25
CHANGE_M = 0.75
TURN_RAD = math.radians(15.0)  # of the last step, seen from the car
# GPT-Driver's meta-actions (its gpt-driver/prompt_message.py): metres in 0.5 s, and metres to the
# side within 3 s.
META_STOP = "stop"
META_DIRECTIONS = (
    "move forward", "turn left", "change lane to left", "turn right", "change lane to right",
)  # fmt: skip
META_SPEEDS = (
    "a deceleration to zero", "a constant speed", "a quick deceleration", "a deceleration",
    "a quick acceleration", "an acceleration",
)  # fmt: skip
META_SAME_M = 0.5
META_FORWARD_M, META_TURN_M = 2.0, 4.0


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


def meta_action_of(waypoints: ArrayLike, last_step: ArrayLike) -> str:
    """GPT-Driver's meta-action of a plan, in small letters and with a full stop.

    Its speed is that of the plan's last step beside that of the last step before; its direction
    hangs on how far to the side the plan comes.

    Args:
        waypoints: [6, 2] metres, x right, y forward, 0.5 s apart.
        last_step: [2] metres that the car moved in the 0.5 s before.
    """
    plan = np.asarray(waypoints, dtype=np.float64)
    before = float(np.linalg.norm(last_step))
    after = float(np.linalg.norm(plan[-1] - plan[-2]))
    if before < META_SAME_M and after < META_SAME_M:
        return f"{META_STOP}."
    if after < META_SAME_M:
        speed = "a deceleration to zero"
    elif abs(after - before) < META_SAME_M:
        speed = "a constant speed"
    elif before > after:
        speed = "a quick deceleration" if before > 2 * after else "a deceleration"
    else:
        speed = "a quick acceleration" if after > 2 * before else "an acceleration"
    x = float(plan[-1, 0])
    # (The original stops with an error where a plan swings out and ends at exactly 0.)
    if (np.abs(plan[:, 0]) < META_FORWARD_M).all() or x == 0:
        direction = "move forward"
    else:
        side = "left" if x < 0 else "right"
        direction = f"turn {side}" if abs(x) > META_TURN_M else f"change lane to {side}"
    return f"{direction} with {speed}."


def all_decisions(whose: Decisions = "odvla") -> tuple[str, ...]:
    """Every text that `decision_of` (or `meta_action_of`) may give.

    None is the beginning of another.
    """
    if whose == "gpt_driver":
        told = [
            f"{direction} with {speed}." for direction in META_DIRECTIONS for speed in META_SPEEDS
        ]
        return (f"{META_STOP}.", *told)
    return tuple(f"{speed}, {direction}." for speed in SPEEDS for direction in DIRECTIONS)
