"""NuScenes-QA accuracy: raw string equality, by question type and by number of hops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

TEMPLATE_TYPES = ("exist", "count", "object", "status", "comparison")


@dataclass(frozen=True)
class Answer:
    """One answered question with what the official evaluator groups by."""

    predicted: str
    reference: str
    template_type: str
    num_hop: int


@dataclass(frozen=True)
class QuestionAnsweringScores:
    """Accuracy in percent, over all questions and by type, hops, and both (key: exist_0)."""

    accuracy: float
    by_type: dict[str, float]
    by_hop: dict[int, float]
    by_type_hop: dict[str, float]
    questions: int


def score_answers(answers: Sequence[Answer]) -> QuestionAnsweringScores:
    """Accuracy by NuScenes-QA's rule: the raw strings must be equal, nothing is lowered."""
    if not answers:
        raise ValueError("score_answers needs at least one answer, got none")
    right: Counter[object] = Counter()
    asked: Counter[object] = Counter()
    for answer in answers:
        for bucket in (
            "all",
            answer.template_type,
            answer.num_hop,
            f"{answer.template_type}_{answer.num_hop}",
        ):
            asked[bucket] += 1
            right[bucket] += answer.predicted == answer.reference
    percent = {bucket: 100.0 * right[bucket] / asked[bucket] for bucket in asked}
    return QuestionAnsweringScores(
        accuracy=percent["all"],
        by_type={kind: percent[kind] for kind in TEMPLATE_TYPES if kind in percent},
        by_hop={hop: percent[hop] for hop in (0, 1) if hop in percent},
        by_type_hop={
            f"{kind}_{hop}": percent[f"{kind}_{hop}"]
            for kind in TEMPLATE_TYPES
            for hop in (0, 1)
            if f"{kind}_{hop}" in percent
        },
        questions=len(answers),
    )
