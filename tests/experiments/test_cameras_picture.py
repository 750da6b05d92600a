"""The sample picture, and that what it shows fits together on real data."""

import cv2
import numpy as np

from datamodules.nuscenes import NuScenesDataConfig
from experiments.cameras_picture import ABOVE, TILE, draw_sample, lidar_points, sample_view
from experiments.cli import main
from experiments.pictures import box_corners, project

REAL = "ca9a282c9e77460f8360f564131a8af5"


def test_real_boxes_hold_the_lidar_points_that_the_tables_count(shared):
    """Points of the sweep inside each annotated box, in LIDAR_TOP: the table's own numbers."""
    root = shared / "data" / "nuscenes-one-sample"
    data = NuScenesDataConfig(str(root), image_size=(160, 90)).build()
    view = sample_view(data, REAL)
    assert view.notes == ("no map expansion", "0 of 6 steps of the future known")
    assert len(view.boxes) == 68
    frame = data.index.frames[0]
    points = lidar_points(data.index, frame.lidar_file)
    counted = []
    for box in view.boxes:
        x, y, z, width, length, height, yaw = box[:7].astype(float)
        dx, dy = points[:, 0] - x, points[:, 1] - y
        along = dx * np.cos(yaw) + dy * np.sin(yaw)
        across = dy * np.cos(yaw) - dx * np.sin(yaw)
        inside = (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)
        counted.append(int((inside & (np.abs(points[:, 2] - z) <= height / 2)).sum()))
    # The tables count lidar and radar points; this sweep has no radar.
    stated = data.index.annotations.points
    assert np.corrcoef(counted, stated)[0, 1] > 0.99
    assert np.mean(np.abs(np.array(counted) - stated) <= 2) > 0.8


def test_real_boxes_with_points_are_in_some_camera(shared):
    root = shared / "data" / "nuscenes-one-sample"
    data = NuScenesDataConfig(str(root), image_size=(1600, 900)).build()
    view = sample_view(data, REAL)
    seen = np.zeros(len(view.boxes), bool)
    for name in view.images:
        for number, box in enumerate(view.boxes):
            corners = project(box_corners(box), view.intrinsics[name], view.lidar_to_cam[name])
            u, v, depth = corners.mean(0)
            seen[number] |= bool(depth > 0 and 0 < u < 1600 and 0 < v < 900)
    assert seen.mean() > 0.95  # the six cameras look all around


def test_the_verb_draws_a_town(town_root, tmp_path, capsys):
    out = tmp_path / "deep" / "sample.png"
    assert main(["data", "show", str(town_root), "--out", str(out)]) == 0
    picture = cv2.imread(str(out))
    assert picture.shape == (2 * TILE[1] + 34, 3 * TILE[0] + ABOVE, 3)
    data = NuScenesDataConfig(str(town_root), "v1.0-trainval", image_size=(96, 54)).build()
    view = sample_view(data, data.index.frames[60].token)
    drawn = draw_sample(view, "a title")
    assert view.drivable is not None
    assert {label for label, _ in view.elements} >= {0, 2}
    # The driven path lies on the road, and the map is drawn in its colours.
    above = drawn[34:, -ABOVE:]
    assert (above == (226, 228, 232)).all(-1).mean() > 0.02
    assert main(["data", "show", str(town_root), "--sample", "nope"]) == 2
