"""How the car moved since the previous bird's-eye view, and what that does to it.

Shape legend: B rows, C channels, H x W BEV cells, Q = H * W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odvla.types import BevGrid

# Places in can_bus: way driven since the previous key-frame (global axes, metres), heading
# (radians), change of heading (degrees).
DRIVEN, HEADING, TURN_DEG = slice(0, 2), -2, -1


@dataclass(frozen=True)
class Motion:
    """How the car moved since the previous BEV."""

    shift: Tensor  # [B, 2] (x, y) in fractions of the BEV
    turn_deg: Tensor  # [B], counter-clockwise


def motion_of(can_bus: Tensor, grid: BevGrid) -> Motion:
    """Shift and turn since the previous key-frame.

    The way driven is given in global axes; turning it by the heading gives it in the BEV's.

    Args:
        can_bus: [B, 18], prepared (see `DRIVEN`).
        grid: the BEV.

    Source: BEVFormer's PerceptionTransformer.
    """
    can = can_bus.float()
    driven = can[:, DRIVEN]
    length = driven.norm(dim=-1)
    angle = can[:, HEADING] - torch.atan2(driven[:, 1], driven[:, 0])
    x = length * angle.sin() / (grid.cell_m * grid.columns)
    y = length * angle.cos() / (grid.cell_m * grid.rows)
    return Motion(torch.stack([x, y], -1), can[:, TURN_DEG])


def can_bus_deltas(absolute: Tensor, before: Tensor | None) -> Tensor:
    """The reference's preparation of a CAN bus vector: position and heading become changes.

    Args:
        absolute: float64 [18] with the position in global axes and the heading in degrees (last).
        before: the same of the previous frame. None: nothing is subtracted, which is what the
            reference does by mistake to the very first frame of a process; passing the previous
            scene's last frame at a scene's start is its other mistake. Right is `absolute` itself:
            no motion.

    Returns:
        [18].
    """
    changes = absolute.clone()
    if before is not None:
        changes[:3] -= before[:3]
        changes[TURN_DEG] -= before[TURN_DEG]
    return changes


def turn_bev(bev: Tensor, turn_deg: Tensor, center: tuple[float, ...] = ()) -> Tensor:
    """Turn BEV maps about a cell, nearest neighbour; what comes from outside is zero.

    Args:
        bev: [B, C, H, W].
        turn_deg: [B] degrees, counter-clockwise as the map is drawn with row 0 at the top.
        center: (x, y), in cells from the upper left corner; () is the middle.

    Source: torchvision's `rotate`, which BEVFormer calls; the order of operations is kept, because
    the nearest cell hangs on the last digit.
    """
    height, width = bev.shape[-2:]
    middle = (width * 0.5, height * 0.5)
    cx, cy = (c - m for c, m in zip(center or middle, middle, strict=True))
    rows = []
    for degrees in turn_deg.tolist():
        angle = math.radians(-degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        rows.append(
            [
                [cos, sin, cx - cos * cx - sin * cy],
                [-sin, cos, cy + sin * cx - cos * cy],
            ]
        )
    matrix = torch.tensor(rows, device=bev.device, dtype=torch.float32)  # B, 2, 3
    x = torch.linspace(-width * 0.5 + 0.5, width * 0.5 - 0.5, width, device=bev.device)
    y = torch.linspace(-height * 0.5 + 0.5, height * 0.5 - 0.5, height, device=bev.device)
    base = torch.stack([x.expand(height, -1), y.unsqueeze(1).expand(-1, width)], -1)
    base = F.pad(base, (0, 1), value=1.0).flatten(0, 1)  # Q, 3
    scaled = matrix.transpose(1, 2) / matrix.new_tensor([0.5 * width, 0.5 * height])
    grid = (base.expand(len(bev), -1, -1) @ scaled).view(len(bev), height, width, 2)
    turned = F.grid_sample(bev.float(), grid, mode="nearest", align_corners=False)
    return turned.to(bev.dtype)
