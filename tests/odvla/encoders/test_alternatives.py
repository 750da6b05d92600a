"""Other roads from images to features: lift-splat, Hugging Face backbones, patches of a ViT."""

from dataclasses import replace

import pytest
import torch

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.check import check_encoder
from odvla.encoders.huggingface import SMALL, HuggingFaceBackboneConfig
from odvla.encoders.lidar_pillars import LidarPillarsConfig
from odvla.encoders.lift_splat import LiftSplatConfig
from odvla.encoders.protocol import fake_frames
from odvla.encoders.vision_patches import VisionPatchesConfig
from odvla.types import Cameras

LIFT = LiftSplatConfig(dim=16, rows=12, columns=10, cell_m=4.0, x_min_m=-19.3, y_min_m=-24.6)


@pytest.mark.parametrize(
    "config",
    [
        LIFT,
        replace(LIFT, temporal=False, level=1),
        replace(LIFT, backbone=HuggingFaceBackboneConfig("convnext", stages=(2, 3))),
        replace(LIFT, backbone=HuggingFaceBackboneConfig("swin", stages=(1, 2))),
        VisionPatchesConfig(dim=16),
        VisionPatchesConfig(dim=16, camera_embedding=False),
    ],
    ids=["lift", "no memory", "convnext", "swin", "patches", "nameless"],
)
def test_the_encoder_keeps_the_contract(config):
    check_encoder(config)


@pytest.mark.parametrize("architecture", list(SMALL))
def test_channels_and_strides_are_what_comes_out(architecture):
    stages = (1, 2) if architecture == "dinov2" else (2, 3, 4)
    config = HuggingFaceBackboneConfig(architecture, stages=stages)
    images = torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8)
    maps = config.build().eval()(images)
    assert tuple(m.shape[1] for m in maps) == config.channels
    for feature, stride in zip(maps, config.strides, strict=True):
        padded = [-(-side // config.multiple) * config.multiple for side in (90, 160)]
        assert feature.shape[-2:] == tuple(side // stride for side in padded)


def test_a_local_folder_gives_its_own_weights(tmp_path):
    made = HuggingFaceBackboneConfig("resnet", stages=(3, 4)).build().eval()
    made.model.save_pretrained(tmp_path)
    read = HuggingFaceBackboneConfig(folder=str(tmp_path), stages=(3, 4)).build().eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(read(images), made(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_hugging_face_backbone_stands_in_bevformer():
    backbone = HuggingFaceBackboneConfig("resnet")
    config = BEVFormerConfig(
        backbone=backbone, dim=16, rows=8, columns=8, layers=1, hidden=16, heads=2
    )
    check_encoder(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "/nowhere"}, "/nowhere holds no config.json; fetch a model with `hf download"),
        ({"stages": (5,)}, r"must be ascending and among 1 to 4"),
        ({"stages": ()}, "must be ascending"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceBackboneConfig(**settings)


def test_what_a_camera_sees_lands_where_it_stands():
    """One camera, one lit pixel, certain depth: the feature must lie in the cell of that point."""
    encoder = LIFT.build().eval()
    frames = fake_frames(1, (160, 90))
    size, image = (9, 16), (90, 160)
    points = encoder.places(frames.cameras, size, image)  # N, D, h*w, 3
    for camera, depth, pixel in ((0, 10, 6 * 16 + 8), (3, 7, 5 * 16 + 2)):
        # An independent way back: project the point into its camera.
        point = points[camera, depth, pixel]
        to_cam = frames.cameras.lidar_to_cam[0, camera]
        in_camera = to_cam[:3, :3] @ point + to_cam[:3, 3]
        assert in_camera[2].item() == pytest.approx(encoder.depths[depth].item(), abs=1e-3)
        uv = frames.cameras.intrinsics[0, camera] @ in_camera
        uv = uv[:2] / uv[2]
        wanted = ((pixel % 16 + 0.5) * 10, (pixel // 16 + 0.5) * 10)
        assert uv.tolist() == pytest.approx(wanted, abs=0.05)


@torch.no_grad()
def test_splatting_is_what_a_slow_loop_gives():
    torch.manual_seed(0)
    encoder = LIFT.build().eval()
    frames = fake_frames(2, (160, 90))
    level = torch.randn(12, LIFT.dim, 3, 4)
    points = encoder.places(frames.cameras, (3, 4), (90, 160))
    pooled = encoder.splat(level, points, 2)
    chance = encoder.depth(level).softmax(1).flatten(2)
    context = encoder.context(level).flatten(2)
    slow = torch.zeros_like(pooled)
    for image in range(12):
        for depth in range(len(encoder.depths)):
            for pixel in range(12):
                x, y, z = points[image, depth, pixel].tolist()
                column, row = int((x + 19.3) // 4), int((y + 24.6) // 4)
                if 0 <= column < 10 and 0 <= row < 12 and -4 <= z < 3:
                    weight = chance[image, depth, pixel]
                    slow[image // 6, :, row, column] += weight * context[image, :, pixel]
    torch.testing.assert_close(pooled, slow, atol=1e-5, rtol=1e-5)


def test_as_many_cameras_as_there_are_embeddings():
    frames = fake_frames(1)
    two = replace(
        frames,
        images=frames.images[:, :2],
        cameras=Cameras(frames.cameras.intrinsics[:, :2], frames.cameras.lidar_to_cam[:, :2]),
    )
    with pytest.raises(ValueError, match="built for 6 cameras, not 2"):
        VisionPatchesConfig(dim=16).build()(two, None)


LIDAR = LidarPillarsConfig(dim=16, rows=10, columns=12, cell_m=4.0, x_min_m=-24, y_min_m=-20)


@pytest.mark.parametrize("config", [LIDAR, replace(LIDAR, fine=1)], ids=["fine", "plain"])
def test_the_lidar_encoder_keeps_the_contract(config):
    check_encoder(config)


@torch.no_grad()
def test_pillars_are_what_a_slow_loop_gives():
    torch.manual_seed(0)
    encoder = LIDAR.build().eval()
    lidar = LIDAR.fake_batch(2, seed=1).lidar
    pooled = encoder.pool(lidar)
    members: dict[tuple[int, int, int], list[torch.Tensor]] = {}
    for row in range(2):
        for point, used in zip(lidar.points[row], lidar.mask[row], strict=True):
            x, y, z, _ = point.tolist()
            column, line = int((x + 24) // 2), int((y + 20) // 2)
            if used and -5 <= z < 3 and 0 <= column < 24 and 0 <= line < 20:
                members.setdefault((row, line, column), []).append(point)
    slow = torch.zeros_like(pooled)
    for (row, line, column), points in members.items():
        mean = torch.stack(points)[:, :3].mean(0)
        centre = torch.tensor([-24 + (column + 0.5) * 2, -20 + (line + 0.5) * 2])
        described = [
            torch.cat([p[:3] / 24, p[3:] / 255, p[:3] - mean, (p[:2] - centre) / 2]) for p in points
        ]
        slow[row, :, line, column] = encoder.point_net(torch.stack(described)).amax(0)
    torch.testing.assert_close(pooled, slow, atol=1e-5, rtol=1e-5)


def test_an_empty_sweep_is_an_empty_scene_and_none_is_an_error():
    frames = LIDAR.fake_batch(1)
    nothing = replace(frames.lidar, mask=torch.zeros_like(frames.lidar.mask))
    features, _ = LIDAR.build()(replace(frames, lidar=nothing), None)
    assert torch.isfinite(features.bev).all()
    with pytest.raises(ValueError, match="these have none"):
        LIDAR.build()(replace(frames, lidar=None), None)
