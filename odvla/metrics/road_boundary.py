"""Whether a plan takes the car off the drivable area, as OmniDrive's evaluation counts it.

A sample counts at t where some part of the car is off the area at any step up to t, unless a part
of it is at t0 already. What lies beyond the raster is not judged.

Shape legend: S samples, T = 6 steps 0.5 s apart, K points of the car.
Frame: LIDAR_TOP at t0, x right, y forward, metres.
Source: OmniDrive's evaluation/eval_planning.py (plan_boundary).
"""

from __future__ import annotations

import torch
from torch import Tensor

from odvla.metrics.collisions import ego_boxes, headings
from odvla.types import BevGrid

SPACING_M = 0.1  # between the points that stand for the car, and OmniDrive's cell


def leaves_road(plans: Tensor, drivable: Tensor, grid: BevGrid) -> Tensor:
    """Whether plans leave the drivable area up to each step.

    Args:
        plans: [S, T, 2].
        drivable: bool [S, rows, columns] of `grid`.
        grid: where its cells lie.

    Returns:
        bool [S, T].
    """
    start = plans.new_zeros(len(plans), 1, 2)
    path = torch.cat([start, plans], dim=1).double()
    # The first heading is forward: the step that ends at t0 is not the plan's.
    turned = torch.cat([headings(start), headings(plans)], dim=1)
    off = _off_the_area(ego_boxes(path, turned), drivable, grid)  # [S, T + 1]
    return (off[:, 1:].cummax(dim=1).values) & ~off[:, :1]


def _off_the_area(boxes: Tensor, drivable: Tensor, grid: BevGrid) -> Tensor:
    """Whether any point of boxes [S, T, 5] is off it: bool [S, T]."""
    points = _points(boxes)  # [S, T, K, 2]
    column = ((points[..., 0] - grid.x_min_m) / grid.cell_m).floor().long()
    row = ((points[..., 1] - grid.y_min_m) / grid.cell_m).floor().long()
    inside = (row >= 0) & (row < grid.rows) & (column >= 0) & (column < grid.columns)
    cell = row.clamp(0, grid.rows - 1) * grid.columns + column.clamp(0, grid.columns - 1)
    road = drivable.flatten(1).gather(1, cell.flatten(1)).view_as(cell)
    return (~road & inside).any(-1)


def _points(boxes: Tensor) -> Tensor:
    """Points [..., K, 2] all over boxes [..., 5] of one size, no farther apart than SPACING_M."""
    x, y, width, length, yaw = boxes[..., None, :].unbind(-1)
    sides = [float(side.flatten()[0]) / 2 for side in (length, width)]
    counts = [int(2 * side / SPACING_M) + 2 for side in sides]
    spans = [
        torch.linspace(-side, side, count, dtype=boxes.dtype)
        for side, count in zip(sides, counts, strict=True)
    ]
    along, left = (values.flatten() for values in torch.meshgrid(*spans, indexing="ij"))
    cos, sin = yaw.cos(), yaw.sin()
    return torch.stack([x + along * cos - left * sin, y + along * sin + left * cos], dim=-1)
