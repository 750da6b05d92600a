"""Images: intrinsics follow the pixels; broken ones are named, counted and left out."""

import logging

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.frames import load_image
from datamodules.image_geometry import ImageGeometry
from datamodules.nuscenes import NuScenesDataConfig
from odvla.errors import UserError


@settings(max_examples=50)
@given(
    st.tuples(st.integers(20, 200), st.integers(20, 120)),
    st.integers(0, 15),
    st.integers(1, 33),
)
def test_sizes_and_pixels_follow(resized, crop, multiple):
    geometry = ImageGeometry(resized, crop, multiple)
    width, height = geometry.size
    assert width % multiple == height % multiple == 0
    assert 0 <= width - resized[0] < multiple
    assert 0 <= height - (resized[1] - crop) < multiple
    image = np.arange(resized[0] * resized[1] * 3).reshape(resized[1], resized[0], 3) % 251 + 1
    done = geometry.crop_and_pad(image.astype(np.uint8))
    assert done.shape == (height, width, 3)
    # A pixel of the resized image is found where the matrix says.
    u, v, _ = geometry.matrix(resized) @ [3, crop + 2, 1]
    np.testing.assert_array_equal(done[round(v), round(u)], image[crop + 2, 3])
    assert not done[resized[1] - crop :].any()
    assert not done[:, resized[0] :].any()


def test_a_point_in_space_stays_on_its_pixel(circles, tmp_path):
    """Draw a point into a file, load it resized, cropped and padded: it lies where it projects."""
    root = circles.write_root(tmp_path)
    sizes = {"image_size": (128, 90), "crop_top": 20, "pad_multiple": 32}
    data = NuScenesDataConfig(str(root), **sizes).build()
    frame = data.index.frames[0]
    plain = NuScenesDataConfig(str(root), image_size=(64, 36)).build().loader.cameras(frame)
    rng = np.random.default_rng(0)
    for number, camera in enumerate(frame.cameras):
        # A point in front of the camera, 2 m away and well inside the picture.
        matrix = plain.intrinsics[0, number].double().numpy()
        seen = np.array([*rng.uniform(0, 0.4, 2), 2.0])
        u, v, _ = matrix @ seen / seen[2]
        image = np.zeros((36, 64, 3), np.uint8)
        cv2.circle(image, (round(u), round(v)), 3, (255, 255, 255), -1)
        cv2.imwrite(str(root / camera.file), image)
    loaded = data.loader.load(frame, scene_start=True)
    assert loaded.images.shape == (1, 6, 3, 96, 128)  # 70 rows left, padded to 96
    rng = np.random.default_rng(0)
    for number in range(6):
        seen = np.array([*rng.uniform(0, 0.4, 2), 2.0])
        u, v, _ = loaded.cameras.intrinsics[0, number].double().numpy() @ seen / seen[2]
        bright = np.argwhere(loaded.images[0, number, 0].numpy() > 128)
        row, column = bright.mean(0)
        assert abs(column + 0.5 - u) < 2.5  # a pixel of the file is two here
        assert abs(row + 0.5 - v) < 3.0


@pytest.mark.parametrize("change", ["cut", "gone", "text"])
def test_a_broken_image_within_the_budget_is_left_out(circles, tmp_path, change, caplog):
    root = circles.write_root(tmp_path)
    path = root / "samples" / "CAM_BACK" / "scene-0103_1.jpg"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300] if change == "cut" else b"no image at all")
    data = NuScenesDataConfig(str(root), image_size=(16, 9), broken_images=1).build()
    broken = data.index.frame(circles.token("scene-0103", 1))
    with caplog.at_level(logging.WARNING):
        seen = {}
        for _ in range(2):
            for batch in data.test_dataloader():
                for row, token in enumerate(batch.clip[0].sample_tokens):
                    if not bool(batch.valid[row]) and token == broken.token:
                        assert not batch.clip[0].images[row, 3].any()  # CAM_BACK is black
                        assert batch.clip[0].images[row, 0].any()
                    elif batch.valid[row]:
                        seen[token] = seen.get(token, 0) + 1
    expected = {f.token for s in data.scenes("val") for f in data.index.frames[s.first : s.last]}
    assert set(seen) == expected - {broken.token}  # nothing stands in for it
    assert set(seen.values()) == {2}
    assert data.loader.broken.count == 1
    named = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(named) == 1
    assert str(path) in named[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_image_too_many_stops_the_run(circles, tmp_path, workers):
    root = circles.write_root(tmp_path)
    for number in range(3):
        (root / "samples" / "CAM_FRONT" / f"scene-0103_{number}.jpg").unlink()
    settings = {"image_size": (16, 9), "num_workers": workers, "eval_batch_size": 1}
    data = NuScenesDataConfig(str(root), broken_images=2, **settings).build()
    with pytest.raises(UserError, match=r"scene-0103_\d\.jpg.* broken image 3, .* allows 2"):
        list(data.test_dataloader())
    assert data.loader.broken.count >= 3
    with pytest.raises(UserError, match="cannot be read"):
        list(NuScenesDataConfig(str(root), **settings).build().test_dataloader())


@pytest.mark.parametrize(
    ("setting", "value"), [("crop_top", 9), ("crop_top", -1), ("pad_multiple", 0)]
)
def test_impossible_settings(setting, value):
    with pytest.raises(UserError, match=setting):
        NuScenesDataConfig(image_size=(16, 9), **{setting: value})
    with pytest.raises(UserError, match=r"data\.broken_images"):
        NuScenesDataConfig(broken_images=-1)


def test_a_file_of_another_size_is_named_when_asked_for(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((10, 20, 3), np.uint8))
    assert load_image(tmp_path / "a.png", (40, 20), (5, 5)).shape == (5, 5, 3)
    with pytest.raises(UserError, match="20x10, not 40x20"):
        load_image(tmp_path / "a.png", (40, 20), (40, 20), strict_size=True)
