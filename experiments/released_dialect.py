"""The released weights' prompts, taken out of a checkout of the authors' code.

Their texts are not ours to pass on. Here the sources are parsed, never imported or run, and what is
found counts only if it is the known text to the letter (odvla/language/released.py has the
hashes).

    llava/conversation.py                                the system text
    drivevla/data_utils/build_llava_conversation.py      the user's message
    llava/constants.py                                   the tags that it names
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from odvla.errors import UserError
from odvla.language.released import (
    SYSTEM_HEAD,
    SYSTEM_SHA256,
    default_system_of,
    released_dialect,
    request_of_source,
    text_sha256,
)

log = logging.getLogger(__name__)
DIALECT = "dialect.yaml"
TEMPLATE = "qwen_planning_oriented_vlm"
CONVERSATION = "llava/conversation.py"
BUILDER = "drivevla/data_utils/build_llava_conversation.py"
CONSTANTS = "llava/constants.py"
_Pieces = list[ast.expr]  # of an f-string: texts and inserted values


def read_released_dialect(checkout: Path, weights: Path) -> dict[str, Any]:
    """Content of the released weights' dialect file.

    Args:
        checkout: of the authors' repository.
        weights: their folder; the chat template of a tokenizer in it tells which system message it
            adds by itself.

    Raises:
        UserError: a file is missing, or its text is not the one the weights were trained with.
    """
    return released_dialect(
        system_text(checkout), plan_request(checkout), default_system=_default_system(weights)
    )


def system_text(checkout: Path) -> str:
    """The system text of the conversation template that plans are asked with.

    Raises:
        UserError: the file is missing, or holds no text with the known SHA-256.
    """
    tree = _parsed(checkout, CONVERSATION)
    for text in _whole_texts(tree):
        bare = text.removeprefix(SYSTEM_HEAD)
        if text_sha256(bare) == SYSTEM_SHA256:
            return bare
    raise UserError(
        f"{checkout / CONVERSATION} does not hold the system text of {TEMPLATE} that the released "
        f"weights were trained with (SHA-256 {SYSTEM_SHA256[:12]}...)"
    )


def plan_request(checkout: Path) -> str:
    """The user's message that asks for a plan, as a template.

    Raises:
        UserError: a file is missing, or holds no message with the known SHA-256.
    """
    constants = _constants(_parsed(checkout, CONSTANTS))
    tree = _parsed(checkout, BUILDER)
    inlined = _Inline(constants, _messages(tree)).visit(tree)
    source = ast.unparse(ast.fix_missing_locations(inlined))
    return request_of_source(source, str(checkout / BUILDER))


def _default_system(weights: Path) -> str:
    folder = weights if weights.is_dir() else weights.parent
    if not (folder / "tokenizer_config.json").is_file():
        log.warning("%s has no tokenizer: its chat template is taken to add nothing", folder)
        return ""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        said = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        log.warning(
            "the chat template of %s cannot be read (%s): taken to add nothing", folder, line
        )
        return ""
    return default_system_of(str(said))


def _parsed(checkout: Path, name: str) -> ast.Module:
    path = checkout / name
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{checkout} is no checkout of OpenDriveVLA: it has no {name}") from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not Python: {error}") from error


def _whole_texts(tree: ast.AST) -> Iterator[str]:
    """Every text of a file, also one that is put together with +."""
    for node in ast.walk(tree):
        text = _literal(node)
        if text is not None:
            yield text


def _literal(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [_literal(part) for part in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_literal(node.left), _literal(node.right)]
    else:
        return None
    return None if None in parts else "".join(part for part in parts if part is not None)


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives names to."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            text, target = _literal(node.value), node.targets[0]
            if text is not None and isinstance(target, ast.Name):
                found[target.id] = text
    return found


def _messages(tree: ast.Module) -> dict[str, _Pieces]:
    """Messages that one function words and another one inserts: `a, b = words(record)`."""
    returned: dict[str, list[_Pieces | None]] = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            returned[function.name] = _returned(function)
    found: dict[str, _Pieces] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        called, target = node.value.func, node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = returned.get(called.id, []) if isinstance(called, ast.Name) else []
        if len(names) == len(values):
            for name, pieces in zip(names, values, strict=True):
                if isinstance(name, ast.Name) and pieces is not None:
                    found[name.id] = pieces
    return found


def _returned(function: ast.FunctionDef) -> list[_Pieces | None]:
    """What a function returns, where it is text that its statements put together in a row.

    A variable that is set in a branch or loop has no one text.
    """
    texts: dict[str, _Pieces] = {}
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pieces = _pieces(node.value)
            if pieces is None:
                texts.pop(node.targets[0].id, None)
            else:
                texts[node.targets[0].id] = list(pieces)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            pieces = _pieces(node.value)
            if node.target.id in texts and pieces is not None:
                texts[node.target.id] += pieces
            else:
                texts.pop(node.target.id, None)
        elif isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            items = value.elts if isinstance(value, ast.Tuple) else [value]
            return [texts.get(i.id) if isinstance(i, ast.Name) else _pieces(i) for i in items]
        else:
            for name in (n for n in ast.walk(node) if isinstance(n, ast.Name)):
                if isinstance(name.ctx, ast.Store):
                    texts.pop(name.id, None)
    return []


def _pieces(node: ast.expr) -> _Pieces | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node]
    if isinstance(node, ast.JoinedStr):
        return list(node.values)
    return None


class _Inline(ast.NodeTransformer):
    """Puts texts that have a name where f-strings insert that name."""

    def __init__(self, constants: Mapping[str, str], messages: Mapping[str, _Pieces]) -> None:
        self.constants, self.messages = constants, messages

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        """One f-string."""
        pieces: _Pieces = []
        for part in node.values:
            inserted = part.value if isinstance(part, ast.FormattedValue) else None
            name = inserted.id if isinstance(inserted, ast.Name) else ""
            if name in self.constants:
                pieces.append(ast.Constant(self.constants[name]))
            else:
                pieces += self.messages.get(name, [part])
        return ast.JoinedStr(pieces)
