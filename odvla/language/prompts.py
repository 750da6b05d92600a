"""Prompts are data: a dialect is a YAML file beside this one, or one of the user's own.

A dialect words what surrounds a record: the system prompt, the slots of the scene's tokens, the
car's state, the request. It is part of a model as weights are: a model trained on one dialect
answers nonsense in another.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from odvla.errors import UserError
from odvla.language.waypoints import DECIMALS, PlanForm, format_number
from odvla.types import COMMANDS, HISTORY, EgoState, Turn

# Kinds of conversation a dialect must word (Conversation.kind).
KINDS = (
    "plan",
    "agent",
    "caption_object",
    "caption_map",
    "caption_scene",
    "caption",
    "qa",
    "narration",
    "text",
)
EGO_FIELDS = ("vx", "vy", "v_yaw", "ax", "ay", "can_x", "can_y", "speed", "steering")
FIELDS = frozenset((*EGO_FIELDS, "history", "command", "question"))
# Parts of a request that an ablation may leave out (the paper's table IV): the fields they tell.
PARTS = {
    "ego": frozenset(EGO_FIELDS),
    "history": frozenset({"history"}),
    "command": frozenset({"command"}),
}


@dataclass(frozen=True)
class Wording:
    """The checked content of a dialect file."""

    system: str
    lines: Mapping[str, str]
    requests: Mapping[str, tuple[str, ...]]
    caption_object_answer: str
    speed_scale: float  # the prompt's velocity and heading speed, as a multiple of m/s
    signed_zero: bool  # a number that rounds to zero from below is written -0.00
    plan: PlanForm  # how plans and futures are written; the history of a plan of motion is motion


@dataclass(frozen=True)
class Dialect:
    """How conversations are worded.

    Args:
        name: "reference" (the paper's prompts), "compact" (for tiny language models), or the path
            of a YAML file.
        without: parts left out of every request, of "ego", "history" and "command".

    Raises:
        UserError: there is no such dialect, its file is malformed, or `without` names no part.
    """

    name: str = "reference"
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Read the file now, so that a mistake in it shows at construction."""
        for part in self.without:
            if part not in PARTS:
                raise UserError(f"dialect.without must be some of {', '.join(PARTS)}, not {part!r}")
            if not any(_fields_of(line) & PARTS[part] for line in self.wording.lines.values()):
                raise UserError(
                    f"dialect.without names {part!r}, which dialect {self.name!r} does not tell"
                )
        _ = self.wording

    @property
    def has_ego_slot(self) -> bool:
        """Whether a request for a plan has a place for the ego token."""
        lines = [self.wording.lines[name] for name in self.wording.requests["plan"]]
        return any("<EGO>" in line for line in lines if not _fields_of(line) & self._hidden)

    @property
    def _hidden(self) -> frozenset[str]:
        """Fields that are not told."""
        return frozenset(field for part in self.without for field in PARTS[part])

    @property
    def wording(self) -> Wording:
        """The texts."""
        return _read_wording(self.name)

    def turns(
        self, kind: str, answer: str | None, ego: EgoState | None, question: str = ""
    ) -> tuple[Turn, ...]:
        """A conversation of one request and, where it is known, its answer.

        Args:
            kind: one of KINDS.
            answer: None for a request that is still to be answered.
            ego: the car's state, one row; None will do where the request does not tell it.
            question: what is asked, for kinds that ask.

        Raises:
            UserError: an unknown kind, or the request needs an ego state that is not given.
        """
        turns = [Turn("user", self.request(kind, ego, question))]
        if self.wording.system:
            turns.insert(0, Turn("system", self.wording.system))
        if answer is not None:
            turns.append(Turn("assistant", answer))
        return tuple(turns)

    def request(self, kind: str, ego: EgoState | None, question: str = "") -> str:
        """The user's message (see `turns`)."""
        if kind not in self.wording.requests:
            raise UserError(
                f"dialect {self.name!r} has no request of kind {kind!r}, only "
                f"{', '.join(self.wording.requests)}"
            )
        lines = [self.wording.lines[name] for name in self.wording.requests[kind]]
        lines = [line for line in lines if not _fields_of(line) & self._hidden]
        needed = {field for line in lines for field in _fields_of(line)}
        values = {"question": question}
        if needed - {"question"}:
            if ego is None:
                raise UserError(f"a request of kind {kind!r} tells the ego state, which is missing")
            values |= self.ego_fields(ego)
        return "\n".join(line.format(**values) for line in lines)

    def ego_fields(self, ego: EgoState) -> dict[str, str]:
        """What the names in a line's braces stand for, of one row."""
        if len(ego.velocity) != 1:
            raise ValueError(f"one row of ego state makes a prompt, not {len(ego.velocity)}")
        scale = self.wording.speed_scale
        vx, vy = ego.velocity[0].tolist()
        ax, ay = ego.acceleration[0].tolist()
        can_x, can_y = ego.can_accel[0].tolist()
        numbers = {
            "vx": vx * scale,
            "vy": vy * scale,
            "v_yaw": ego.yaw_rate[0].item(),
            "ax": ax,
            "ay": ay,
            "can_x": can_x,
            "can_y": can_y,
            "speed": ego.heading_speed[0].item() * scale,
            "steering": ego.steering[0].item(),
        }
        past = ego.history[0]
        if self.wording.plan.values != "points":
            past = torch.diff(past, dim=0, append=past.new_zeros(1, 2))  # up to the car itself
        points = [f"({self._number(x)},{self._number(y)})" for x, y in past.tolist()]
        assert len(points) == HISTORY
        return {
            **{name: self._number(value) for name, value in numbers.items()},
            "history": ",".join(points),
            "command": COMMANDS[int(ego.command[0])],
        }

    @property
    def plan_form(self) -> PlanForm:
        """How plans are written: needed to read them back."""
        return self.wording.plan

    def object_caption_answer(self, caption: str, x_m: float, y_m: float) -> str:
        """An object's caption with its place (LIDAR_TOP frame), as stage 1 has it."""
        return self.wording.caption_object_answer.format(
            caption=caption.strip(),
            x=self._number(x_m, self.plan_form.decimals),
            y=self._number(y_m, self.plan_form.decimals),
        )

    def _number(self, value: float, decimals: int = DECIMALS) -> str:
        if self.wording.signed_zero:
            return f"{value:.{decimals}f}"
        return format_number(value, decimals)


@lru_cache
def _fields_of(line: str) -> frozenset[str]:
    """Names in the braces of a line."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(line) if name is not None)


@lru_cache
def _read_wording(name: str) -> Wording:
    """Read and check a dialect file."""
    shipped = Path(__file__).parent / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
        raise UserError(f"dialect {name!r} is neither a file nor one of {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"dialect {path} is not YAML: {' '.join(str(error).split())}") from error
    return _checked(content, path)


def _checked(content: Any, path: Path) -> Wording:
    """Wording from a file's content; every name in it must mean something."""
    types = {
        "system": str,
        "lines": dict,
        "requests": dict,
        "answers": dict,
        "speed_scale": float,
        "signed_zero": bool,
        "plan": dict,
    }
    if not isinstance(content, dict) or set(content) != set(types):
        raise UserError(f"dialect {path} must hold the entries {', '.join(types)} and no others")
    for key, expected in types.items():
        if not isinstance(content[key], (float, int) if expected is float else expected):
            raise UserError(f"dialect {path}: {key} must be a {expected.__name__}")
    lines, requests = content["lines"], content["requests"]
    for name, line in lines.items():
        unknown = _line_fields(path, name, line) - FIELDS
        if unknown:
            raise UserError(f"dialect {path}: line {name!r} has unknown {{{min(unknown)}}}")
    if set(requests) != set(KINDS):
        raise UserError(f"dialect {path}: requests must be {', '.join(KINDS)}")
    for kind, names in requests.items():
        for name in names if isinstance(names, list) else [names]:
            if name not in lines:
                raise UserError(f"dialect {path}: request {kind!r} uses unknown line {name!r}")
    answer = content["answers"].get("caption_object")
    if _line_fields(path, "caption_object", answer) != {"caption", "x", "y"}:
        raise UserError(f"dialect {path}: answer caption_object must tell caption, x and y")
    return Wording(
        system=content["system"],
        lines=lines,
        requests={kind: tuple(names) for kind, names in requests.items()},
        caption_object_answer=answer,
        speed_scale=content["speed_scale"],
        signed_zero=content["signed_zero"],
        plan=_plan_form(content["plan"], path),
    )


def _plan_form(content: dict[str, Any], path: Path) -> PlanForm:
    if set(content) != {"values", "decimals"} or type(content["decimals"]) is not int:
        raise UserError(f"dialect {path}: plan must tell values and decimals, a number")
    try:
        return PlanForm(**content)
    except UserError as error:
        raise UserError(f"dialect {path}: {error}") from error


def _line_fields(path: Path, name: str, line: Any) -> frozenset[str]:
    if not isinstance(line, str):
        raise UserError(f"dialect {path}: {name!r} must be a text")
    try:
        return _fields_of(line)
    except ValueError as error:
        raise UserError(f"dialect {path}: {name!r} has unbalanced braces") from error
