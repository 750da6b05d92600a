"""Caption scores by pycocoevalcap: BLEU-1..4, ROUGE-L and CIDEr, all pure Python.

COCO's own pipeline tokenises with a Java program first. `tokenise` stands in for it (lower case,
punctuation dropped, words and numbers kept), so scores are comparable among odvla runs, and near
but not equal to those of papers that ran the Java tokenizer. METEOR and BERT-Score need Java or a
download and are not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"-?\d+(?:\.\d+)?|[a-z]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores times 100, as papers print them."""

    bleu: tuple[float, float, float, float]
    rouge_l: float
    cider: float
    captions: int


def tokenise(caption: str) -> str:
    """Words and numbers of a caption in lower case, joined by single spaces."""
    return " ".join(_WORD.findall(caption.lower()))


def score_captions(predicted: Sequence[str], references: Sequence[str]) -> CaptionScores:
    """Score captions against one reference each.

    CIDEr weighs words by how rare they are among the references, so it needs a corpus: with fewer
    than two captions it is 0 by construction.

    Raises:
        ValueError: when there is nothing to score, or the two lists differ in length.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if len(predicted) != len(references) or not predicted:
        raise ValueError(f"got {len(predicted)} captions and {len(references)} references to score")
    hypothesis = {i: [tokenise(text)] for i, text in enumerate(predicted)}
    reference = {i: [tokenise(text)] for i, text in enumerate(references)}
    scorer = BleuScorer(n=4)
    for i in hypothesis:
        scorer += (hypothesis[i][0], reference[i])
    bleu, _ = scorer.compute_score(option="closest", verbose=0)
    rouge, _ = Rouge().compute_score(reference, hypothesis)
    cider, _ = Cider().compute_score(reference, hypothesis)
    return CaptionScores(
        bleu=(100 * bleu[0], 100 * bleu[1], 100 * bleu[2], 100 * bleu[3]),
        rouge_l=100 * float(rouge),
        cider=100 * float(cider),
        captions=len(predicted),
    )
