"""Images, calibration and what is said of broken images."""

import math

import cv2
import numpy as np
import pytest
import torch
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points

from datamodules.ego_state import can_bus_vector
from datamodules.frames import FrameLoader, load_image
from datamodules.index_file import load_index
from datamodules.nuscenes import NuScenesDataConfig
from odvla.errors import UserError


def _check_projection(root, image_size):
    """Box centres through lidar_to_cam and intrinsics land where the devkit puts them."""
    devkit = NuScenes("v1.0-mini", str(root), verbose=False)
    data = NuScenesDataConfig(str(root), image_size=image_size, agent_range_m=200.0).build()
    compared = 0
    for record in data.index.frames[:2]:
        batch = data.frame(record.token)
        frame, boxes = batch.clip[0], batch.agents[0]
        rows = {
            int(track): box for track, box in zip(boxes.track_ids[0], boxes.boxes[0], strict=True)
        }
        for n, camera in enumerate(record.cameras):
            _, seen, intrinsic = devkit.get_sample_data(camera.sample_data_token)
            for box in seen:
                annotation = devkit.get("sample_annotation", box.token)
                track = devkit.getind("instance", annotation["instance_token"])
                if track not in rows:
                    continue
                expected = view_points(box.center[:, None], intrinsic, normalize=True)[:2, 0]
                expected *= np.array(image_size) / camera.size
                centre = torch.cat([rows[track][:3], torch.ones(1)])
                point = (
                    frame.cameras.intrinsics[0, n] @ (frame.cameras.lidar_to_cam[0, n] @ centre)[:3]
                )
                np.testing.assert_allclose(point[:2] / point[2], expected, atol=2e-2)
                compared += 1
    return compared


def test_projection_agrees_with_the_devkit(circle_root):
    assert _check_projection(circle_root, (32, 18)) >= 4


def test_projection_agrees_with_the_devkit_on_a_real_sample(shared):
    assert _check_projection(shared / "data" / "nuscenes-one-sample", (800, 450)) >= 40


def test_images_are_rgb_in_camera_order(circle_root):
    data = NuScenesDataConfig(str(circle_root), image_size=(32, 18)).build()
    frame = data.frame(data.index.frames[2].token).clip[0]
    assert frame.images.shape == (1, 6, 3, 18, 32)
    colour = frame.images[0].float().mean((0, 2, 3))
    np.testing.assert_allclose(colour, [200, 100, 20], atol=3)


def test_reduced_decoding_gives_the_same_picture(shared):
    index = load_index(shared / "data" / "nuscenes-one-sample", "v1.0-mini")
    camera = index.frames[0].cameras[0]
    path = index.root / camera.file
    whole = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    expected = cv2.resize(whole, (200, 112), interpolation=cv2.INTER_AREA).astype(int)
    difference = np.abs(load_image(path, camera.size, (200, 112)) - expected)
    assert difference.mean() < 3


def test_broken_images_are_named(circles, tmp_path):
    root = circles.write_root(tmp_path)
    path = root / "samples" / "CAM_BACK" / "scene-0061_0.jpg"
    data = NuScenesDataConfig(str(root), image_size=(32, 18)).build()
    token = data.index.frames[0].token
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"CAM_BACK/scene-0061_0\.jpg is"):
            data.frame(token)
    path.unlink()
    with pytest.raises(UserError, match=r"CAM_BACK/scene-0061_0\.jpg cannot be read"):
        data.frame(token)


def test_cache_keeps_what_fits(circle_root):
    index = load_index(circle_root, "v1.0-mini")
    loader = FrameLoader(index, (32, 18), cache_limit_gb=2.5 * 6 * 3 * 32 * 18 / 1e9)
    first = [loader.images(frame) for frame in index.frames[:4]]
    again = [loader.images(frame) for frame in index.frames[:4]]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False, False]


def test_can_bus_vector_holds_motion_since_the_last_frame(circle_root, circles):
    index = load_index(circle_root, "v1.0-mini")
    frame = index.frames[3]
    _, _, speed, rate = circles.SCENES["scene-0061"]
    (x0, y0, _), (x1, y1, yaw) = (circles.ego_pose("scene-0061", t) for t in (1.0, 1.5))
    vector = can_bus_vector(index, frame, scene_start=False)
    np.testing.assert_allclose(vector[:3], [x1 - x0, y1 - y0, 0], atol=1e-5)
    assert vector[16] == pytest.approx(yaw % math.tau)
    assert vector[17] == pytest.approx(math.degrees(0.5 * rate), abs=1e-4)
    assert vector[13] == pytest.approx(speed)
    start = can_bus_vector(index, frame, scene_start=True)
    assert not start[[0, 1, 2, 17]].any()
    np.testing.assert_array_equal(start[3:17], vector[3:17])
