"""Whether a plan touches other road users: on a raster as the field does it, or box against box.

Shape legend: S samples, T = 6 steps 0.5 s apart, A boxes of a step (padded), K cells of the car.
Frame: LIDAR_TOP at t0 (x right, y forward, metres, yaw from +x counter-clockwise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from odvla.metrics.protocol import ProtocolCard

EGO_LENGTH_M = 4.084
EGO_WIDTH_M = 1.85
EGO_FORWARD_SHIFT_M = 0.5  # from LIDAR_TOP to the middle of the car
FORWARD = math.pi / 2
# The car keeps its heading over a step shorter than this: its direction would be noise.
STANDING_STEP_M = 0.2
# Distance between the points that stand for a turned car on the raster.
FINE_M = 0.25


@dataclass(frozen=True)
class CollisionRaster:
    """The raster of ST-P3, which UniAD, VAD and OpenDriveVLA use, and the car on it.

    A cell's coordinate is its centre. Rows grow with y (forward), columns with -x (left); there are
    200 x 200 cells, but any number will do.
    """

    first_centre_m: tuple[float, float] = (-49.75, -49.75)  # of rows, of columns
    cell_m: tuple[float, float] = (0.5, 0.5)
    ego_length_m: float = EGO_LENGTH_M
    ego_width_m: float = EGO_WIDTH_M

    def ego_cells(self) -> tuple[Tensor, Tensor]:
        """Rows [K] and columns [K] that the car covers with LIDAR_TOP at the origin."""
        row, column = torch.meshgrid(*self.ego_spans(), indexing="ij")
        return row.flatten(), column.flatten()

    def ego_spans(self) -> tuple[Tensor, Tensor]:
        """Rows and columns whose product those cells are."""
        rows = self._covered(0, EGO_FORWARD_SHIFT_M, self.ego_length_m)
        return rows, self._covered(1, 0.0, self.ego_width_m)

    def _covered(self, axis: int, middle_m: float, size_m: float) -> Tensor:
        first, cell = self.first_centre_m[axis], self.cell_m[axis]
        low = math.ceil((middle_m - size_m / 2 - first) / cell)
        high = math.floor((middle_m + size_m / 2 - first) / cell)
        return torch.arange(low, high + 1)


FIELD_RASTER = CollisionRaster()


@dataclass(frozen=True)
class Traffic:
    """Where other road users will be at the six steps of S samples.

    `raster` has rows forward and columns left (see CollisionRaster). `boxes` are x, y, width,
    length, yaw, vx, vy. A part that no protocol at hand asks for may be None.
    """

    raster: Tensor | None = None  # bool [S, T, 200, 200]
    boxes: Tensor | None = None  # [S, T, A, 7]
    mask: Tensor | None = None  # bool [S, T, A]


def collisions(plans: Tensor, traffic: Traffic, card: ProtocolCard) -> Tensor:
    """Which steps of plans [S, T, 2] touch somebody: bool [S, T].

    Raises:
        ValueError: the traffic lacks the part that the card's geometry needs.
    """
    if card.geometry == "polygons":
        if traffic.boxes is None or traffic.mask is None:
            raise ValueError("collisions with polygons need the boxes of the traffic")
        heading = headings(plans) if card.ego_box == "oriented" else _straight(plans)
        if card.shape == "point":
            return (inside_boxes(plans, traffic.boxes) & traffic.mask).any(-1)
        return (boxes_touch(ego_boxes(plans, heading), traffic.boxes) & traffic.mask).any(-1)
    if traffic.raster is None:
        raise ValueError("collisions on the raster need the raster of the traffic")
    if card.shape == "point":
        return point_hits(plans, traffic.raster)
    if card.ego_box == "oriented":
        return turned_box_hits(plans, headings(plans), traffic.raster)
    return box_hits(plans, traffic.raster)


def box_hits(plans: Tensor, raster: Tensor, grid: CollisionRaster = FIELD_RASTER) -> Tensor:
    """Whether the car's box, moved along a plan and never rotated, touches an occupied cell.

    Cells outside the raster are clipped to its border, as the reference does; a plan that leaves
    the 100 m square is therefore judged by what stands on the edge.

    Args:
        plans: [S, T, 2] metres.
        raster: bool [S, T, rows, columns].
        grid: where its cells lie.

    Returns:
        bool [S, T].

    Source: the released evaluation; equal to arrays recorded from it.
    """
    rows, columns = grid.ego_spans()
    # Cells are counted from the first one's centre, and cut, not rounded: as the reference does.
    forward = (plans[..., 1, None].float() / grid.cell_m[0]).double() + rows
    left = (-plans[..., 0, None].float() / grid.cell_m[1]).double() + columns
    row = forward.long().clamp_(0, raster.shape[-2] - 1) * raster.shape[-1]
    column = left.long().clamp_(0, raster.shape[-1] - 1)
    # The box is a product of rows and columns: only their sums are made for each of its cells.
    cells = (row[..., :, None] + column[..., None, :]).flatten(2)
    return raster.flatten(2).gather(2, cells).bool().any(-1)


def point_hits(plans: Tensor, raster: Tensor, grid: CollisionRaster = FIELD_RASTER) -> Tensor:
    """Whether a planned point lies in an occupied cell; outside the raster it lies in none."""
    row = ((plans[..., 1].float() - grid.first_centre_m[0]) / grid.cell_m[0]).long()
    column = ((-plans[..., 0].float() - grid.first_centre_m[1]) / grid.cell_m[1]).long()
    return (
        _inside(raster, row, column) & _occupied(raster, row[..., None], column[..., None])[..., 0]
    )


def turned_box_hits(
    plans: Tensor, heading: Tensor, raster: Tensor, grid: CollisionRaster = FIELD_RASTER
) -> Tensor:
    """Whether the car's box, turned along its path, touches an occupied cell.

    The box is covered with points FINE_M apart; a cell is touched when one of them lies in it.
    """
    length, width = grid.ego_length_m, grid.ego_width_m
    along = torch.linspace(-length / 2, length / 2, math.ceil(length / FINE_M) + 1)
    across = torch.linspace(-width / 2, width / 2, math.ceil(width / FINE_M) + 1)
    a, b = (
        t.flatten().double()
        for t in torch.meshgrid(along + EGO_FORWARD_SHIFT_M, across, indexing="ij")
    )
    cos, sin = heading.cos()[..., None], heading.sin()[..., None]
    x = plans[..., 0, None].double() + a * cos - b * sin
    y = plans[..., 1, None].double() + a * sin + b * cos
    row = ((y - grid.first_centre_m[0]) / grid.cell_m[0] + 0.5).floor().long()
    column = ((-x - grid.first_centre_m[1]) / grid.cell_m[1] + 0.5).floor().long()
    return (_inside(raster, row, column) & _occupied(raster, row, column)).any(-1)


def _inside(raster: Tensor, row: Tensor, column: Tensor) -> Tensor:
    rows, columns = raster.shape[-2:]
    return (row >= 0) & (row < rows) & (column >= 0) & (column < columns)


def _occupied(raster: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Cells [S, T, K] of a raster [S, T, rows, columns]; outside, those of the border."""
    rows, columns = raster.shape[-2:]
    cell = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    return raster.flatten(2).gather(2, cell).bool()


