"""Boxes in the plane against closed forms and loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla.losses.boxes_2d import boxes_of_masks, generalized_iou

BOXES = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 5)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(BOXES, BOXES)
def test_it_is_counted_in_cells(a, b):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    one, two = cells(a), cells(b)
    around = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union, hull = len(one | two), len(cells(around))
    expected = len(one & two) / union - (hull - union) / hull
    ours = generalized_iou(torch.tensor(a).float(), torch.tensor(b).float())
    assert float(ours) == pytest.approx(expected, abs=1e-5)


def test_boxes_without_area_stay_finite():
    line, far = torch.tensor([1.0, 2.0, 5.0, 2.0]), torch.tensor([7.0, 2.0, 9.0, 2.0])
    assert generalized_iou(line, line).isfinite()
    assert generalized_iou(line, far).isfinite()


def test_boxes_of_masks_and_where_they_end():
    masks = torch.zeros(4, 5, 7, dtype=torch.bool)
    masks[0, 2, 1:4] = True  # a line along x
    masks[1, 4, 6] = True  # the last cell
    masks[2, 1, 5], masks[2, 3, 0] = True, True
    assert boxes_of_masks(masks).tolist() == [[1, 2, 4, 3], [6, 4, 7, 5], [0, 1, 6, 4], [0] * 4]
    uniad = boxes_of_masks(masks, far_edge=False)
    assert uniad.tolist() == [[1, 2, 3, 2], [6, 4, 6, 4], [0, 1, 5, 3], [0] * 4]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)
