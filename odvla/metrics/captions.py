"""Caption scores as the caption literature computes them: BLEU-1..4, METEOR, ROUGE-L, CIDEr.

The scorers are pycocoevalcap's own, on tokens of its own kind (ptb.py). METEOR is a Java program
inside that package: where there is no Java it is reported as unavailable, with the reason, and
never replaced by something of the same name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from odvla.metrics.ptb import tokenise, tokenise_all

__all__ = ["CaptionScores", "NuXScores", "score_captions", "score_nux", "tokenise"]
JAVA_SECONDS = 60  # that Java may take to say its version
_program: Any = None


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores times 100, as papers print them; `meteor` None: `meteor_missing` says why."""

    bleu: tuple[float, float, float, float]
    rouge_l: float
    cider: float
    captions: int
    meteor: float | None = None
    meteor_missing: str = ""


@dataclass(frozen=True)
class NuXScores:
    """nuX: both parts of an answer apart, as Hint-AD scores them, and as one text."""

    narration: CaptionScores
    reasoning: CaptionScores
    joined: CaptionScores
    undivided: int  # predictions in which no second sentence was found


def score_captions(
    predicted: Sequence[str], references: Sequence[str], *, meteor: bool = True
) -> CaptionScores:
    """Score captions against one reference each.

    CIDEr weighs words by how rare they are among the references, so it needs a corpus: with fewer
    than two captions it is 0 by construction.

    Args:
        predicted: captions.
        references: as many.
        meteor: with METEOR, where Java is there.

    Raises:
        ValueError: when there is nothing to score, or the two lists differ in length.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if len(predicted) != len(references) or not predicted:
        raise ValueError(f"got {len(predicted)} captions and {len(references)} references to score")
    hypothesis = {i: [text] for i, text in enumerate(tokenise_all(predicted))}
    reference = {i: [text] for i, text in enumerate(tokenise_all(references))}
    if not any(texts[0] for texts in reference.values()):
        # pycocoevalcap fails on a corpus without a word; there is nothing to agree with.
        return CaptionScores((0.0,) * 4, 0.0, 0.0, len(predicted), None, "references are empty")
    scorer = BleuScorer(n=4)
    for i in hypothesis:
        scorer += (hypothesis[i][0], reference[i])
    bleu, _ = scorer.compute_score(option="closest", verbose=0)
    rouge, _ = Rouge().compute_score(reference, hypothesis)
    cider, _ = Cider().compute_score(reference, hypothesis)
    missing = java_missing() if meteor else "not asked for"
    return CaptionScores(
        bleu=(100 * bleu[0], 100 * bleu[1], 100 * bleu[2], 100 * bleu[3]),
        rouge_l=100 * float(rouge),
        cider=100 * float(cider),
        captions=len(predicted),
        meteor=None if missing else 100 * _meteor(reference, hypothesis),
        meteor_missing=missing,
    )


def java_missing() -> str:
    """Why METEOR cannot be computed here; "" if it can."""
    java = shutil.which("java")
    if java is None:
        return "METEOR is a Java program, and there is no java on this machine"
    try:
        found = subprocess.run(
            [java, "-version"], capture_output=True, timeout=JAVA_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"METEOR is a Java program, and java does not start: {error}"
    return "" if found.returncode == 0 else "METEOR is a Java program, and java does not start"


def start_meteor() -> None:
    """Let METEOR's program load its tables, some ten seconds, while others are at work.

    The first score would wait for it. Nothing happens where there is no Java.
    """
    if not java_missing():
        _meteor_program()


def _meteor_program() -> Any:
    """One process for all calls."""
    from pycocoevalcap.meteor.meteor import Meteor

    global _program
    if _program is None:
        _program = Meteor()
    return _program


def _meteor(reference: dict[int, list[str]], hypothesis: dict[int, list[str]]) -> float:
    value, _ = _meteor_program().compute_score(reference, hypothesis)
    return float(value)


def split_nux(text: str) -> tuple[str, str]:
    """Narration and reasoning of an answer; the reasoning is "" where there is no second part.

    "Narration: ... Reasoning: ..." is divided at the label, anything else behind the first full
    stop, as Hint-AD does.
    """
    labelled = re.match(
        r"\s*(?:narration:)?\s*(.*?)\s*\breasoning:\s*(.*)", text, re.IGNORECASE | re.DOTALL
    )
    if labelled:
        return labelled[1].strip(), labelled[2].strip()
    first, stop, rest = re.sub(r"(?i)^\s*narration:\s*", "", text).partition(".")
    return (first + stop).strip(), rest.strip()


def score_nux(predicted: Sequence[str], references: Sequence[str]) -> NuXScores:
    """Score answers to nuX's question.

    Raises:
        ValueError: as `score_captions`.
    """
    said, driven = ([split_nux(text) for text in texts] for texts in (predicted, references))
    return NuXScores(
        narration=score_captions([s[0] for s in said], [d[0] for d in driven]),
        reasoning=score_captions([s[1] for s in said], [d[1] for d in driven]),
        joined=score_captions(
            [" ".join(s).strip() for s in said], [" ".join(d).strip() for d in driven]
        ),
        undivided=sum(not s[1] for s in said),
    )
