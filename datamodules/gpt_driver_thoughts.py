"""Which key-frame a line of GPT-Driver's fine-tuning file is about.

Lines carry no token. create_data.py writes them in the order of split.json's train list, so this
order is tried first, and every line is compared with the cached info of its token: state, history,
plan and goal must be the same to rounding. Where one line does not fit its token, the file has been
shuffled, cut or is of another list; each line then goes to the one key-frame of the cache that has
its numbers. A car that stands has the same numbers in several key-frames: such a line is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from datamodules.gpt_driver_lines import FineTuningLine, read_lines
from datamodules.joining import Join
from odvla.errors import UserError

NOT_CACHED = "the cached info lacks its token"
NOBODY = "no key-frame of the cached info has its numbers"
SEVERAL = "several key-frames of the cached info have its numbers"
DOUBLED = "an earlier line is about the same key-frame"
UNJOINED = frozenset({NOT_CACHED, NOBODY, SEVERAL, DOUBLED})
BY_ORDER = "in the order of split.json"
ROUNDED = 0.0051  # half a hundredth, and what float32 adds


@dataclass(frozen=True)
class Fingerprint:
    """What a line tells of the car."""

    numbers: NDArray[np.float64]  # [29] as FineTuningLine.numbers, not rounded
    command: int

    def fits(self, line: FineTuningLine) -> bool:
        """Whether a line is these numbers, rounded."""
        near = np.abs(self.numbers - line.numbers).max() <= ROUNDED
        return bool(near) and self.command == line.command


def join_lines(
    join: Join, listed: Sequence[str], cached: Mapping[str, Fingerprint]
) -> list[tuple[int, FineTuningLine]]:
    """Key-frame number and line of every joined line, in the order of the file.

    Args:
        join: with the file of lines.
        listed: the train list of split.json, in its order.
        cached: by sample token; of all splits, so that a line about another split is known as such.

    Raises:
        UserError: the file is missing or empty, a line does not fit its format, or a training line
            is about an evaluation scene.
    """
    lines = list(read_lines(join.file))
    if not lines:
        raise UserError(f"{join.file} holds no line")
    stray = _first_stray(lines, listed, cached)
    if stray is None:
        join.how = BY_ORDER
        found = _by_order(lines, listed, cached)
    else:
        join.how = f"by their numbers: {stray}"
        found = _by_numbers(lines, cached)
    taken: set[int] = set()
    pairs = []
    for line, token, reason in found:
        name = f"line {line.number}"
        if reason:
            join.records += 1
            join.leave_out(reason, name)
            continue
        frame = join.frame(token, name)
        if frame in taken:
            join.leave_out(DOUBLED, name)
        elif frame is not None:
            taken.add(frame)
            pairs.append((frame, line))
    return pairs


def _first_stray(
    lines: Sequence[FineTuningLine], listed: Sequence[str], cached: Mapping[str, Fingerprint]
) -> str | None:
    """Why the order of the list is not that of the lines; None: it is."""
    if len(lines) > len(listed):
        return f"the train list of split.json has only {len(listed)} tokens"
    known = 0
    for line, token in zip(lines, listed, strict=False):
        if token not in cached:
            continue
        if not cached[token].fits(line):
            return f"line {line.number} does not have those of its token in split.json"
        known += 1
    return None if known else "the cached info has no token of split.json's train list"


def _by_order(
    lines: Sequence[FineTuningLine], listed: Sequence[str], cached: Mapping[str, Fingerprint]
) -> Iterator[tuple[FineTuningLine, str, str]]:
    """Line, token, and why it has none."""
    for line, token in zip(lines, listed, strict=False):
        yield line, token, "" if token in cached else NOT_CACHED


def _by_numbers(
    lines: Sequence[FineTuningLine], cached: Mapping[str, Fingerprint]
) -> Iterator[tuple[FineTuningLine, str, str]]:
    """Line, token, and why it has none."""
    tokens = list(cached)
    tree = cKDTree(np.array([cached[token].numbers for token in tokens]))
    for line in lines:
        near = tree.query_ball_point(line.numbers, ROUNDED, p=np.inf)
        fitting = [tokens[n] for n in near if cached[tokens[n]].command == line.command]
        if len(fitting) == 1:
            yield line, fitting[0], ""
        else:
            yield line, "", SEVERAL if fitting else NOBODY
