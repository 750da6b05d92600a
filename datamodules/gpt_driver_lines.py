"""GPT-Driver's fine-tuning lines (train.json, ndjson), as its create_data.py writes them.

A line is {"messages": [system, user, assistant]}. The user's message holds what its rules see of
the scene (objects within 20 m and where they go), the state of the car, its last 2 s and its goal;
the assistant's holds thoughts, a meta-action and the plan. All are numbers of two decimals, in
LIDAR_TOP at t0 (x right, y forward), speeds in metres in 0.5 s. A line does not say which key-frame
it is about: see gpt_driver_thoughts.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from datamodules.language_files import read_json_lines, text_field
from odvla.errors import UserError
from odvla.language.decisions import all_decisions
from odvla.types import HISTORY, WAYPOINTS

ROLES = ("system", "user", "assistant")
OBJECTS = "Perception and Prediction:"
STATES = "Ego-States:"
# Names as they are written, and numbers of each.
EGO_STATES = {
    "Velocity (vx,vy)": 2,
    "Heading Angular Velocity (v_yaw)": 1,
    "Acceleration (ax,ay)": 2,
    "Can Bus": 2,
    "Heading Speed": 1,
    "Steering": 1,
}
PAST = "Historical Trajectory (last 2 seconds)"
GOAL = "Mission Goal"
GOALS = ("RIGHT", "LEFT", "FORWARD")  # in the order of COMMANDS
THOUGHTS = "Thoughts:"
NOTABLE = "Notable Objects from Perception"
EFFECTS = "Potential Effects from Prediction"
ACTION = "Meta Action"
PLAN = "Trajectory:"
NOTHING = "None"
UNKNOWN_PLACE = "unknown location"
ACTIONS = frozenset(all_decisions("gpt_driver"))
MISSPELT = ("chane lane", "change lane")  # by create_data.py
STATE_NUMBERS = sum(EGO_STATES.values())
NUMBERS = STATE_NUMBERS + 2 * (HISTORY + WAYPOINTS)  # that a line tells of the car

_NUMBER = r"-?\d+\.\d\d"
_POINT = re.compile(rf"\(({_NUMBER}),({_NUMBER})\)")
_PATH = re.compile(rf"\[{_POINT.pattern}(?:, ?{_POINT.pattern})*\]")
_STATE = re.compile(rf"\({_NUMBER}(?:,{_NUMBER})*\)")
_FORECAST = re.compile(rf"- (\S.*) at {_POINT.pattern}, moving to (.+)\.")
_NOTABLE = re.compile(rf"(\S.*) at {_POINT.pattern}")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Forecast:
    """An object that the car is told of; metres, lidar frame of t0."""

    name: str
    at: Point
    goes_to: Point | None  # in 3 s; None: it is not known


@dataclass(frozen=True, slots=True)
class Notable:
    """An object that is thought about."""

    name: str
    at: Point
    effect: str


@dataclass(frozen=True)
class FineTuningLine:
    """One line, checked."""

    number: int  # in the file, from 1
    system: str
    objects: tuple[Forecast, ...]
    numbers: NDArray[np.float64]  # [29] states in the order of EGO_STATES, history, plan
    command: int  # index into COMMANDS
    notable: tuple[Notable, ...]
    thoughts: str  # the assistant's, without marks of lists
    decision: str  # its meta-action, one of all_decisions("gpt_driver")

    @property
    def states(self) -> NDArray[np.float64]:
        """[9]."""
        return self.numbers[:STATE_NUMBERS]

    @property
    def history(self) -> NDArray[np.float64]:
        """[4, 2] 2.0 s ago .. 0.5 s ago."""
        return self.numbers[STATE_NUMBERS : STATE_NUMBERS + 2 * HISTORY].reshape(-1, 2)

    @property
    def waypoints(self) -> NDArray[np.float64]:
        """[6, 2] the next 3 s."""
        return self.numbers[-2 * WAYPOINTS :].reshape(-1, 2)


def read_lines(path: Path) -> Iterator[FineTuningLine]:
    """Every line of a file, in its order.

    Raises:
        UserError: the file is missing, or a line does not fit; it names file, line, field and what
            was expected.
    """
    for number, record in read_json_lines(path):
        yield _Line(path, number).read(record)


@dataclass(frozen=True)
class _Line:
    """Reads one line; knows what to call it."""

    path: Path
    number: int

    def fail(self, field: str, expected: str, found: object) -> NoReturn:
        raise UserError(
            f"{self.path}, line {self.number}: field {field!r} must be {expected}, not {found!r}"
        )

    def read(self, record: Any) -> FineTuningLine:
        system, user, assistant = self.messages(record)
        objects, states, history, command = self.user(user)
        notable, thoughts, decision, plan = self.assistant(assistant)
        numbers = np.array([*states, *history, *plan], dtype=np.float64)
        return FineTuningLine(
            self.number, system, objects, numbers, command, notable, thoughts, decision
        )

    def messages(self, record: Any) -> list[str]:
        """Texts of the three roles."""
        name = f"line {self.number}"
        if not isinstance(record, dict) or "messages" not in record:
            raise UserError(f"{self.path}, {name}: expected an object with a list 'messages'")
        messages = record["messages"]
        told = [text_field(m, "role", self.path, name) for m in _items(messages)]
        if tuple(told) != ROLES:
            self.fail("messages", f"those of {', '.join(ROLES)}", told)
        return [text_field(m, "content", self.path, name) for m in messages]

    def user(self, text: str) -> tuple[tuple[Forecast, ...], list[float], list[float], int]:
        """Objects, numbers of the state and of the history, command."""
        lines = [line.strip() for line in text.strip().split("\n")]
        if lines[0] != OBJECTS:
            self.fail("user", f"a text that begins with {OBJECTS!r}", lines[0])
        if STATES not in lines:
            self.fail("user", f"a text with {STATES!r}", lines[-1])
        start = lines.index(STATES)
        objects = tuple(self.forecast(line) for line in lines[1:start])
        rest = lines[start + 1 :]
        names = [*(f"- {name}" for name in EGO_STATES), PAST, GOAL]
        values = [
            self.after(f"{name}:", line or "", f"user.{name.removeprefix('- ')}")
            for name, line in zip_longest(names, rest[: len(names)])
        ]
        if len(rest) > len(names):
            self.fail("user", f"a text that ends with its {GOAL!r}", rest[-1])
        states: list[float] = []
        for (name, count), value in zip(EGO_STATES.items(), values, strict=False):
            found = (
                [float(part) for part in value[1:-1].split(",")] if _STATE.fullmatch(value) else []
            )
            if len(found) != count:
                self.fail(
                    f"user.{name}", f"numbers of two decimals in brackets, {count} of them", value
                )
            states += found
        if values[-1] not in GOALS:
            self.fail(f"user.{GOAL}", f"one of {', '.join(GOALS)}", values[-1])
        history = self.path_of(values[-2], HISTORY, f"user.{PAST}")
        return objects, states, history, GOALS.index(values[-1])

    def assistant(self, text: str) -> tuple[tuple[Notable, ...], str, str, list[float]]:
        """Notable objects, the thoughts as text, decision, numbers of the plan."""
        lines = [line.strip() for line in text.strip().split("\n")]
        if lines[0] != THOUGHTS:
            self.fail("assistant", f"a text that begins with {THOUGHTS!r}", lines[0])
        if len(lines) < 6 or len(lines) % 2 or lines[-2] != PLAN:
            expected = f"thoughts, a line {ACTION!r}, a line {PLAN!r} and the points"
            self.fail("assistant", expected, text.strip())
        action = self.after(f"{ACTION}:", lines[-3], f"assistant.{ACTION}")
        decision = f"{action.lower().replace(*MISSPELT)}."
        if decision not in ACTIONS:
            known = "one of GPT-Driver's meta-actions, such as MOVE FORWARD WITH A CONSTANT SPEED"
            self.fail(f"assistant.{ACTION}", known, action)
        said = [line.removeprefix("- ") for line in lines[1:-3]]
        pairs = list(zip(said[::2], said[1::2], strict=True))
        notable = tuple(self.notable(*pair, alone=len(pairs) == 1) for pair in pairs)
        plan = self.path_of(lines[-1], WAYPOINTS, f"assistant.{PLAN[:-1]}")
        return tuple(n for n in notable if n is not None), "\n".join(said), decision, plan

    def forecast(self, line: str) -> Forecast:
        found = _FORECAST.fullmatch(line)
        goal = _POINT.fullmatch(found[4]) if found else None
        if found is None or (goal is None and found[4] != UNKNOWN_PLACE):
            expected = "lines such as '- car at (1.00,2.00), moving to (1.00,9.00).'"
            self.fail(f"user.{OBJECTS[:-1]}", expected, line)
        goes_to = None if goal is None else (float(goal[1]), float(goal[2]))
        return Forecast(found[1], (float(found[2]), float(found[3])), goes_to)

    def notable(self, what: str, effect: str, *, alone: bool) -> Notable | None:
        """A thought; None: there is nothing to think of."""
        what = self.after(f"{NOTABLE}:", what, f"assistant.{NOTABLE}")
        effect = self.after(f"{EFFECTS}:", effect, f"assistant.{EFFECTS}")
        if what == NOTHING and alone:
            if effect != NOTHING:
                self.fail(f"assistant.{EFFECTS}", f"{NOTHING}, as no object is named", effect)
            return None
        found = _NOTABLE.fullmatch(what)
        if found is None:
            self.fail(f"assistant.{NOTABLE}", "an object such as 'car at (1.00,2.00)'", what)
        return Notable(found[1], (float(found[2]), float(found[3])), effect)

    def path_of(self, text: str, count: int, field: str) -> list[float]:
        """Numbers of a path of `count` points."""
        points = _POINT.findall(text)
        if not _PATH.fullmatch(text) or len(points) != count:
            expected = f"{count} points (x,y) of two decimals in square brackets"
            self.fail(field, expected, f"{len(points)} in {text}")
        return [float(number) for point in points for number in point]

    def after(self, head: str, line: str, field: str) -> str:
        """What follows a head."""
        if not line.startswith(head) or not line[len(head) :].strip():
            self.fail(field, f"a line that begins with {head!r} and goes on", line)
        return line[len(head) :].strip()


def _items(messages: Any) -> Sequence[Any]:
    return messages if isinstance(messages, list) else ()
