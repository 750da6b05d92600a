"""Which part of a data set is trained on: the sampling strategies of LLaVA's data files.

"all", "first:N", "end:N" and "random:N" take conversations of a file in its order; N may be a
percentage, which is rounded up, as in the training script that OpenDriveVLA's builds on
(LLaVA-NeXT). There a random part is another one in each run; here the seed alone decides. More than
there are takes all.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from odvla.errors import UserError

_PART = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


def check_sampling(sampling: str, setting: str) -> None:
    """Refuse what is no strategy.

    Raises:
        UserError: naming the setting and its value.
    """
    found = _PART.fullmatch(sampling)
    if sampling == "all":
        return
    if found is None:
        raise UserError(
            f"{setting} must be all, first:N, end:N or random:N, where N is a number or a "
            f"percentage (first:10%), not {sampling!r}"
        )
    _, number, percent = found.groups()
    if not percent and "." in number:
        raise UserError(f"{setting} takes a whole number of conversations, not {sampling!r}")
    if Fraction(number) == 0 or (percent and Fraction(number) > 100):
        most = "at most 100%" if percent else "at least 1"
        raise UserError(f"{setting} must take more than nothing and {most}, not {sampling!r}")


def chosen(sampling: str, count: int, seed: int) -> NDArray[np.bool_]:
    """Which of `count` conversations in the order of their file belong to the part: [count].

    Args:
        sampling: see check_sampling.
        count: of all conversations.
        seed: of a random part.
    """
    found = _PART.fullmatch(sampling)
    if found is None:
        return np.ones(count, dtype=bool)
    kind, number, percent = found.groups()
    take = min(ceil(Fraction(number) * count / 100) if percent else int(number), count)
    mask = np.zeros(count, dtype=bool)
    if kind == "random":
        mask[np.random.default_rng([seed, count]).permutation(count)[:take]] = True
    elif kind == "first":
        mask[:take] = True
    else:
        mask[count - take :] = True
    return mask
