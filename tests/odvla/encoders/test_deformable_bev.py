"""The BEV encoder: geometry against closed forms, and the contract of encoders."""

from dataclasses import replace

import pytest
import torch

from odvla import geometry
from odvla.encoders.check import check_encoder
from odvla.encoders.deformable_bev import (
    DeformableBEVConfig,
    SpatialAttention,
    TemporalAttention,
)
from odvla.encoders.image_backbone import ImageBackboneConfig
from odvla.encoders.pillars import places_before, tall_image, view_pillars
from odvla.encoders.protocol import fake_frames
from odvla.ops.deformable_attention import bilinear
from odvla.types import BevGrid

SMALL = DeformableBEVConfig(
    backbone=ImageBackboneConfig(widths=(8, 8, 16, 16), blocks=(0, 1, 0)),
    dim=16,
    cell_m=4.0,
    rows=16,
    columns=16,
    heads=2,
    strides=(4, 8),
    layers=2,
    bev_blocks=1,
)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, strides=(8, 16), can_bus=True, ray_embedding=False, layers=1),
        replace(SMALL, spatial_points=4, temporal_points=2, heads=4, bev_blocks=0, strides=(4,)),
    ],
)
def test_it_keeps_the_contract(config: DeformableBEVConfig) -> None:
    check_encoder(config)


def test_rows_and_columns_may_differ_and_images_have_any_size() -> None:
    config = replace(SMALL, rows=12, columns=20)
    features, state = config.build()(fake_frames(1, (100, 52)), None)
    assert features.bev is not None
    assert features.bev.shape == (1, 12, 20, 16)
    assert state.bev.shape == features.bev.shape
    assert [tuple(level.shape[3:]) for level in features.levels] == [(13, 25), (7, 13)]


def pose_at(x: float, y: float, yaw: float) -> torch.Tensor:
    """From the frame [1, 4, 4] of a car at (x, y), turned by yaw, to the world."""
    pose = torch.eye(4, dtype=torch.float64)[None]
    pose[:, :2, :2] = geometry.rotation_2d(torch.tensor([yaw], dtype=torch.float64))
    pose[:, :2, 3] = torch.tensor([x, y], dtype=torch.float64)
    return pose


def test_a_thing_in_the_world_stays_put_when_the_car_moves() -> None:
    """A smooth field of the world, seen before the motion and read back after it."""
    grid = BevGrid(-32.0, -32.0, 1.0, 64, 64)
    before, now = pose_at(1000.0, 500.0, 0.3), pose_at(1003.0, 504.0, 0.5)

    def field(pose: torch.Tensor) -> torch.Tensor:
        """exp(-distance^2) to a tree at (1010, 505), at every cell of a BEV with this pose."""
        centres = torch.nn.functional.pad(geometry.cell_centres(grid).flatten(0, 1), (0, 1))
        world = geometry.transform_points(pose[0], centres.double())[:, :2]
        tree = torch.tensor([1010.0, 505.0], dtype=torch.float64)
        return (-((world - tree) ** 2).sum(-1) / 50).exp().float()

    seen = field(before).view(1, 1, 64, 64)
    aligned = bilinear(seen, places_before(grid, now, before))[0, :, 0]
    expected = field(now)
    assert expected.max() > 0.9
    torch.testing.assert_close(aligned, expected, atol=0.02, rtol=0)
    assert (seen.flatten() - expected).abs().max() > 0.3  # the motion is not small


