"""IoU of predicted map elements per class, on the BEV grid they were predicted on.

A class's mask is the union of its elements: how a line is cut into instances plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from odvla.types import MAP_CLASSES, MapPredictions, MapTargets

CLASSES = (*MAP_CLASSES, "drivable")


def map_cells(predicted: MapPredictions, target: MapTargets) -> tuple[Tensor, Tensor]:
    """Cells in common and cells in either, of every sample and class: int64 [B, 4] twice.

    An element counts for the class that its query finds most likely, where that is not "no
    object"; a cell is covered where the mask's probability exceeds one half.
    """
    if predicted.lanes is not None:  # a panoptic head has merged its elements already
        masks = list(predicted.lanes[:, : len(MAP_CLASSES)].unbind(1))
    else:
        said = predicted.layer_logits[-1].argmax(-1)  # [B, Q]
        covered = predicted.layer_masks[-1] > 0  # [B, Q, H, W]
        masks = [
            ((said == number)[..., None, None] & covered).any(1)
            for number in range(len(MAP_CLASSES))
        ]
    masks.append(predicted.drivable > 0)
    true = [
        (((target.labels == number) & target.mask)[..., None, None] & target.masks).any(1)
        for number in range(len(MAP_CLASSES))
    ]
    true.append(target.drivable)
    ours, theirs = torch.stack(masks, dim=1), torch.stack(true, dim=1)
    return (ours & theirs).sum((2, 3)), (ours | theirs).sum((2, 3))


def map_iou(records: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, float | None]:
    """IoU of every class over all samples, and their mean.

    Args:
        records: of samples, "intersection" and "union" cells by class.

    Returns:
        By class, None where neither map nor prediction has it anywhere; "mean" over the rest.
    """
    total = torch.zeros(2, len(CLASSES), dtype=torch.int64)
    for record in records:
        total += torch.tensor([record["intersection"], record["union"]])
    found: dict[str, float | None] = {
        name: float(inside) / float(either) if either else None
        for name, inside, either in zip(CLASSES, total[0], total[1], strict=True)
    }
    known = [value for value in found.values() if value is not None]
    return {**found, "mean": sum(known) / len(known) if known else None}
