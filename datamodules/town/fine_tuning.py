"""GPT-Driver's fine-tuning lines from the town's cached info, in the form of its create_data.py.

Everything is told from the cache's fields by GPT-Driver's rules (its gpt-driver/prompt_message.py);
the system text is the town's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.gpt_driver_lines import (
    ACTION,
    EFFECTS,
    EGO_STATES,
    GOAL,
    GOALS,
    MISSPELT,
    NOTABLE,
    NOTHING,
    OBJECTS,
    PAST,
    PLAN,
    ROLES,
    STATES,
    THOUGHTS,
    UNKNOWN_PLACE,
)
from datamodules.town.log import FloatArray
from odvla.language.decisions import meta_action_of
from odvla.types import HISTORY, STEP_S, WAYPOINTS

SYSTEM = (
    "You drive a car. You are told what is around it, where these things will be in 3 s, how the "
    "car moves and where it is to go. Say what matters, what the car is to do, and where it will "
    "be in 0.5 s, 1.0 s, .. 3.0 s: six points, x to the right, y to the front, in metres."
)
REACH_M = 20.0  # objects that come further away are not told
# Half sizes of the car, and the room it wants at its sides and in front.
HALF_WIDTH_M, HALF_LENGTH_M = 0.925, 2.04
BESIDE_M, AHEAD_M = 1.0, 3.0


def fine_tuning_line(info: Mapping[str, Any]) -> dict[str, Any]:
    """One line: the three messages about a key-frame.

    Args:
        info: its cached info.
    """
    texts = (SYSTEM, _user(info), _assistant(info))
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]
    return {"messages": messages}


def _user(info: Mapping[str, Any]) -> str:
    places, known = object_paths(info)
    lines = ["", OBJECTS]
    for name, path, seen in zip(info["gt_names"], places, known, strict=True):
        if not _is_told(path):
            continue
        goes_to = _point(path[-1]) if seen[-1] else UNKNOWN_PLACE
        lines.append(f" - {_short(name)} at {_point(path[0])}, moving to {goes_to}.")
    lines.append(STATES)
    lcf, steps = info["gt_ego_lcf_feat"], info["gt_ego_his_diff"]
    states = (
        lcf[:2] * STEP_S, lcf[4:5], steps[-1] - steps[-2], lcf[2:4], lcf[7:8] * STEP_S, lcf[8:9],
    )  # fmt: skip
    for name, values in zip(EGO_STATES, states, strict=True):
        lines.append(f" - {name}: {_point(values)}")
    lines.append(f"{PAST}: {_path(info['gt_ego_his_trajs'][:HISTORY])}")
    lines.append(f"{GOAL}: {GOALS[int(info['gt_ego_fut_cmd'].argmax())]}")
    return "\n".join([*lines, ""])


def _assistant(info: Mapping[str, Any]) -> str:
    places, _ = object_paths(info)
    met = meetings(info)
    lines = [THOUGHTS]
    for row, step in met.items():
        thing = f"{_short(info['gt_names'][row])} at {_point(places[row, 0])}"
        when = f"within the safe zone of the ego-vehicle at the {step * STEP_S}-second timestep"
        lines += [f" - {NOTABLE}: {thing}", f"   {EFFECTS}: {when}"]
    if not met:
        lines += [f" - {NOTABLE}: {NOTHING}", f"   {EFFECTS}: {NOTHING}"]
    plan = info["gt_ego_fut_trajs"][1:]
    action = meta_action_of(plan, info["gt_ego_his_diff"][-1]).removesuffix(".")
    if "left" in action:
        wrong, right = MISSPELT
        action = action.replace(right, wrong)  # as create_data.py has it, to the left alone
    return "\n".join([*lines, f"{ACTION}: {action.upper()}", PLAN, _path(plan)])


def object_paths(info: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Where the N objects are now and at the next 6 steps [N, 7, 2], and what is known [N, 7].

    A path stays where it was last seen.
    """
    count = len(info["gt_boxes"])
    steps = info["gt_agent_fut_trajs"].reshape(count, WAYPOINTS, 2)
    path = np.concatenate([np.zeros((count, 1, 2)), np.cumsum(steps, axis=1)], axis=1)
    known = np.concatenate([np.ones((count, 1)), info["gt_agent_fut_masks"]], axis=1)
    return path + info["gt_boxes"][:, None, :2], known


def meetings(info: Mapping[str, Any]) -> dict[int, int]:
    """Rows of the objects that come close in front of the car, and the first step at which.

    The car is taken to go on with the speed and acceleration of its last steps.
    """
    places, known = object_paths(info)
    diffs = info["gt_ego_his_diff"]
    speed = info["gt_ego_lcf_feat"][:2] * STEP_S
    times = np.arange(WAYPOINTS)[:, None]
    moves = speed + times * (diffs[-1] - diffs[-2])
    car = np.concatenate([np.zeros((1, 2)), np.cumsum(moves, axis=0)])
    found = {}
    for row, (path, seen) in enumerate(zip(places, known, strict=True)):
        if not _is_told(path):
            continue
        half_width, half_length = info["gt_boxes"][row, 3:5] / 2
        beside, ahead = np.abs(path[:, 0] - car[:, 0]), path[:, 1] - car[:, 1]
        close = (beside < HALF_WIDTH_M + half_width + BESIDE_M) & (ahead > 0)
        close &= (ahead < HALF_LENGTH_M + half_length + AHEAD_M) & (seen > 0)
        if close.any():
            found[row] = int(close.argmax())
    return found


def _is_told(path: FloatArray) -> bool:
    """Whether an object comes in front of the car, and never far from it; [7, 2]."""
    return bool((path[:, 1] > 0).any() and (np.abs(path) <= REACH_M).all())


def _short(name: str) -> str:
    return str(name).split(".")[-1]


def _point(values: FloatArray) -> str:
    return f"({','.join(f'{value:.2f}' for value in values)})"


def _path(points: FloatArray) -> str:
    return f"[{', '.join(map(_point, points))}]"