def headings(plans: Tensor) -> Tensor:
    """Direction [S, T] in which the car arrives at each point of plans [S, T, 2].

    It starts at the origin looking forward, and keeps its direction over steps shorter than
    STANDING_STEP_M.
    """
    steps = torch.diff(plans.double(), dim=1, prepend=plans.new_zeros(len(plans), 1, 2).double())
    angle = torch.atan2(steps[..., 1], steps[..., 0])
    moved = steps.norm(dim=-1) >= STANDING_STEP_M
    # Index of the last step up to here that moved; -1: none yet.
    number = torch.arange(plans.shape[1], device=plans.device).expand_as(moved)
    last = torch.where(moved, number, -1).cummax(dim=1).values
    return torch.where(last >= 0, angle.gather(1, last.clamp_min(0)), FORWARD)


def _straight(plans: Tensor) -> Tensor:
    return torch.full(plans.shape[:2], FORWARD, dtype=torch.float64, device=plans.device)


def ego_boxes(plans: Tensor, heading: Tensor) -> Tensor:
    """The car's boxes [S, T, 5] (x, y, width, length, yaw) along plans [S, T, 2]."""
    ahead = torch.stack([heading.cos(), heading.sin()], dim=-1) * EGO_FORWARD_SHIFT_M
    centre = plans.double() + ahead
    size = centre.new_tensor([EGO_WIDTH_M, EGO_LENGTH_M]).expand(*centre.shape[:-1], 2)
    return torch.cat([centre, size, heading[..., None]], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """Corners [..., 4, 2] of boxes [..., 5 or more], around the box from its front left."""
    x, y, width, length, yaw = boxes[..., :5].unbind(-1)
    along = length[..., None] / 2 * boxes.new_tensor([1, 1, -1, -1])
    left = width[..., None] / 2 * boxes.new_tensor([1, -1, -1, 1])
    cos, sin = yaw.cos()[..., None], yaw.sin()[..., None]
    return torch.stack(
        [x[..., None] + along * cos - left * sin, y[..., None] + along * sin + left * cos], dim=-1
    )


def boxes_touch(ego: Tensor, others: Tensor) -> Tensor:
    """Whether rectangles overlap, by separating axes: [..., 5] and [..., A, 5+] -> bool [..., A].

    Two rectangles are apart exactly when on one of the four directions of their sides their
    shadows do not meet.
    """
    own = corners(ego)[..., None, :, :]  # [..., 1, 4, 2]
    their = corners(others[..., :5].to(ego.dtype))  # [..., A, 4, 2]
    touch = torch.ones(others.shape[:-1], dtype=torch.bool, device=ego.device)
    for yaw in (ego[..., None, 4], others[..., 4].to(ego.dtype)):
        for angle in (yaw, yaw + math.pi / 2):
            axis = torch.stack([angle.cos(), angle.sin()], dim=-1)[..., None, :]
            mine, yours = (own * axis).sum(-1), (their * axis).sum(-1)
            touch &= (mine.amin(-1) <= yours.amax(-1)) & (yours.amin(-1) <= mine.amax(-1))
    return touch


def inside_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points [..., 2] lie in boxes [..., A, 5+]: bool [..., A]."""
    boxes = boxes.double()
    offset = points.double()[..., None, :] - boxes[..., :2]
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    left = -offset[..., 0] * sin + offset[..., 1] * cos
    return (along.abs() <= boxes[..., 3] / 2) & (left.abs() <= boxes[..., 2] / 2)
