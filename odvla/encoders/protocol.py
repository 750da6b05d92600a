"""What an encoder is: six images and the past in, scene features and the new past out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from odvla.errors import UserError
from odvla.types import (
    BevGrid,
    Cameras,
    Frames,
    LidarPoints,
    SceneFeatures,
    TensorFields,
    shape_checked,
)


@shape_checked
@dataclass(frozen=True)
class EncoderState(TensorFields):
    """What an encoder remembers of the previous key-frame: its BEV and where the car stood."""

    bev: Float[Tensor, "B H W C"]
    lidar_to_global: Float64[Tensor, "B 4 4"]
    valid: Bool[Tensor, " B"]  # False: nothing to remember in this row


@runtime_checkable
class Encoder(Protocol):
    """An nn.Module from images to SceneFeatures; `dim` is their channel count.

    `grid` is None for an encoder without bird's-eye view. The image backbone is the submodule
    `backbone`: the planning stage freezes it by that name.
    """

    dim: int
    grid: BevGrid | None

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState | None]:
        """Encode one key-frame of B scenes.

        Args:
            frames: images of one moment.
            state: what the previous call returned; None at the start. Rows with
                frames.scene_start forget theirs.

        Returns:
            Features of B scenes and the state for the next key-frame (None: no memory).
        """
        ...


def require_images(images: Tensor, cameras: int, least: int) -> None:
    """Refuse what an encoder cannot take, before its layers fail with a sentence of torch's.

    Args:
        images: [B, N, 3, h, w].
        cameras: the encoder was built for.
        least: height and width in pixels; the coarsest map has a pixel then.

    Raises:
        UserError: another number of cameras, or smaller images.
    """
    number, _, height, width = images.shape[1:]
    if number != cameras:
        raise UserError(f"the encoder was built for {cameras} cameras, not {number}")
    if min(height, width) < least:
        raise UserError(
            f"images of {width}x{height} pixels (width x height) are too small for the encoder, "
            f"whose coarsest features stand {least} pixels apart; see data.image_size"
        )


def fake_frames(
    batch: int,
    image_size: tuple[int, int] = (160, 90),
    seed: int = 0,
    *,
    step: int = 0,
    lidar_points: int = 0,
) -> Frames:
    """Noise images from a plausible ring of six cameras, for tests and contract checks.

    Args:
        batch: rows B.
        image_size: width, height.
        seed: noise and ego positions.
        step: key-frames since the start; the car drives on by 3 m a step and turns a little.
        lidar_points: of a sweep that lies around the car, some of them padding; 0: no lidar.
    """
    width, height = image_size
    generator = torch.Generator().manual_seed(seed * 1009 + step)
    images = torch.randint(0, 256, (batch, 6, 3, height, width), generator=generator)
    angles = torch.deg2rad(torch.tensor([0.0, -56.0, 55.0, 180.0, 108.0, -110.0]))
    # Axes of a level camera that looks forward: x right, y down, z forward.
    level = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    cos, sin, zero, one = angles.cos(), angles.sin(), torch.zeros(6), torch.ones(6)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], -1).view(6, 3, 3)
    lidar_to_cam = torch.eye(4).repeat(6, 1, 1)
    lidar_to_cam[:, :3, :3] = level @ turn
    lidar_to_cam[:, 1, 3] = -0.3  # the cameras hang a little under the lidar
    focal = torch.tensor([1266.0, 1266.0, 1266.0, 796.0, 1266.0, 1266.0]) * width / 1600
    intrinsics = torch.zeros(6, 3, 3)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1
    pose = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    yaw = torch.full((batch,), 0.05 * step, dtype=torch.float64)
    pose[:, 0, 0], pose[:, 0, 1], pose[:, 1, 0], pose[:, 1, 1] = (
        yaw.cos(),
        -yaw.sin(),
        yaw.sin(),
        yaw.cos(),
    )
    pose[:, 1, 3] = 3.0 * step
    return Frames(
        images=images.to(torch.uint8),
        cameras=Cameras(
            intrinsics.expand(batch, -1, -1, -1).clone(),
            lidar_to_cam.expand(batch, -1, -1, -1).clone(),
        ),
        lidar_to_global=pose,
        timestamp_s=torch.full((batch,), 0.5 * step, dtype=torch.float64),
        can_bus=torch.randn(batch, 18, generator=generator),
        scene_start=torch.full((batch,), step == 0),
        sample_tokens=tuple(f"fake-{row}-{step}" for row in range(batch)),
        lidar=_fake_lidar(batch, lidar_points, generator) if lidar_points else None,
    )


def _fake_lidar(batch: int, count: int, generator: torch.Generator) -> LidarPoints:
    """Points up to 40 m away; every row has another number of them."""
    place = (torch.rand(batch, count, 3, generator=generator) - 0.5) * torch.tensor([80, 80, 4])
    intensity = torch.rand(batch, count, 1, generator=generator) * 255
    used = torch.arange(count).expand(batch, -1) < count - torch.arange(batch).unsqueeze(1)
    points = torch.cat([place, intensity], -1) * used.unsqueeze(-1)
    return LidarPoints(points, used)
