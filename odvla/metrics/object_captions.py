"""TOD3Cap's caption score of detected objects: m@kIoU, quirks included.

A predicted box takes the caption of the annotated box of the same sample whose SIZE is most like
its own: where the boxes are plays no part. Pairs count whose size-IoU exceeds k; scores of the kept
pairs are multiplied by the share of predictions that were kept. Boxes that nobody predicted cost
nothing. That is what the published code computes, and what its numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odvla.metrics.captions import score_captions

THRESHOLDS = (0.25, 0.5)
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass(frozen=True)
class ObjectCaption:
    """A box's size (width, length, height in metres) and what is said about it."""

    sample_token: str
    size: tuple[float, float, float]
    caption: str


@dataclass(frozen=True)
class ObjectCaptionScores:
    """Scores times 100 and times kept / total, by name of the metric."""

    threshold: float
    kept: int
    total: int
    scores: Mapping[str, float | None]


def size_iou(sizes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of boxes [n, 3] and [m, 3] laid over each other, centres and axes alike: [n, m]."""
    common = np.minimum(sizes[:, None], others[None]).prod(-1)
    return common / (sizes.prod(-1)[:, None] + others.prod(-1)[None] - common)


def score_object_captions(
    predicted: Sequence[ObjectCaption], annotated: Sequence[ObjectCaption], threshold: float
) -> ObjectCaptionScores:
    """TOD3Cap's scores at one threshold.

    Predictions in a sample without any annotated box are not kept, but count in the total.

    Raises:
        ValueError: nothing was predicted.
    """
    if not predicted:
        raise ValueError("score_object_captions needs at least one prediction, got none")
    by_sample: dict[str, list[ObjectCaption]] = {}
    for box in annotated:
        by_sample.setdefault(box.sample_token, []).append(box)
    pairs = []
    for box in predicted:
        there = by_sample.get(box.sample_token, [])
        if there:
            sizes = np.array([other.size for other in there], float)
            overlap = size_iou(np.array([box.size], float), sizes)[0]
            if overlap.max() > threshold:
                pairs.append((box.caption, there[int(overlap.argmax())].caption))
    if not pairs:
        return ObjectCaptionScores(threshold, 0, len(predicted), dict.fromkeys(METRICS, 0.0))
    found = score_captions([said for said, _ in pairs], [true for _, true in pairs])
    share = len(pairs) / len(predicted)
    values = (*found.bleu, found.meteor, found.rouge_l, found.cider)
    scores = {
        name: None if value is None else value * share
        for name, value in zip(METRICS, values, strict=True)
    }
    return ObjectCaptionScores(threshold, len(pairs), len(predicted), scores)
