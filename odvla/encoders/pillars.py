"""Where BEV cells lie: in the images of the cameras, and in the previous BEV.

Shape legend: B rows, N cameras, I images, Q pillars (one a BEV cell), Z heights, V visible pairs of
a camera and a pillar, A heads, P points, C channels, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odvla import geometry
from odvla.types import BevGrid, Cameras

NEAREST_M = 0.3  # points closer to a camera's plane than this are not seen


@dataclass(frozen=True)
class PillarView:
    """Which camera sees which pillar where: V pairs, found once a frame and used by every layer."""

    pillar: Tensor  # [V] row * Q + pillar
    camera: Tensor  # [V] row * N + camera
    uv: Tensor  # [V, Z, 2] fractions of the image, one a height
    share: Tensor  # [V, 1] 1 / number of cameras that see the same pillar
    images: int  # B * N


def view_pillars(
    pillars: Tensor, cameras: Cameras, image_size: tuple[int, int], queries: int
) -> PillarView:
    """Project pillar points into every camera and keep the visible pairs.

    Args:
        pillars: [Q * Z, 3] metres, lidar frame, heights fastest.
        cameras: calibration of B rows.
        image_size: width, height in pixels.
        queries: Q.

    Returns:
        The pairs where at least one height lies inside the image and in front of the camera.
    """
    rows, number = cameras.intrinsics.shape[:2]
    # Not in half precision, whatever the model runs in: bf16 moves points by several pixels.
    with torch.autocast(pillars.device.type, enabled=False):
        pixels, depth = geometry.project(
            pillars, cameras.lidar_to_cam.float(), cameras.intrinsics.float()
        )
        uv = pixels / pixels.new_tensor(image_size)  # B, N, Q*Z, 2
    inside = (depth > NEAREST_M) & (uv > 0).all(-1) & (uv < 1).all(-1)
    seen = inside.view(rows, number, queries, -1).any(-1)  # B, N, Q
    row, camera, pillar = seen.nonzero(as_tuple=True)
    picked = uv.view(rows * number * queries, -1, 2)[(row * number + camera) * queries + pillar]
    # Points behind the camera project to anywhere; keep them finite and outside.
    return PillarView(
        pillar=row * queries + pillar,
        camera=row * number + camera,
        uv=picked.clamp(-1, 2),
        share=1 / seen.sum(1)[row, pillar].unsqueeze(-1).float(),
        images=rows * number,
    )


def places_before(grid: BevGrid, now_to_global: Tensor, before_to_global: Tensor) -> Tensor:
    """Where the places of today's BEV cells lie in an earlier BEV.

    Args:
        grid: cells of both.
        now_to_global: float64 [B, 4, 4], pose of the lidar.
        before_to_global: float64 [B, 4, 4].

    Returns:
        [B, Q, 2] (x, y) as fractions of the earlier BEV; anything may lie outside 0..1.
    """
    to_before = geometry.relative_transform(now_to_global, before_to_global)
    centres = geometry.cell_centres(grid, to_before.device).flatten(0, 1)
    ground = F.pad(centres, (0, 1)).expand(len(to_before), -1, -1)
    return geometry.to_bev_unit(grid, geometry.transform_points(to_before, ground)[..., :2])


def tall_image(images: Tensor) -> Tensor:
    """Images [I, C, h, w] below one another, a row of zeros after each: [1, C, I * (h + 1), w]."""
    padded = F.pad(images, (0, 0, 0, 1))
    return padded.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def in_tall(uv: Tensor, image: Tensor, images: int, height: int) -> Tensor:
    """Where fractions [V, A, P, 2] of images [V] lie in the tall image, as fractions of it.

    What leaves its image above or below meets a row of zeros, never a neighbour's pixels.
    """
    row = (uv[..., 1] * height - 0.5).clamp(-1, height)
    tall = (image.view(-1, 1, 1) * (height + 1) + row + 0.5) / (images * (height + 1))
    return torch.stack([uv[..., 0], tall], -1)
