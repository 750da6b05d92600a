"""Geometry against closed forms and matrices built another way."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odvla import geometry
from odvla.types import BevGrid

GRID = BevGrid(-32.0, -24.0, 2.0, 24, 32)


def random_pose(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    pose = np.eye(4)
    pose[:3, :3] = rotation * np.sign(np.linalg.det(rotation))
    pose[:3, 3] = rng.normal(size=3) * 1000
    return torch.from_numpy(pose)


@given(st.floats(-1e3, 1e3))
@settings(max_examples=50, deadline=None)
def test_wrapped_angles_are_the_same_angle_between_minus_and_plus_pi(angle: float) -> None:
    wrapped = geometry.wrap_angle(torch.tensor(angle, dtype=torch.float64)).item()
    assert -math.pi <= wrapped < math.pi
    assert math.isclose(math.cos(wrapped), math.cos(angle), abs_tol=1e-9)
    assert math.isclose(math.sin(wrapped), math.sin(angle), abs_tol=1e-9)


def test_rigid_inverse_is_the_matrix_inverse() -> None:
    poses = torch.stack([random_pose(seed) for seed in range(4)])
    torch.testing.assert_close(geometry.invert_rigid(poses), torch.linalg.inv(poses))


def test_relative_transform_keeps_millimetres_far_from_the_origin() -> None:
    first, second = random_pose(1), random_pose(2)
    first[:3, 3] += 1e5
    second[:3, 3] = first[:3, 3] + torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    point = torch.tensor([[3.0, -4.0, 1.0]])
    expected = torch.linalg.inv(second) @ first @ torch.tensor([3.0, -4.0, 1.0, 1.0]).double()
    moved = geometry.transform_points(geometry.relative_transform(first, second), point)
    torch.testing.assert_close(moved[0], expected[:3].float(), atol=1e-4, rtol=0)


def test_a_box_in_another_frame_is_the_same_box_in_the_world() -> None:
    yaw = torch.tensor([0.7])
    to_new = torch.eye(4)[None]
    to_new[:, :2, :2] = geometry.rotation_2d(yaw)
    to_new[:, :2, 3] = torch.tensor([3.0, -2.0])
    box = torch.tensor([[[5.0, 1.0, 0.3, 2.0, 4.0, 1.5, 3.0, 6.0, -1.0]]])
    moved = geometry.transform_boxes(to_new, box)[0, 0]
    c, s = math.cos(0.7), math.sin(0.7)
    expected = [c * 5 - s * 1 + 3, s * 5 + c * 1 - 2, 0.3, 2, 4, 1.5, 3.7 - 2 * math.pi]
    expected += [c * 6 + s * 1, s * 6 - c * 1]
    torch.testing.assert_close(moved, torch.tensor(expected))
    # and a box drives as far as its velocity says
    ahead = geometry.advance_boxes(box, torch.tensor([0.5]))[0, 0]
    torch.testing.assert_close(ahead[:2], torch.tensor([8.0, 0.5]))
    torch.testing.assert_close(ahead[2:], box[0, 0, 2:])


def test_projection_follows_the_pinhole_formula_and_rays_lead_back() -> None:
    lidar_to_cam = random_pose(5).float()
    lidar_to_cam[:3, 3] = torch.tensor([0.3, -1.2, 0.4])
    intrinsics = torch.tensor([[100.0, 1.5, 80.0], [0.0, 110.0, 45.0], [0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 3, generator=generator) * 10
    pixels, depth = geometry.project(points, lidar_to_cam, intrinsics)
    camera = geometry.invert_rigid(lidar_to_cam)[:3, 3]
    for point, pixel, z in zip(points, pixels, depth, strict=True):
        x_cam, y_cam, z_cam = (lidar_to_cam[:3, :3] @ point + lidar_to_cam[:3, 3]).tolist()
        assert math.isclose(z_cam, z.item(), abs_tol=1e-4)
        if z_cam < 0.5:
            continue
        u = (100 * x_cam + 1.5 * y_cam) / z_cam + 80
        v = 110 * y_cam / z_cam + 45
        torch.testing.assert_close(pixel, torch.tensor([u, v]), atol=1e-2, rtol=1e-4)
        ray = geometry.pixel_rays(intrinsics, lidar_to_cam, pixel[None])[0]
        towards = (point - camera) / (point - camera).norm()
        torch.testing.assert_close(ray, towards, atol=1e-4, rtol=0)


def test_cells_lie_where_the_grid_says() -> None:
    centres = geometry.cell_centres(GRID)
    assert centres.shape == (24, 32, 2)
    assert centres[5, 7].tolist() == [-32 + 7.5 * 2, -24 + 5.5 * 2]
    unit = geometry.to_bev_unit(GRID, centres)
    torch.testing.assert_close(unit[5, 7], torch.tensor([7.5 / 32, 5.5 / 24]))


def test_sinusoids_repeat_with_their_longest_period_and_tell_near_places_apart() -> None:
    values = torch.linspace(0, 60, 200)
    waves = geometry.sinusoids(values, 12, 64.0)
    assert waves.shape == (200, 12)
    torch.testing.assert_close(waves, geometry.sinusoids(values + 64, 12, 64.0), atol=1e-3, rtol=0)
    assert torch.cdist(waves, waves)[0, 1:].min() > 0.3


def test_a_box_code_leads_back_to_its_box() -> None:
    generator = torch.Generator().manual_seed(3)
    boxes = torch.randn(20, 9, generator=generator) * 5
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.1
    boxes[:, 6] = geometry.wrap_angle(boxes[:, 6])
    code = geometry.box_code(boxes)
    torch.testing.assert_close(geometry.boxes_of(code), boxes, atol=1e-4, rtol=1e-4)
    code[:, 6:8] *= 3  # only the direction of (sin, cos) counts
    torch.testing.assert_close(geometry.boxes_of(code), boxes, atol=1e-4, rtol=1e-4)
