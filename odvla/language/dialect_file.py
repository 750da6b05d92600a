"""A dialect as a YAML file: read, check, write, hash. odvla.yaml explains every entry.

A file may word some kinds of conversation only; asking for another kind is then an error.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from odvla.errors import UserError
from odvla.language.waypoints import PlanForm
from odvla.types import COMMANDS

# Kinds of conversation a dialect can word (Conversation.kind). "describe", "decide" and "conclude"
# are the three requests of a plan that is thought over (Dialect.thinking_turns).
KINDS = (
    "plan",
    "describe",
    "decide",
    "conclude",
    "agent",
    "caption_object",
    "caption_map",
    "caption_scene",
    "caption",
    "qa",
    "narration",
    "text",
    "drivelm",
    "omnidrive",
    "omnidrive_plan",
)
# Kinds that are asked like another one where a dialect has no request of their own.
ASKED_LIKE = {"drivelm": "caption", "omnidrive": "caption", "omnidrive_plan": "caption"}
EGO_FIELDS = ("vx", "vy", "v_yaw", "ax", "ay", "can_x", "can_y", "speed", "steering")
FIELDS = frozenset((*EGO_FIELDS, "history", "command", "question"))
# What a unit is of EgoState's: m/s for speeds; accelerations come in metres a step of 0.5 s and
# step, the difference of two displacements.
SPEED_UNITS = {"m/s": 1.0, "m/(0.5 s)": 0.5}
ACCELERATION_UNITS = {"m/(0.5 s)^2": 1.0, "m/s^2": 4.0}
UNITS = {
    "velocity": SPEED_UNITS,
    "heading_speed": SPEED_UNITS,
    "acceleration": ACCELERATION_UNITS,
}
Labels = Literal["answer_only", "reference"]
LABELS: tuple[Labels, ...] = ("answer_only", "reference")


@dataclass(frozen=True)
class TrainingStream:
    """How a conversation becomes the ids and labels that are trained on.

    Args:
        labels: what loss is due on. "answer_only": an answer's text and its end. "reference", as
            in the released code: an assistant's whole message, head and all, and elsewhere every
            newline, ChatML mark and tag that is one token.
        doubled_system_head: a quirk of the released code: the system text comes with its ChatML
            head and is given another one.
        default_system: a quirk of the released code: it puts every message but the system's
            through the chat template alone, which sets this system message before each; "": none.
    """

    labels: Labels = "answer_only"
    doubled_system_head: bool = False
    default_system: str = ""

    def __post_init__(self) -> None:
        """Check the labels.

        Raises:
            UserError: there are no such labels.
        """
        if self.labels not in LABELS:
            raise UserError(f"labels are {' or '.join(LABELS)}, not {self.labels!r}")


PLAIN = TrainingStream()


@dataclass(frozen=True)
class Wording:
    """The checked content of a dialect file."""

    system: str
    lines: Mapping[str, str]
    requests: Mapping[str, tuple[str, ...]]
    caption_object_answer: str
    commands: tuple[str, ...]  # by COMMANDS
    scale: Mapping[str, float]  # of velocity, heading_speed, acceleration, from EgoState's units
    signed_zero: bool  # a number that rounds to zero from below is written -0.00
    plan: PlanForm  # how plans and futures are written; the history of a plan of motion is motion
    training: TrainingStream
    content: Mapping[str, Any]  # of the file, as it was read

    @property
    def sha256(self) -> str:
        """Identity of the content; comments and the order of entries do not count."""
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def fields_of(line: str) -> frozenset[str]:
    """Names in the braces of a line.

    Raises:
        ValueError: the braces are unbalanced.
    """
    return frozenset(name for _, name, _, _ in string.Formatter().parse(line) if name is not None)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; of two entries of one name it does not drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = ""
            if not isinstance(key, yaml.ScalarNode):
                problem = "a list or mapping is no name of an entry"
            elif key.value in seen:
                problem = f"{key.value!r} stands there twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def shipped_dialects() -> list[str]:
    """Names of the dialects that lie beside this file."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


