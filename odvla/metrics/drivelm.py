"""DriveLM-nuScenes: accuracy, match, language under the graph rule, and what is missing of it all.

The rules are those of the challenge's challenge/evaluation.py (OpenDriveLab/DriveLM, 2024). Every
question carries tags that say how its answer is scored: 0 accuracy, 1 ChatGPT, 2 language, 3 match.
ChatGPT cannot be asked here, so that the final score cannot be had; what can is reported term by
term.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from odvla.errors import UserError
from odvla.metrics.captions import CaptionScores, score_captions

ACCURACY, CHATGPT, LANGUAGE, MATCH = TAGS = (0, 1, 2, 3)
NEAR_PX = 16.0  # L1 distance below which two points are the same object
EPSILON = 1e-8  # in the challenge's precision, recall and F1
WEIGHTS = {"chatgpt": 0.4, "language": 0.2, "match": 0.2, "accuracy": 0.2}
_DECIMAL = re.compile(r"\d+\.\d+")
Point = tuple[float, float]


@dataclass(frozen=True)
class DriveLMProtocol:
    """All choices behind DriveLM's numbers.

    Attributes:
        accuracy: how answers of tag 0 are compared.
        match_px: points closer than this (sum of |dx| and |dy|) are the same object.
        graph: whether a question counts only where the objects it names were found before.
        unanswered: what becomes of a question without an answer.
        chatgpt: whether answers of tag 1, and half of the match term, were judged by ChatGPT.
    """

    accuracy: str = "equal strings"
    match_px: float = NEAR_PX
    graph: bool = True
    unanswered: str = "left out and counted"
    chatgpt: str = "missing"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def sentence(self) -> str:
        """The card in words, to be printed below a table."""
        return (
            f"Accuracy: {self.accuracy}; match: F1 of points that lie less than "
            f"{self.match_px:.0f} pixels (|dx| + |dy|) apart; language: (mean BLEU-1..4 + ROUGE-L "
            "+ CIDEr / 10) / 3; a question counts only where all points that it names were matched "
            f"in the key-frame's first answer; unanswered questions are {self.unanswered}; the "
            "judgement of ChatGPT is missing: it makes 0.4 of the final score, and half of its "
            "match term."
        )


@dataclass(frozen=True)
class DriveLMAnswer:
    """One question of a key-frame; `answer` None: there is none."""

    question: str
    reference: str
    answer: str | None
    tags: tuple[int, ...]
    name: str = ""  # for messages


@dataclass(frozen=True)
class DriveLMScores:
    """Terms of the final score, each times 100; None: no question of its kind counted."""

    accuracy: float | None
    match_f1: float | None  # half of the match term; the other half is ChatGPT's
    language: float | None  # the term; `captions` has its parts
    captions: CaptionScores | None
    counted: dict[str, int]  # questions by term; chatgpt: those that it would judge
    out_of_graph: int  # questions about objects that the first answer did not find
    unanswered: int
    protocol: DriveLMProtocol = DriveLMProtocol()

    @property
    def known_part(self) -> float | None:
        """What the known terms add to the final score, of at most 0.5; None: one is missing."""
        if self.accuracy is None or self.match_f1 is None or self.language is None:
            return None
        return (
            WEIGHTS["accuracy"] * self.accuracy
            + WEIGHTS["language"] * self.language
            + WEIGHTS["match"] / 2 * self.match_f1
        ) / 100


def points_of(text: str) -> list[Point]:
    """Points that a text names: its decimal numbers, two by two; an odd last one is dropped."""
    numbers = [float(number) for number in _DECIMAL.findall(text)]
    return list(zip(numbers[0::2], numbers[1::2], strict=False))


def match_points(answer: str, reference: str) -> tuple[list[Point], float]:
    """Points of the reference that an answer found, and the F1 of its points (0..1).

    Each point of the answer takes, in its order, the nearest point that is left of the reference
    (the first of equally near ones), if that is nearer than NEAR_PX.
    """
    left = points_of(reference)
    wanted = len(left)
    said = points_of(answer)
    found: list[Point] = []
    for x, y in said:
        distances = [abs(x - u) + abs(y - v) for u, v in left]
        nearest = min(range(len(left)), key=distances.__getitem__, default=None)
        if nearest is not None and distances[nearest] < NEAR_PX:
            found.append(left.pop(nearest))
    precision = len(found) / (len(said) + EPSILON)
    recall = len(found) / (wanted + EPSILON)
    return found, 2 * precision * recall / (precision + recall + EPSILON)


def score_drivelm(frames: Iterable[Sequence[DriveLMAnswer]]) -> DriveLMScores:
    """Score answers.

    Args:
        frames: the questions of each key-frame, in the file's order: perception, prediction,
            planning, behavior.

    Raises:
        UserError: a question has no tag or an unknown one, or names half a point.
        ValueError: there is no question.
    """
    by_term: dict[int, list[DriveLMAnswer]] = {tag: [] for tag in TAGS}
    out_of_graph = unanswered = total = 0
    for questions in frames:
        graph: set[Point] = set()
        for number, asked in enumerate(questions):
            total += 1
            _check(asked, first=number == 0)
            unanswered += asked.answer is None
            if number == 0:
                graph = set(match_points(asked.answer or "", asked.reference)[0])
            elif not set(points_of(asked.question)) <= graph:
                out_of_graph += 1
                continue
            if asked.answer is not None:
                for tag in asked.tags:
                    by_term[tag].append(asked)
    if not total:
        raise ValueError("score_drivelm needs at least one question")
    captions = None
    if by_term[LANGUAGE]:
        captions = score_captions(
            [asked.answer or "" for asked in by_term[LANGUAGE]],
            [asked.reference for asked in by_term[LANGUAGE]],
            meteor=False,
        )
    return DriveLMScores(
        accuracy=_mean([asked.answer == asked.reference for asked in by_term[ACCURACY]]),
        match_f1=_mean(
            [match_points(asked.answer or "", asked.reference)[1] for asked in by_term[MATCH]]
        ),
        language=None if captions is None else language_term(captions),
        captions=captions,
        counted={
            "accuracy": len(by_term[ACCURACY]),
            "chatgpt": len(by_term[CHATGPT]),
            "language": len(by_term[LANGUAGE]),
            "match": len(by_term[MATCH]),
        },
        out_of_graph=out_of_graph,
        unanswered=unanswered,
    )


def language_term(captions: CaptionScores) -> float:
    """One number of BLEU, ROUGE-L and CIDEr, times 100."""
    return (sum(captions.bleu) / 4 + captions.rouge_l + captions.cider / 10) / 3


def _check(asked: DriveLMAnswer, *, first: bool) -> None:
    where = asked.name or f"question {asked.question!r}"
    if not asked.tags or set(asked.tags) - set(TAGS):
        raise UserError(
            f"{where}: its tags must be some of {', '.join(map(str, TAGS))}, which say how an "
            f"answer is scored, not {list(asked.tags)}"
        )
    # Texts whose points count; the challenge's program stops at half a point with a traceback.
    texts = {} if first else {"question": asked.question}
    if first or MATCH in asked.tags:
        texts["reference"] = asked.reference
    for what, text in texts.items():
        if len(_DECIMAL.findall(text)) % 2:
            raise UserError(f"{where}: its {what} names half a point: {text!r}")


def _mean(values: Sequence[float]) -> float | None:
    return 100.0 * sum(values) / len(values) if values else None
