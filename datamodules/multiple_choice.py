"""Questions with four options, one of them right, as the DriveLM challenge asks some of its own."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

LETTERS = ("A", "B", "C", "D")
INSTRUCTION = "Please select the correct answer from the following options:"


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its options behind it.

    Args:
        question: without options.
        options: four answers, each a sentence.
    """
    told = " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
    return f"{question} {INSTRUCTION} {told}"


def as_multiple_choice(
    question: str, answer: str, pool: Sequence[str], name: str
) -> tuple[str, str]:
    """A question and its answer with three wrong options, always the same for one name.

    Args:
        question: without options.
        answer: the right one.
        pool: all answers to such questions; four at least, in a fixed order.
        name: of the question; chooses options and their order.

    Returns:
        The question with four options, and the letter of the right one.
    """
    wrong = [other for other in pool if other != answer]
    rng = np.random.default_rng(crc32(name.encode()))
    drawn = [wrong[k] for k in rng.choice(len(wrong), len(LETTERS) - 1, replace=False)]
    options = [[*drawn, answer][k] for k in rng.permutation(len(LETTERS))]
    return with_options(question, options), LETTERS[options.index(answer)]
