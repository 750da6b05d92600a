"""One line a check: what was found, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str  # a short name, the same in every run
    level: Level  # green: fine | yellow: works, with something missing | red: a run would fail
    found: str
    advice: str = ""  # what to do; green needs none


def green(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "green", found)


def yellow(check: str, found: str, advice: str) -> Finding:
    """A run works, but something is missing."""
    return Finding(check, "yellow", found, advice)


def red(check: str, found: str, advice: str) -> Finding:
    """A run would fail, or learn something wrong."""
    return Finding(check, "red", found, advice)


def summed(
    check: str, problems: Iterable[str], fine: str, advice: str, *, level: Level = "red"
) -> Finding:
    """All problems of one kind as one finding: their number, and the first in full.

    Args:
        check: its name.
        problems: a sentence each.
        fine: what to say where there are none.
        advice: what to do.
        level: how bad they are.
    """
    listed: Sequence[str] = list(problems)
    if not listed:
        return green(check, fine)
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    return Finding(check, level, f"{listed[0]}{more}", advice)
