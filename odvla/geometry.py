"""Rigid motions, boxes, projection and BEV coordinates: pure functions on tensors.

Frames are as in odvla.types (LIDAR_TOP: x right, y forward, z up; metres, radians). A transform
`a_to_b` is a 4x4 matrix that takes homogeneous points from frame a to frame b. Poses in the global
frame are float64: at coordinates of 1e3 m float32 has lost the millimetres that a difference of two
poses needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from odvla.types import BevGrid


def wrap_angle(angle: Tensor) -> Tensor:
    """The same angles in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def rotation_2d(yaw: Tensor) -> Tensor:
    """Counter-clockwise rotation matrices [..., 2, 2] of angles [...]."""
    cos, sin = yaw.cos(), yaw.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def invert_rigid(transform: Tensor) -> Tensor:
    """Inverse of rigid transforms [..., 4, 4]; exact, without a solver."""
    rotation = transform[..., :3, :3].transpose(-1, -2)
    inverse = torch.zeros_like(transform)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ transform[..., :3, 3:]).squeeze(-1)
    inverse[..., 3, 3] = 1
    return inverse


def relative_transform(from_to_global: Tensor, to_to_global: Tensor) -> Tensor:
    """The transform between two bodies given in the global frame.

    Args:
        from_to_global: float64 [..., 4, 4].
        to_to_global: float64 [..., 4, 4].

    Returns:
        float32 [..., 4, 4]: from one body's frame to the other's, computed in float64.
    """
    return (invert_rigid(to_to_global.double()) @ from_to_global.double()).float()


def transform_points(transform: Tensor, points: Tensor) -> Tensor:
    """Move points.

    Args:
        transform: [..., 4, 4].
        points: [..., P, 3], with the same leading dimensions.

    Returns:
        [..., P, 3].
    """
    return points @ transform[..., :3, :3].transpose(-1, -2) + transform[..., None, :3, 3]


def yaw_of(transform: Tensor) -> Tensor:
    """Heading change [...] of transforms [..., 4, 4]: how far the x axis turns about z."""
    return torch.atan2(transform[..., 1, 0], transform[..., 0, 0])


def transform_boxes(transform: Tensor, boxes: Tensor) -> Tensor:
    """Express boxes in another frame whose z axis is (nearly) parallel.

    Args:
        transform: [..., 4, 4], from the boxes' frame to the wanted one.
        boxes: [..., A, 9] as in odvla.types.

    Returns:
        [..., A, 9]: centre, yaw and the axes of the velocity changed; sizes as they were.
    """
    centre = transform_points(transform, boxes[..., :3])
    yaw = wrap_angle(boxes[..., 6:7] + yaw_of(transform)[..., None, None])
    velocity = boxes[..., 7:9] @ transform[..., :2, :2].transpose(-1, -2)
    return torch.cat([centre, boxes[..., 3:6], yaw, velocity], -1)


def box_code(boxes: Tensor) -> Tensor:
    """Boxes as numbers that can be subtracted from one another.

    Args:
        boxes: [..., 9].

    Returns:
        [..., 10]: x, y, z, log width, log length, log height, sin yaw, cos yaw, vx, vy.
    """
    yaw = boxes[..., 6:7]
    size = boxes[..., 3:6].clamp(min=0.02).log()
    return torch.cat([boxes[..., :3], size, yaw.sin(), yaw.cos(), boxes[..., 7:9]], -1)


def boxes_of(code: Tensor) -> Tensor:
    """The boxes [..., 9] of codes [..., 10]; sine and cosine need not be of length one."""
    # The bound keeps sizes finite whatever an untrained network says.
    size = code[..., 3:6].clamp(-4, 4).exp()
    # A zero vector has no angle and no gradient: move it off by a hair.
    yaw = torch.atan2(code[..., 6:7], code[..., 7:8] + 1e-6)
    return torch.cat([code[..., :3], size, yaw, code[..., 8:10]], -1)


def advance_boxes(boxes: Tensor, seconds: Tensor) -> Tensor:
    """Boxes [..., A, 9] moved along their own velocity for `seconds` [...]."""
    step = boxes[..., 7:9] * seconds[..., None, None]
    return torch.cat([boxes[..., :2] + step, boxes[..., 2:]], -1)


def project(points: Tensor, lidar_to_cam: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pinhole projection.

    Args:
        points: [..., P, 3] in the lidar frame.
        lidar_to_cam: [..., 4, 4].
        intrinsics: [..., 3, 3], pixels.

    Returns:
        Pixels [..., P, 2] and depths [..., P] in metres. Points behind the camera (depth <= 0) get
        finite but meaningless pixels.
    """
    # One product for both steps: this runs on thousands of points for every camera.
    lidar_to_pixels = intrinsics @ lidar_to_cam[..., :3, :]
    homogeneous = transform_points(lidar_to_pixels, points)
    depth = homogeneous[..., 2]
    return homogeneous[..., :2] / depth.clamp(min=1e-3).unsqueeze(-1), depth


def pixel_rays(intrinsics: Tensor, lidar_to_cam: Tensor, pixels: Tensor) -> Tensor:
    """Unit directions in which pixels look.

    Args:
        intrinsics: [..., 3, 3].
        lidar_to_cam: [..., 4, 4].
        pixels: [P, 2] (u, v).

    Returns:
        [..., P, 3] in the lidar frame.
    """
    u, v = pixels.unbind(-1)
    fx, fy = intrinsics[..., 0, 0, None], intrinsics[..., 1, 1, None]
    cx, cy, skew = intrinsics[..., 0, 2, None], intrinsics[..., 1, 2, None], intrinsics[..., 0, 1]
    down = (v - cy) / fy
    right = (u - cx - skew[..., None] * down) / fx
    rays = torch.stack([right, down, torch.ones_like(right)], -1) @ lidar_to_cam[..., :3, :3]
    return rays / rays.norm(dim=-1, keepdim=True)


def cell_centres(grid: BevGrid, device: torch.device | None = None) -> Tensor:
    """Centres [rows, columns, 2] of BEV cells, (x, y) in metres."""
    x = grid.x_min_m + (torch.arange(grid.columns, device=device) + 0.5) * grid.cell_m
    y = grid.y_min_m + (torch.arange(grid.rows, device=device) + 0.5) * grid.cell_m
    return torch.stack([x.expand(grid.rows, -1), y.unsqueeze(1).expand(-1, grid.columns)], -1)


def to_bev_unit(grid: BevGrid, xy: Tensor) -> Tensor:
    """Positions [..., 2] in metres as fractions of the grid: (0, 0) .. (1, 1) inside."""
    low = xy.new_tensor([grid.x_min_m, grid.y_min_m])
    size = xy.new_tensor([grid.columns * grid.cell_m, grid.rows * grid.cell_m])
    return (xy - low) / size


def sinusoids(values: Tensor, count: int, longest: float) -> Tensor:
    """Sines and cosines that describe a coordinate from coarse to fine.

    Args:
        values: [...], in any unit.
        count: features a value, even.
        longest: period of the slowest one, in the unit of `values`; each next period is half.

    Returns:
        [..., count].
    """
    octaves = torch.arange(count // 2, device=values.device, dtype=values.dtype)
    phase = values.unsqueeze(-1) * (2 * math.pi / longest) * 2**octaves
    return torch.cat([phase.sin(), phase.cos()], -1)