@lru_cache
def read_wording(name: str) -> Wording:
    """Read and check a dialect.

    Args:
        name: of a shipped one, or the path of a file.

    Raises:
        UserError: there is no such dialect, or its file is malformed.
    """
    shipped = Path(__file__).parent / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        known = ", ".join(shipped_dialects())
        raise UserError(f"dialect {name!r} is neither a file nor one of {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"dialect {path} is not YAML: {' '.join(str(error).split())}") from error
    return checked_wording(content, str(path))


def write_dialect(content: Mapping[str, Any], path: Path) -> None:
    """Write a dialect's content as a file that can be named as a dialect.

    Raises:
        UserError: the content is no dialect.
    """
    checked_wording(content, str(path))
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=1 << 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


ENTRIES = {
    "system": str,
    "lines": dict,
    "requests": dict,
    "answers": dict,
    "commands": list,
    "units": dict,
    "signed_zero": bool,
    "plan": dict,
    "training": dict,
}


def checked_wording(content: Any, where: str) -> Wording:
    """Wording from a file's content; every name in it must mean something.

    Args:
        content: of the file.
        where: what it is called in messages.

    Raises:
        UserError: naming the entry that is missing, unknown or malformed.
    """
    if not isinstance(content, Mapping) or set(content) != set(ENTRIES):
        raise UserError(f"dialect {where} must hold the entries {', '.join(ENTRIES)} and no others")
    for key, expected in ENTRIES.items():
        if not isinstance(content[key], expected):
            raise UserError(f"dialect {where}: {key} must be a {expected.__name__}")
    _check_texts(content, where)
    lines = content["lines"]
    for name, line in lines.items():
        if not isinstance(name, str):
            raise UserError(f"dialect {where}: lines has a name that is no text, {name!r}")
        unknown = _line_fields(where, name, line) - FIELDS
        if unknown:
            raise UserError(f"dialect {where}: line {name!r} has unknown {{{min(unknown)}}}")
    if set(content["answers"]) != {"caption_object"}:
        raise UserError(f"dialect {where}: answers must be caption_object and no others")
    answer = content["answers"]["caption_object"]
    if _line_fields(where, "caption_object", answer) != {"caption", "x", "y"}:
        raise UserError(f"dialect {where}: answer caption_object must tell caption, x and y")
    commands = content["commands"]
    if len(commands) != len(COMMANDS) or not all(isinstance(text, str) for text in commands):
        raise UserError(f"dialect {where}: commands must be {len(COMMANDS)} texts")
    if content["plan"].get("values") == "tokens":
        raise UserError(
            f"dialect {where}: plans of a dialect are points, offsets or changes; action tokens "
            "are chosen by stages.planning.actions=tokens"
        )
    return Wording(
        system=content["system"],
        lines=lines,
        requests=_requests(content["requests"], lines, where),
        caption_object_answer=answer,
        commands=tuple(commands),
        scale=_scales(content["units"], where),
        signed_zero=content["signed_zero"],
        plan=replace(
            _entry(PlanForm, content["plan"], {"values": str, "decimals": int}, "plan", where),
            signed_zero=content["signed_zero"],
        ),
        training=_entry(
            TrainingStream,
            content["training"],
            {"labels": str, "doubled_system_head": bool, "default_system": str},
            "training",
            where,
        ),
        content=content,
    )


def _requests(
    requests: Mapping[str, Any], lines: Mapping[str, str], where: str
) -> dict[str, tuple[str, ...]]:
    if "plan" not in requests or set(requests) - set(KINDS):
        raise UserError(f"dialect {where}: requests must be plan and others of {', '.join(KINDS)}")
    for kind, names in requests.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"dialect {where}: request {kind!r} must be a list of names of lines")
        for name in names:
            if name not in lines:
                raise UserError(f"dialect {where}: request {kind!r} uses unknown line {name!r}")
    return {kind: tuple(names) for kind, names in requests.items()}


def _scales(units: Mapping[str, Any], where: str) -> dict[str, float]:
    if set(units) != set(UNITS):
        raise UserError(f"dialect {where}: units must be those of {', '.join(UNITS)}")
    for name, unit in units.items():
        if not isinstance(unit, str) or unit not in UNITS[name]:
            known = " or ".join(UNITS[name])
            raise UserError(f"dialect {where}: the unit of {name} is {known}, not {unit!r}")
    return {name: UNITS[name][unit] for name, unit in units.items()}


def _entry(
    build: Callable[..., Any],
    content: dict[str, Any],
    types: dict[str, type],
    name: str,
    where: str,
) -> Any:
    """A dataclass from an entry that must hold exactly its fields."""
    fits = set(content) == set(types) and all(type(content[k]) is t for k, t in types.items())
    if not fits:
        told = ", ".join(f"{key} ({kind.__name__})" for key, kind in types.items())
        raise UserError(f"dialect {where}: {name} must tell {told}")
    try:
        return build(**content)
    except UserError as error:
        raise UserError(f"dialect {where}: {error}") from error


def _line_fields(where: str, name: str, line: Any) -> frozenset[str]:
    if not isinstance(line, str):
        raise UserError(f"dialect {where}: {name!r} must be a text")
    try:
        found = fields_of(line)
    except ValueError as error:
        raise UserError(f"dialect {where}: {name!r} has unbalanced braces") from error
    # What is filled in is text already: there is nothing to format.
    for _, field, form, conversion in string.Formatter().parse(line):
        if form or conversion:
            more = f"!{conversion}" if conversion else f":{form}"
            raise UserError(
                f"dialect {where}: {name!r} must hold bare names in braces, not {{{field}{more}}}"
            )
    return found


def _check_texts(content: Mapping[str, Any], where: str) -> None:
    """Refuse what could not be written to a file again, such as dates and half a character.

    Raises:
        UserError: there is such a thing.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"dialect {where}: a text holds half a character") from error
    except TypeError as error:
        raise UserError(
            f"dialect {where} holds what is no text, number or list: {error}"
        ) from error