def test_temporal_attention_starts_by_reading_both_bevs_on_the_spot() -> None:
    config = replace(SMALL, temporal_points=1)
    attention = TemporalAttention(config)
    torch.nn.init.eye_(attention.value.weight.data.view(16, 16))
    torch.nn.init.eye_(attention.out.weight)
    torch.nn.init.zeros_(attention.value.bias)
    torch.nn.init.zeros_(attention.out.bias)
    now, before = torch.randn(2, 1, 16, 16, 16).unbind(0)
    pose, ahead = pose_at(0.0, 0.0, 0.0), pose_at(0.0, 4.0, 0.0)
    where = torch.stack(
        [places_before(config.grid, pose, pose), places_before(config.grid, ahead, pose)], 2
    )
    read = attention(now, torch.zeros(1, 16, 16, 16), before, where)
    # one cell of 4 m forward: what is in row i now was in row i + 1 before
    expected = (now[:, :, :-1] + before[:, :, 1:]) / 2
    torch.testing.assert_close(read[:, :, :-1], expected, atol=1e-4, rtol=1e-4)


def test_visible_pillars_are_those_the_formula_sees() -> None:
    frames = fake_frames(2, (160, 90))
    pillars = torch.tensor([[0.0, 10.0, -1.8], [20.0, 1.0, -1.0], [-5.0, -12.0, 0.0]])
    view = view_pillars(pillars, frames.cameras, (160, 90), queries=3)
    found = {
        (int(pillar), int(camera)): uv[0]
        for pillar, camera, uv in zip(view.pillar, view.camera, view.uv, strict=True)
    }
    expected = {}
    for row in range(2):
        for camera in range(6):
            matrix = frames.cameras.lidar_to_cam[row, camera]
            k = frames.cameras.intrinsics[row, camera]
            for index, point in enumerate(pillars):
                x, y, z = matrix[:3, :3] @ point + matrix[:3, 3]
                u, v = (k[0, 0] * x / z + k[0, 2]) / 160, (k[1, 1] * y / z + k[1, 2]) / 90
                if z > 0.3 and 0 < u < 1 and 0 < v < 1:
                    expected[row * 3 + index, row * 6 + camera] = torch.stack([u, v])
    assert found.keys() == expected.keys()
    assert (0, 0) in found  # 10 m ahead: the front camera
    for pair, uv in expected.items():
        torch.testing.assert_close(found[pair], uv, atol=1e-4, rtol=0)
    assert view.images == 12


def test_spatial_attention_averages_the_cameras_that_see_a_pillar_and_nothing_else() -> None:
    config = replace(SMALL, strides=(4,), heights_m=(-1.0,), spatial_points=1)
    attention = SpatialAttention(config)
    torch.nn.init.eye_(attention.out.weight)
    torch.nn.init.zeros_(attention.out.bias)
    frames = fake_frames(1)
    centres = geometry.cell_centres(config.grid).flatten(0, 1)
    pillars = torch.nn.functional.pad(centres, (0, 1), value=-1.0)
    view = view_pillars(pillars, frames.cameras, (160, 90), len(pillars))
    # every camera's feature is its number, so a sample away from borders is that number
    level = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 16, 23, 40)
    query = torch.zeros(1, 16, 16, 16)
    read = attention(query, (tall_image(level),), view).flatten(2)[0, 0]
    seen = torch.zeros(6, len(pillars))
    seen[view.camera, view.pillar] = 1
    inside = torch.ones(len(pillars), dtype=torch.bool)
    border = ((view.uv[:, 0] < 0.03) | (view.uv[:, 0] > 0.97)).any(-1)
    inside[view.pillar[border]] = False  # half of such a sample is zero padding
    mean = (seen * torch.arange(1.0, 7.0).view(6, 1)).sum(0) / seen.sum(0).clamp(min=1)
    assert (seen.sum(0) == 2).any()
    torch.testing.assert_close(read[inside], mean[inside], atol=1e-4, rtol=0)


def test_bad_sizes_are_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match=r"encoder\.strides \(2,\) must be some of"):
        replace(SMALL, strides=(2,))
    with pytest.raises(ValueError, match=r"encoder\.dim 20 must be a multiple of 8"):
        replace(SMALL, dim=20)
    with pytest.raises(ValueError, match="one entry more than blocks"):
        ImageBackboneConfig(widths=(8, 8), blocks=(1, 1))
