"""The dialect of the released OpenDriveVLA weights, made of texts that are taken from elsewhere.

The texts are the authors' and not ours to pass on: whoever has a checkout of their code has them.
Here stand the SHA-256 of those that the released weights were trained with, and the layout around
them: which number goes where, in which unit. `released_dialect` makes a dialect file's content.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from odvla.errors import UserError
from odvla.language.dialect_file import EGO_FIELDS, checked_wording
from odvla.types import COMMANDS, HISTORY

# Of the texts that the released code uses, less ChatML's marks.
SYSTEM_SHA256 = "6454913ec3262002434036a9e37ccdb741c75baad8dea3387e7b5011562c7c79"
PLAN_REQUEST_SHA256 = "631adcf60c651e04c2a8f2f65edc0958a8232f494cc9185fb2057cc8c004fe49"
SYSTEM_HEAD = "<|im_start|>system\n"
_NUMBER = r"-?\d+\.\d\d"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
# The order that a request tells its values in.
_HISTORY_HOLES = ",".join(["({},{})"] * HISTORY)
_HOLES = (*EGO_FIELDS, "history", "command")


def text_sha256(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def request_of_example(example: str) -> str:
    """A plan request as a template, from one that is filled in.

    Args:
        example: a user's message of the released code: nine numbers of the ego state, four points
            of history, a command, each number with two decimals.

    Raises:
        UserError: the numbers or the command are not there.
    """
    history = re.compile(rf"{_POINT}(?:,{_POINT}){{{HISTORY - 1}}}").search(example)
    if history is None:
        raise UserError(f"the example of a request tells no {HISTORY} points of history")
    before, after = example[: history.start()], example[history.end() :]
    names = iter(EGO_FIELDS)
    found = len(re.findall(_NUMBER, before))
    if found != len(EGO_FIELDS):
        raise UserError(f"the example of a request tells {found} numbers, not {len(EGO_FIELDS)}")
    before = re.sub(_NUMBER, lambda _: f"{{{next(names)}}}", _escaped(before))
    told = [command for command in COMMANDS if command in after]
    if len(told) != 1:
        raise UserError(f"the example of a request tells none of {', '.join(COMMANDS)}")
    return f"{before}{{history}}{_escaped(after).replace(told[0], '{command}')}"


def request_of_source(source: str, where: str) -> str:
    """The plan request as a template, from the source of the program that words it.

    The program is parsed, never run: the f-strings and texts that stand one after the other in one
    of its functions are joined, and the run of them that is the known request is taken.

    Args:
        source: Python.
        where: what it is called in messages.

    Raises:
        UserError: it is not Python, or its texts are not the known request.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{where} is not Python: {error}") from error
    for block in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
        pieces = list(_texts(block))
        for first in range(len(pieces)):
            joined = ""
            for piece in pieces[first:]:
                joined += piece
                template = _named(joined)
                if template is not None and text_sha256(template) == PLAN_REQUEST_SHA256:
                    return template
    raise UserError(f"{where} does not hold the wording of plans that the released weights know")


def _texts(block: ast.AST) -> Iterator[str]:
    """Texts of a block in the order of the source; every inserted value is a {}."""
    for node in ast.iter_child_nodes(block):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
                else "{}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            yield from _texts(node)


def _named(text: str) -> str | None:
    """A text with as many holes as a request has, with their names; None: it has others."""
    text = text.replace(_HISTORY_HOLES, "{}")
    parts = text.split("{}")
    if len(parts) != len(_HOLES) + 1:
        return None
    holes = [f"{{{name}}}" for name in _HOLES]
    return "".join(
        part + hole for part, hole in zip(map(_escaped, parts), [*holes, ""], strict=True)
    )


def released_dialect(
    system: str,
    plan_request: str,
    *,
    default_system: str = "",
    requests: Mapping[str, str] | None = None,
    known_only: bool = True,
) -> dict[str, Any]:
    """Content of the released weights' dialect file.

    Its plans are positions with two decimals (points 1 to 6 of the cached future), its history the
    points 0 to 3 of the cached past; speeds are per half second and accelerations differences of
    displacements, and a number that rounds to zero from below is -0.00. The released training
    stream heads the system text twice and takes loss on marks and newlines everywhere.

    Args:
        system: the system text; its ChatML head may stand before it.
        plan_request: the user's message as a template (`request_of_example`, `request_of_source`).
        default_system: the system message that the chat template of the tokenizer puts before a
            message without one (`default_system_of`).
        requests: templates for further kinds of conversation, whose wording only the paper has.
            Questions that are not among them follow the lines before the command.
        known_only: refuse texts other than those that the released weights were trained with.

    Raises:
        UserError: a text is not the known one, or a template has a name that means nothing.
    """
    system = system.removeprefix(SYSTEM_HEAD)
    if known_only:
        for what, text, known in (
            ("system text", system, SYSTEM_SHA256),
            ("request for plans", plan_request, PLAN_REQUEST_SHA256),
        ):
            if text_sha256(text) != known:
                raise UserError(
                    f"the {what} is not the one that the released weights were trained with (its "
                    f"SHA-256 is {text_sha256(text)[:12]}..., known is {known[:12]}...)"
                )
    told = plan_request.split("\n")
    names = [f"plan_{number}" for number in range(1, len(told) + 1)]
    lines = dict(zip(names, told, strict=True)) | {"question": "{question}"}
    context = [name for name in names if not _follows_command(name, lines, names)]
    chosen = {"plan": names}
    chosen |= {kind: [*context, "question"] for kind in ("caption", "qa", "narration")}
    chosen["text"] = ["question"]
    for kind, text in (requests or {}).items():
        parts = {f"{kind}_{n}": line for n, line in enumerate(text.split("\n"), start=1)}
        lines |= parts
        chosen[kind] = list(parts)
    content = {
        "system": system,
        "lines": lines,
        "requests": chosen,
        "answers": {"caption_object": "{caption} ({x},{y})"},
        "commands": list(COMMANDS),
        "units": {
            "velocity": "m/(0.5 s)",
            "heading_speed": "m/(0.5 s)",
            "acceleration": "m/(0.5 s)^2",
        },
        "signed_zero": True,
        "plan": {"values": "points", "decimals": 2},
        "training": {
            "labels": "reference",
            "doubled_system_head": True,
            "default_system": default_system,
        },
    }
    checked_wording(content, "of the released weights")
    return content


def default_system_of(template_output: str) -> str:
    """The system message that a chat template adds by itself.

    Args:
        template_output: the template's text of a lone user's message.

    Returns:
        "" where it adds none.
    """
    if not template_output.startswith(SYSTEM_HEAD):
        return ""
    return template_output.removeprefix(SYSTEM_HEAD).split("<|im_end|>", 1)[0]


def _follows_command(name: str, lines: Mapping[str, str], names: list[str]) -> bool:
    place = [number for number, other in enumerate(names) if "{command}" in lines[other]]
    return bool(place) and names.index(name) >= place[0]


def _escaped(text: str) -> str:
    """A literal text as a template."""
    return text.replace("{", "{{").replace("}", "}}")
