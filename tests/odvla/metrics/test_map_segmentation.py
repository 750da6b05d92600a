"""Map IoU on cells that can be counted by hand."""

from dataclasses import replace

import pytest
import torch

from odvla.metrics.map_segmentation import map_cells, map_iou
from odvla.types import MapPredictions, MapTargets


@pytest.fixture
def target():
    """A divider along row 0, a boundary on two cells of row 1; all is drivable: 4 x 4 cells."""
    cells = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    cells[0, 0, 0] = True
    cells[0, 1, 1, :2] = True
    cells[0, 2] = True  # padding
    return MapTargets(
        masks=cells,
        labels=torch.tensor([[0, 2, 1]]),
        mask=torch.tensor([[True, True, False]]),
        drivable=torch.ones(1, 4, 4, dtype=torch.bool),
    )


@pytest.fixture
def predicted():
    """The divider is met, the boundary covers all of row 1, one query sees no object."""
    logits = torch.full((1, 3, 4), -5.0)
    for query, label in enumerate((0, 2, 3)):
        logits[0, query, label] = 5.0
    masks = torch.full((1, 3, 4, 4), -1.0)
    masks[0, 0, 0] = masks[0, 1, 1] = 1.0
    masks[0, 2] = 1.0
    return MapPredictions((logits,), (masks,), torch.full((1, 4, 4), -1.0))


def test_cells_are_counted_by_class(predicted, target):
    inside, either = map_cells(predicted, target)
    assert inside.tolist() == [[4, 0, 2, 0]]
    assert either.tolist() == [[4, 0, 4, 16]]
    records = [{"intersection": inside[0].tolist(), "union": either[0].tolist()}] * 2
    found = map_iou(records)
    assert found == {
        "divider": 1.0,
        "ped_crossing": None,
        "boundary": 0.5,
        "drivable": 0.0,
        "mean": 0.5,
    }
    assert map_iou([])["mean"] is None


def test_a_map_that_was_merged_already_is_taken_as_it_is(predicted, target):
    lanes = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    lanes[0, 1, 3] = True
    inside, either = map_cells(replace(predicted, lanes=lanes), target)
    assert inside.tolist() == [[0, 0, 0, 0]]
    assert either.tolist() == [[4, 4, 2, 16]]
