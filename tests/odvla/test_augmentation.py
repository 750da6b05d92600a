"""Augmentation against Python's own colour conversion, and what it must leave alone."""

import colorsys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odvla.augmentation import (
    HOLE,
    AugmentationConfig,
    augment,
    distort_colours,
    grid_holes,
    hsv_to_rgb,
    rgb_to_hsv,
)
from odvla.encoders.protocol import fake_frames

NOTHING = AugmentationConfig(0.0, (1.0, 1.0), (1.0, 1.0), 0.0, False, 0.0)


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_colours_convert_as_pythons_own(rgb):
    pixel = torch.tensor(rgb).float().view(1, 3, 1, 1)
    hue, saturation, value = rgb_to_hsv(pixel).flatten().tolist()
    expected = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    assert hue / 360 == pytest.approx(expected[0], abs=1e-4) or abs(hue / 360 - expected[0]) > 0.999
    assert saturation == pytest.approx(expected[1], abs=1e-4)
    assert value / 255 == pytest.approx(expected[2], abs=1e-4)
    torch.testing.assert_close(hsv_to_rgb(rgb_to_hsv(pixel)), pixel, atol=1e-2, rtol=0)


def test_without_strength_nothing_changes():
    clip = (fake_frames(2, (16, 8)), fake_frames(2, (16, 8), step=1))
    for before, after in zip(clip, augment(clip, NOTHING), strict=True):
        assert torch.equal(before.images, after.images)


def test_half_of_the_images_keep_their_brightness():
    torch.manual_seed(0)
    images = torch.full((400, 3, 2, 2), 100, dtype=torch.uint8)
    changed = distort_colours(images, replace(NOTHING, brightness=32.0))
    values = changed[:, 0, 0, 0].int()
    assert 0.4 < float((values == 100).float().mean()) < 0.6
    assert int(values.min()) >= 68
    assert int(values.max()) <= 132
    assert len(values.unique()) > 20


def test_holes_are_alike_in_a_clip_and_have_the_mean_colour():
    torch.manual_seed(1)
    clip = (fake_frames(2, (32, 24)), fake_frames(2, (32, 24), step=1))
    changed = augment(clip, replace(NOTHING, grid_mask=1.0))
    hole = torch.tensor(HOLE, dtype=torch.uint8).view(3, 1, 1)
    masks = [(a.images != b.images).any(2) for a, b in zip(clip, changed, strict=True)]
    where = masks[0][0, 0]
    for mask, after in zip(masks, changed, strict=True):
        for row in range(2):
            for camera in range(6):
                assert int((mask[row, camera] & ~where).sum()) == 0
                assert (after.images[row, camera][:, where] == hole[:, 0]).all()
    assert 0 < int(where.sum()) < where.numel()


@given(st.integers(2, 60), st.integers(2, 60), st.floats(0.1, 0.9))
def test_a_grid_repeats_in_both_directions(height, width, ratio):
    holes = grid_holes(height, width, ratio)
    rows, columns = holes.any(1), holes.any(0)
    assert torch.equal(holes, rows.unsqueeze(1) & columns)


@pytest.mark.parametrize(
    "changes", [{"grid_mask": 1.5}, {"grid_ratio": 1.0}, {"contrast": (2.0, 1.0)}]
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(changes))}"):
        AugmentationConfig(**changes)
