"""What is drawn stands where the geometry says."""

import cv2
import numpy as np
from nuscenes.utils.data_classes import Box
from pyquaternion import Quaternion

from experiments.pictures import (
    ANNOTATED,
    PANEL_HEIGHT,
    PLAN,
    ScenePicture,
    box_corners,
    draw_above,
    draw_front,
    draw_scene,
    save_picture,
)

# A camera at LIDAR_TOP looking forward: x right stays x, y forward becomes depth, z up becomes -y.
FORWARD = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])


def picture(**changes) -> ScenePicture:
    values = {
        "front": np.full((90, 160, 3), 120, np.uint8),
        "front_intrinsics": np.array([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]]),
        "lidar_to_front": FORWARD,
    }
    return ScenePicture(**(values | changes))


def test_corners_equal_the_devkits():
    box = np.array([3.0, 8.0, -1.0, 1.9, 4.5, 1.6, 0.7, 0, 0])
    devkit = Box(box[:3], box[3:6], Quaternion(axis=[0, 0, 1], radians=0.7)).corners().T
    ours = box_corners(box)
    distance = np.linalg.norm(ours[:, None] - devkit[None], axis=-1)
    assert distance.min(1).max() < 1e-9
    assert len(set(distance.argmin(1))) == 8


def test_plan_is_drawn_on_the_road_ahead():
    plan = np.stack([np.zeros(6), np.arange(1, 7) * 4.0], -1)
    drawn = draw_front(picture(plan=plan))
    changed = np.argwhere((drawn != draw_front(picture())).any(-1))
    rows, columns = changed.min(0), changed.max(0)
    horizon = PANEL_HEIGHT / 2
    assert rows[0] > horizon  # below the horizon: on the road
    assert abs((changed[:, 1].min() + changed[:, 1].max()) / 2 - drawn.shape[1] / 2) < 3
    # The far end, 24 m ahead and 1.84 m down, projects to f * 1.84 / 24 below the horizon.
    assert abs(rows[0] - (horizon + 100 * PANEL_HEIGHT / 90 * 1.84 / 24)) < 4
    assert columns[0] == drawn.shape[0] - 1


def test_a_standing_plan_draws_nothing_into_the_camera():
    drawn = draw_front(picture(plan=np.zeros((6, 2))))
    np.testing.assert_array_equal(drawn, draw_front(picture()))


def test_above_puts_forward_up_and_right_right():
    box = np.array([[10.0, 20.0, 0, 2.0, 4.0, 1.5, np.pi / 2, 0, 0]])
    canvas = draw_above(picture(annotated_boxes=box))
    rows, columns = np.where((canvas == ANNOTATED).all(-1))
    assert rows.mean() < PANEL_HEIGHT / 2
    assert columns.mean() > canvas.shape[1] / 2
    drivable = np.zeros((32, 32), bool)
    drivable[-1, 0] = True  # front left corner
    assert tuple(draw_above(picture(drivable=drivable))[2, 2]) != tuple(draw_above(picture())[2, 2])


def test_picture_survives_the_disk(tmp_path):
    image = draw_scene(picture(plan=np.ones((6, 2)) * np.arange(1, 7)[:, None], title="sample"))
    assert (image == PLAN).all(-1).any()
    save_picture(image, tmp_path / "pictures" / "plan.png")
    again = cv2.cvtColor(cv2.imread(str(tmp_path / "pictures" / "plan.png")), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(again, image)
