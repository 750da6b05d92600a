"""Real lidar points and boxes land in the six images where the nuScenes devkit puts them."""

import numpy as np
import pytest
import torch

from datamodules.agents import agent_targets
from datamodules.nuscenes import NuScenesDataConfig, NuScenesDataModule
from odvla import geometry
from odvla.encoders.bevformer_layers import project_pillars
from odvla.encoders.resnet import padded_size
from odvla.types import CAMERAS

SIZE = (1600, 900)
NEAREST_M = 1.0  # what the devkit's rendering leaves out is nearer than this
EXACT = "donot_use_mm_for_euclid_dist"  # the default is off by half a pixel


@pytest.fixture(scope="module")
def root(shared):
    return shared / "data" / "nuscenes-one-sample"


@pytest.fixture(scope="module")
def devkit(root):
    from nuscenes.nuscenes import NuScenes

    return NuScenes("v1.0-mini", str(root), verbose=False)


@pytest.fixture(scope="module")
def data(root):
    return NuScenesDataModule(NuScenesDataConfig(str(root), image_size=SIZE))


@pytest.fixture(scope="module")
def record(data):
    return data.index.frames[0]


@pytest.fixture(scope="module")
def cameras(data, record):
    return data.loader.cameras(record)


def project(cameras, points):
    """Pixels [N, P, 2] and depths [N, P] of points [P, 3] in the lidar frame, as models do it."""
    points = torch.as_tensor(points, dtype=torch.float32)
    return geometry.project(points, cameras.lidar_to_cam[0], cameras.intrinsics[0])


@pytest.mark.parametrize("number", range(len(CAMERAS)), ids=CAMERAS)
def test_lidar_points_land_where_the_devkit_renders_them(devkit, record, cameras, number):
    from nuscenes.utils.data_classes import LidarPointCloud

    tokens = devkit.get("sample", record.token)["data"]
    expected, depths, _ = devkit.explorer.map_pointcloud_to_image(
        tokens["LIDAR_TOP"], tokens[CAMERAS[number]], min_dist=NEAREST_M
    )
    points = LidarPointCloud.from_file(devkit.get_sample_data_path(tokens["LIDAR_TOP"])).points
    pixels, depth = (part[number] for part in project(cameras, points[:3].T))
    # The devkit gives no indices: apply its documented rule. Points at the rim may differ.
    width, height = SIZE
    inside = (depth > NEAREST_M) & (pixels > 1).all(-1)
    inside &= (pixels[:, 0] < width - 1) & (pixels[:, 1] < height - 1)
    assert inside.sum() > 1000
    assert abs(int(inside.sum()) - expected.shape[1]) <= 2
    theirs = torch.as_tensor(expected[:2].T, dtype=torch.float32)
    # Both are in the order of the file, so that a nearest neighbour is the same point.
    nearest = torch.cdist(pixels[inside], theirs, compute_mode=EXACT).min(1)
    assert float(nearest.values.max()) < 0.1
    found = torch.as_tensor(depths, dtype=torch.float32)[nearest.indices]
    torch.testing.assert_close(found, depth[inside], atol=0.5, rtol=0.0)
    assert float((found - depth[inside]).abs().median()) < 1e-3


@pytest.mark.parametrize("number", range(len(CAMERAS)), ids=CAMERAS)
def test_box_corners_land_where_the_devkit_renders_them(devkit, record, cameras, number):
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    tokens = devkit.get("sample", record.token)["data"]
    _, in_lidar, _ = devkit.get_sample_data(tokens["LIDAR_TOP"], box_vis_level=BoxVisibility.NONE)
    _, in_camera, intrinsics = devkit.get_sample_data(
        tokens[CAMERAS[number]], box_vis_level=BoxVisibility.NONE
    )
    by_token = {box.token: box for box in in_lidar}
    seen = 0
    for box in in_camera:
        corners = box.corners()
        if corners[2].min() < NEAREST_M:
            continue
        expected = torch.as_tensor(view_points(corners, intrinsics, normalize=True)[:2].T)
        pixels, _ = project(cameras, by_token[box.token].corners().T)
        margin = np.array(SIZE)  # corners beyond the image's rim count up to its own size
        if not ((expected.numpy() > -margin) & (expected.numpy() < 2 * margin)).all():
            continue
        torch.testing.assert_close(pixels[number].double(), expected, atol=0.5, rtol=0.0)
        seen += 1
    assert seen >= 3


def test_our_own_boxes_have_their_centres_there_too(data, devkit, record, cameras):
    from nuscenes.utils.geometry_utils import BoxVisibility

    targets = agent_targets(data.index, record, (-60.0, 60.0, -60.0, 60.0))
    boxes = targets.boxes[0][targets.mask[0]]
    assert len(boxes) > 10
    tokens = devkit.get("sample", record.token)["data"]
    pixels, depth = project(cameras, boxes[:, :3])
    for number, name in enumerate(CAMERAS):
        _, in_camera, intrinsics = devkit.get_sample_data(
            tokens[name], box_vis_level=BoxVisibility.NONE
        )
        centres = np.stack([box.center for box in in_camera])
        front = centres[:, 2] > NEAREST_M
        homogeneous = centres[front] @ intrinsics.T
        theirs = torch.as_tensor(homogeneous[:, :2] / homogeneous[:, 2:], dtype=torch.float32)
        ours = pixels[number][depth[number] > NEAREST_M]
        assert float(torch.cdist(ours, theirs, compute_mode=EXACT).min(1).values.max()) < 0.5


def test_bevformers_pillars_use_the_same_places_of_the_padded_image(cameras):
    points = torch.rand(50, 4, 3) * 40 - 20
    height, width = padded_size(SIZE[1], SIZE[0])
    assert (height, width) == (928, 1600)
    seen = project_pillars(points, cameras, (height, width))
    pixels, _ = project(cameras, points.flatten(0, 1))
    places = seen.uv[0].flatten(1, 2) * torch.tensor([width, height])
    visible = seen.visible[0].flatten(1)
    assert int(visible.sum()) > 20
    torch.testing.assert_close(places[visible], pixels[visible], atol=0.05, rtol=0.0)
