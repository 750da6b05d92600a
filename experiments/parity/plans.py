"""Case i: plans read from malformed texts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.parity.golden import Check, Golden
from odvla.language.waypoints import ParseFailure, reference_repair

# What a text that stops the reference is compared by: one number instead of six points.
EXCEPTIONS = ("IndexError", "ValueError", "TypeError", "KeyError", "ZeroDivisionError")


def retrieve_traj(golden: Golden, stem: str) -> Iterator[Check]:
    """Six points, or the name of the exception, of every text in the file."""
    for number, case in enumerate(golden.rows(stem)):
        read = reference_repair(case["input"])
        ours = (
            _exception(read.exception)
            if isinstance(read, ParseFailure)
            else torch.from_numpy(read.xy)
        )
        theirs = (
            torch.tensor(case["output"], dtype=torch.float64)
            if "output" in case
            else _exception(case["exception"])
        )
        yield Check(f"text {number}: {case['input'][:40]!r}", ours, theirs, "index")


def _exception(name: str) -> Tensor:
    """A number that stands for an exception."""
    if name not in EXCEPTIONS:
        raise ValueError(f"a recorded text stopped the reference with {name}, which is not known")
    return torch.tensor(EXCEPTIONS.index(name))
