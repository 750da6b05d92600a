"""TOD3Cap's published JSON, streamed record by record, each of them checked.

The file is 1.5 GB and several times that as Python objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from datamodules.language_files import text_field
from odvla.errors import UserError

CHUNK = 1 << 18  # characters read at a time; a record has a few thousand
LONGEST = 1 << 22  # characters a record may have
Row = tuple[str, str, str]  # annotation token, sample token, final caption
# What the data set's own code reads of a record. A relation may be "none", and an object off the
# map has no text about it.
TEXTS = (
    "instance_token",
    "attribute_caption.attribute_caption",
    "depth_caption.depth_caption",
    "localization_caption.localization_caption",
    "motion_caption.motion_caption",
)
MAYBE_EMPTY = ("map_caption.map_caption", "relation_caption")
NUMBERS = (
    "depth_caption.depth",
    "localization_caption.x_offset",
    "localization_caption.y_offset",
    "localization_caption.localization_theta",
)
# nuScenes has no velocity for an object that it annotates once: NaN.
MAYBE_NAN = ("motion_caption.x_vel", "motion_caption.y_vel", "motion_caption.bev_vel")


def stream_records(path: Path) -> Iterator[Row]:
    """Checked records of the JSON, one at a time.

    Raises:
        UserError: it is not a JSON object of such records; it names token and field.
    """
    for token, record in _members(path):
        caption = text_field(record, "final_caption", path, token)
        sample = text_field(record, "sample_token", path, token)
        check_parts(record, path, token)
        yield token, sample, caption


def check_parts(record: dict[str, Any], path: Path, token: str) -> None:
    """Check the parts a final caption was made of; nothing of them is kept.

    Raises:
        UserError: a part is missing or of another kind.
    """
    for field in TEXTS:
        text_field(record, field, path, token)
    for field in MAYBE_EMPTY:
        value = _value(record, field, path, token)
        if not isinstance(value, str):
            raise UserError(f"{path}, {token}: field {field!r} must be a text, not {value!r}")
    for field in (*NUMBERS, *MAYBE_NAN):
        value = _value(record, field, path, token)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) or field in MAYBE_NAN):
            raise UserError(f"{path}, {token}: field {field!r} must be a number, not {value!r}")


def _value(record: Any, field: str, path: Path, token: str) -> Any:
    for part in field.split("."):
        if not isinstance(record, dict) or part not in record:
            raise UserError(f"{path}, {token}: field {field!r} is missing")
        record = record[part]
    return record


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON object, with no more than a few records in memory.

    Python's decoder rather than a streaming parser: velocities may be NaN, which is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        text = _Text(path, file)
        if text.peek() != "{":
            raise UserError(f"{path} must hold an object keyed by token")
        text.take("{")
        while text.peek() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise text.broken(f"expected a token, not {key!r}")
            text.take(":")
            yield key, text.value()
            if text.peek() != "}":
                text.take(",")
        text.take("}")
        if text.peek():
            raise text.broken("something follows the object")


class _Text:
    """A JSON text read in chunks; what was taken is forgotten."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.left, self.at = "", 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        try:
            chunk = self.file.read(CHUNK)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        self.left, self.at = self.left[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.left) and self.left[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.left):
                return self.left[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise self.broken(f"expected {expected!r}, not {found or 'its end'!r}")
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.left, self.at)
                return value
            except json.JSONDecodeError as error:
                # The record may only be cut by the chunk's end; a broken one is not read on for.
                if len(self.left) - self.at > LONGEST or not self.more():
                    raise self.broken(error.msg) from error

    def broken(self, reason: str) -> UserError:
        near = self.left[self.at : self.at + 40]
        return UserError(f"language file {self.path} is not JSON near {near!r}: {reason}")
