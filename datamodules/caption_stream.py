"""TOD3Cap's published JSON, streamed record by record, each of them checked.

The file is 1.5 GB and several times that as Python objects. A stream knows the byte at which its
last record ends, and may begin at such a byte.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.language_files import NOT_JSON, is_unicode, text_field
from odvla.errors import UserError

CHUNK = 1 << 18  # bytes read at a time; a record has a few thousand
LONGEST = 1 << 22  # characters a record may have
LONGEST_PROBLEM = 200  # characters that are kept of what is wrong with a record
Row = tuple[str, str, str]  # annotation token, sample token, final caption
# What the data set's own code reads of a record. A relation may be "none" (or null), and an object
# off the map has no text about it.
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
# Their kind is told nowhere, and nuScenes has no velocity for an object that it annotates once.
OF_ANY_KIND = ("motion_caption.x_vel", "motion_caption.y_vel", "motion_caption.bev_vel")


@dataclass(frozen=True)
class BrokenRecord:
    """A record that does not fit."""

    token: str
    problem: str  # e.g. "field 'final_caption' is missing"


class CaptionStream:
    """Records of the JSON in their order, each read and checked when it is asked for.

    Args:
        path: the file.
        start: where to begin: 0, or the `offset` of another stream of the same file.

    Raises:
        UserError: on the way, where the file is not a JSON object; it names the place.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path, self.start = path, start
        self._text: _Text | None = None

    @property
    def offset(self) -> int:
        """The byte of the file that follows the last record."""
        return self.start if self._text is None else self._text.offset

    def __iter__(self) -> Iterator[Row | BrokenRecord]:
        """Annotation token, sample token and caption, or what is wrong with a record."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            self._text = _Text(self.path, file, self.start)
            for token, record in _members(self._text, begun=self.start > 0):
                yield _checked(record, self.path, token)


def _checked(record: Any, path: Path, token: str) -> Row | BrokenRecord:
    try:
        caption = text_field(record, "final_caption", path, token)
        sample = text_field(record, "sample_token", path, token)
        check_parts(record, path, token)
    except UserError as error:
        return BrokenRecord(token, str(error).removeprefix(f"{path}, {token}: ")[:LONGEST_PROBLEM])
    return token, sample, caption


def check_parts(record: dict[str, Any], path: Path, token: str) -> None:
    """Check the parts a final caption was made of; nothing of them is kept.

    Raises:
        UserError: a part is missing or of another kind.
    """
    for field in TEXTS:
        text_field(record, field, path, token)
    for field in MAYBE_EMPTY:
        value = _value(record, field, path, token)
        if not isinstance(value, str | None):
            raise UserError(f"{path}, {token}: field {field!r} must be a text, not {value!r}")
    for field in NUMBERS:
        value = _value(record, field, path, token)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise UserError(f"{path}, {token}: field {field!r} must be a number, not {value!r}")
    for field in OF_ANY_KIND:
        _value(record, field, path, token)


def _value(record: Any, field: str, path: Path, token: str) -> Any:
    for part in field.split("."):
        if not isinstance(record, dict) or part not in record:
            raise UserError(f"{path}, {token}: field {field!r} is missing")
        record = record[part]
    return record


def _members(text: _Text, *, begun: bool) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON object, with no more than a few records in memory.

    Python's decoder rather than a streaming parser: velocities may be NaN, which is not JSON.

    Args:
        text: what is left of the file.
        begun: it begins behind a value, not with the object.
    """
    if not begun:
        if text.peek() != "{":
            raise UserError(f"{text.path} must hold an object keyed by token")
        text.take("{")
    first = not begun
    while text.peek() != "}":
        if not first:
            text.take(",")
        first = False
        key = text.value()
        if not isinstance(key, str):
            raise text.broken(f"expected a token, not {key!r}")
        if not is_unicode(key):
            raise text.broken(f"the token {key!r} has half a character (a surrogate)")
        text.take(":")
        yield key, text.value()
    text.close()
    if text.peek():
        raise text.broken("something follows the object")


class _Text:
    """A JSON text read in chunks; what was taken is forgotten."""

    def __init__(self, path: Path, file: BinaryIO, start: int) -> None:
        self.path, self.file = path, file
        self.left, self.at = "", 0
        self.read, self.ended = start, False  # bytes before the next chunk, if there is one
        # A mark of the byte order at the start is no content.
        self.bytes = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
        self.decoder = json.JSONDecoder()
        self.closing: int | None = None  # the byte of the last bracket, once it was taken

    @property
    def offset(self) -> int:
        """The byte that follows the values that were taken."""
        if self.closing is not None:
            return self.closing
        cut_letter, _ = self.bytes.getstate()
        return self.read - len(self.left[self.at :].encode()) - len(cut_letter)

    def more(self) -> bool:
        chunk = self.file.read(CHUNK)
        self.read += len(chunk)
        self.ended = not chunk
        try:
            text = self.bytes.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        self.left, self.at = self.left[self.at :] + text, 0
        return not self.ended

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

    def close(self) -> None:
        """Take the last bracket; whoever goes on behind the last value finds it again."""
        self.peek()
        self.closing = self.offset
        self.take("}")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.left, self.at)
            except json.JSONDecodeError as error:
                # The record may only be cut by the chunk's end; a broken one is not read on for.
                if len(self.left) - self.at > LONGEST or not self.more():
                    raise self.broken(error.msg) from error
                continue
            except NOT_JSON as error:
                raise self.broken(str(error)) from error
            # A number that ends with the chunk may go on in the next one.
            if end < len(self.left) or isinstance(value, str | dict | list) or self.ended:
                self.at = end
                return value
            self.more()

    def broken(self, reason: str) -> UserError:
        near = self.left[self.at : self.at + 40]
        return UserError(f"language file {self.path} is not JSON near {near!r}: {reason}")
