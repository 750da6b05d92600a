"""Reading of JSON files of records: every record is checked, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from odvla.errors import UserError

# What Python's decoder says of a text that is not JSON, is nested too deeply for it, or has a
# number of thousands of digits (a ValueError, as is JSONDecodeError).
NOT_JSON = (ValueError, RecursionError)


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, is not JSON, or has an object with a key
            twice.
    """
    with _opened(path) as file:
        return _content(file.read(), path)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of every line of a file of JSON lines (ndjson); empty lines hold nothing.

    Raises:
        UserError: the file is missing or cannot be read, or a line is not JSON or has an object
            with a key twice.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _content(line, f"{path}, line {number}")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # a mark of the byte order is no content
            yield file
    except FileNotFoundError as error:
        raise UserError(f"file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"file {path} is not text in UTF-8: {error}") from error


def _content(text: str, place: Path | str) -> Any:
    """What a JSON text says."""
    try:
        return json.loads(text, object_pairs_hook=partial(_object, place))
    except UserError:
        raise
    except NOT_JSON as error:
        raise UserError(f"file {place} is not JSON: {error}") from error


def _object(place: Path | str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's own reading forgets all but the last value of a key."""
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"file {place}: an object has the key {doubled!r} twice")
    return members


def list_items(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON list, each with a name for messages.

    Raises:
        UserError: it is no list.
    """
    if not isinstance(value, list):
        raise UserError(f"{path} must hold a list of records, not {_kind(value)}")
    return ((f"record {number}", record) for number, record in enumerate(value))


def dict_items(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Key and record of a JSON object.

    Raises:
        UserError: it is no object.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold an object keyed by token, not {_kind(value)}")
    return iter(value.items())


def text_field(record: Any, field: str, path: Path, name: str) -> str:
    """A text of a record; `field` may be a path such as "motion_caption.motion_caption".

    Raises:
        UserError: the record is no object, or the field is missing, empty or no text in Unicode.
    """
    value = record
    for part in field.split("."):
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, {name}: expected an object with {field!r}, not {_kind(value)}"
            )
        if part not in value:
            raise UserError(f"{path}, {name}: field {field!r} is missing")
        value = value[part]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}, {name}: field {field!r} must be a text, not {value!r}")
    if not is_unicode(value):
        raise UserError(
            f"{path}, {name}: field {field!r} has half a character (a surrogate): {value!r}"
        )
    return value.strip()


def is_unicode(text: str) -> bool:
    """Whether a text can be written; JSON may escape half a character, which nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), str(value))
