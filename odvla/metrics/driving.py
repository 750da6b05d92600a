"""What closed-loop benchmarks score, as far as recorded boxes and maps allow: per sample.

NAVSIM and nuPlan let a simulated car follow its plan and judge what happens. Here nothing is
simulated: the others drive as they did, whatever the plan does, and the plan is taken as driven to
the letter. So these are approximations, for telling plans apart that L2 cannot; they are no
substitute for a closed loop, and a plan that others would have reacted to is judged unfairly.

Shape legend: S samples, T = 6 steps 0.5 s apart, A boxes of a step (padded), K times of a look
ahead. Frame: LIDAR_TOP at t0.

Source: the planning scores of nuPlan and NAVSIM (no at-fault collision, drivable area, time to
collision, comfort, progress; product of the first two times a weighted mean of the rest), reduced
to what 2 Hz annotations give.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from odvla.metrics.collisions import boxes_touch, corners, ego_boxes, headings
from odvla.types import STEP_S

STOPPED_MPS = 0.3  # slower than this somebody stands
# nuPlan's bounds of comfort, m/s^2 and m/s^3.
ACCELERATION = (-4.05, 2.40)
LATERAL = 4.89
JERK_ALONG = 4.13
JERK = 8.37
LOOK_AHEAD_S = (0.3, 0.6, 0.9)  # time to collision: not within this of any step
SHORT_M = 2.0  # a driven path shorter than this asks for no progress
WEIGHTS = {"progress": 5.0, "time_to_collision": 5.0, "comfort": 2.0}


@dataclass(frozen=True)
class DrivingSamples:
    """Scores of S plans, 1 is good; NaN where a part of the ground truth is missing."""

    no_fault_collision: Tensor  # [S] 0 or 1
    drivable_area: Tensor  # [S] 0 or 1
    time_to_collision: Tensor  # [S] 0 or 1
    comfort: Tensor  # [S] 0 or 1
    progress: Tensor  # [S] 0 to 1

    @property
    def composite(self) -> Tensor:
        """The product of the vetoes times the weighted mean of the rest [S]."""
        rest = sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())
        veto = self.no_fault_collision * self.drivable_area.nan_to_num(nan=1.0)
        return veto * rest / sum(WEIGHTS.values())

    def as_rows(self) -> dict[str, Tensor]:
        """All scores by name."""
        names = [field.name for field in fields(self)]
        return {**{name: getattr(self, name) for name in names}, "composite": self.composite}


@dataclass(frozen=True)
class Surroundings:
    """What S samples are judged by; boxes are x, y, width, length, yaw, vx, vy."""

    boxes: Tensor  # [S, T + 1, A, 7] at t0 and the six steps
    mask: Tensor  # bool [S, T + 1, A]
    instance: Tensor  # int64 [S, T + 1, A] who it is
    driven: Tensor  # [S, T, 2]
    recorded: Tensor  # bool [S, T]
    last_steps: Tensor  # [S, 2, 2] motion of the last but one and the last 0.5 s before t0
    drivable: Tensor | None = None  # bool [S, rows, columns], row 0 rearmost, column 0 leftmost
    drivable_origin_m: tuple[float, float] = (-50.0, -50.0)  # x, y of its corner
    drivable_cell_m: float = 0.5


def judge(plans: Tensor, around: Surroundings) -> DrivingSamples:
    """Score plans [S, T, 2]; steps after the recorded future are not judged."""
    heading = headings(plans)
    ego = ego_boxes(plans, heading)
    hit = boxes_touch(ego, around.boxes[:, 1:]) & around.mask[:, 1:]
    excused = _excused(around)
    recorded = around.recorded[..., None]
    contact = hit & ~excused & recorded
    blamed = _blamed(contact, _at_fault(plans, ego, around), around.instance[:, 1:])
    return DrivingSamples(
        no_fault_collision=(~blamed).double(),
        drivable_area=_on_the_road(ego, around),
        time_to_collision=_keeps_distance(plans, heading, ego, around, excused),
        comfort=_comfortable(plans, around),
        progress=progress(plans, around.driven, around.recorded),
    )


def _excused(around: Surroundings) -> Tensor:
    """Boxes [S, T, A] that nobody is blamed for: touched at t0, or by the driven path as well."""
    by_driven = boxes_touch(ego_boxes(around.driven, headings(around.driven)), around.boxes[:, 1:])
    start = torch.zeros_like(around.driven[:, :1])
    at_start = boxes_touch(ego_boxes(start, headings(start)), around.boxes[:, :1])
    touched = at_start[:, 0] & around.mask[:, 0]
    who = torch.where(touched, around.instance[:, 0], -2)  # [S, A]
    same = (around.instance[:, 1:, :, None] == who[:, None, None, :]).any(-1)
    return by_driven | same


def _blamed(contact: Tensor, fault: Tensor, instance: Tensor) -> Tensor:
    """Whether the first contact with anybody is the car's fault: [S, T, A] -> bool [S].

    Who runs into the car from behind drives on through it here, and is ahead of it later.
    """
    blamed = torch.zeros(len(contact), dtype=torch.bool)
    for step in range(contact.shape[1]):
        here = contact[:, step]  # [S, A]
        met = torch.zeros_like(here)
        for before in range(step):
            same = instance[:, step, :, None] == instance[:, before, None, :]
            met |= (same & contact[:, before, None, :]).any(-1)
        blamed |= (here & ~met & fault[:, step]).any(1)
    return blamed


def _at_fault(plans: Tensor, ego: Tensor, around: Surroundings) -> Tensor:
    """Whether a contact with a box [S, T, A] would be the car's own doing.

    It is not while the car stands. It is when the other one stands, or is ahead of the car's
    middle; who runs into the car from behind or from the side is to blame himself.
    """
    speed = _speeds(plans)[..., None]
    boxes = around.boxes[:, 1:]
    others_stand = boxes[..., 5:7].norm(dim=-1) < STOPPED_MPS
    offset = boxes[..., :2].double() - ego[..., None, :2]
    yaw = ego[..., 4]
    ahead = (offset * torch.stack([yaw.cos(), yaw.sin()], dim=-1)[..., None, :]).sum(-1) > 0
    return (speed >= STOPPED_MPS) & (others_stand | ahead)


def _speeds(plans: Tensor) -> Tensor:
    """Speed [S, T] over the step that ends at each point."""
    first = plans.new_zeros(len(plans), 1, 2)
    return torch.diff(plans, dim=1, prepend=first).norm(dim=-1) / STEP_S


def _on_the_road(ego: Tensor, around: Surroundings) -> Tensor:
    """1 where all corners of the car stay on drivable cells at all recorded steps [S]."""
    if around.drivable is None:
        return torch.full((len(ego),), torch.nan, dtype=torch.float64)
    points = corners(ego)  # [S, T, 4, 2]
    x0, y0 = around.drivable_origin_m
    column = ((points[..., 0] - x0) / around.drivable_cell_m).floor().long()
    row = ((points[..., 1] - y0) / around.drivable_cell_m).floor().long()
    rows, columns = around.drivable.shape[1:]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    cell = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    road = around.drivable.flatten(1).gather(1, cell.flatten(1)).view_as(cell)
    # What lies beyond the raster is not known, and not held against the plan.
    fine = road | ~inside
    return (fine.all(-1) | ~around.recorded).all(-1).double()


def _keeps_distance(
    plans: Tensor, heading: Tensor, ego: Tensor, around: Surroundings, excused: Tensor
) -> Tensor:
    """1 where, going straight on from any step, the car hits nobody ahead of it too soon [S].

    Everybody goes on as he moves: the car along its heading at its speed, the others at their
    annotated velocity.
    """
    speed = _speeds(plans)
    way = torch.stack([heading.cos(), heading.sin()], dim=-1) * speed[..., None]
    boxes = around.boxes[:, 1:].double()
    offset = boxes[..., :2] - ego[..., None, :2]
    direction = torch.stack([heading.cos(), heading.sin()], dim=-1)
    ahead = (offset * direction[..., None, :]).sum(-1) > 0
    counts = around.mask[:, 1:] & ~excused & ahead & around.recorded[..., None]
    counts &= (speed >= STOPPED_MPS)[..., None]
    soon = torch.zeros_like(counts)
    for seconds in LOOK_AHEAD_S:
        later_ego = torch.cat([ego[..., :2] + way * seconds, ego[..., 2:]], dim=-1)
        moved = boxes[..., :2] + boxes[..., 5:7] * seconds
        soon |= boxes_touch(later_ego, torch.cat([moved, boxes[..., 2:]], dim=-1))
    return (~(soon & counts).flatten(1).any(1)).double()


def _comfortable(plans: Tensor, around: Surroundings) -> Tensor:
    """1 where accelerations and jerks of the plan stay within nuPlan's bounds [S].

    They are finite differences of half-second steps, the last two driven ones in front, so that a
    plan which starts at another speed than the car has is uncomfortable.
    """
    first = plans.new_zeros(len(plans), 1, 2)
    steps = torch.cat([around.last_steps.to(plans), torch.diff(plans, dim=1, prepend=first)], dim=1)
    velocity = steps / STEP_S  # [S, T + 2, 2]
    acceleration = torch.diff(velocity, dim=1) / STEP_S  # [S, T + 1, 2]
    jerk = torch.diff(acceleration, dim=1) / STEP_S  # [S, T, 2]
    heading = headings(plans)
    along = torch.stack([heading.cos(), heading.sin()], dim=-1)
    across = torch.stack([-heading.sin(), heading.cos()], dim=-1)
    now = acceleration[:, 1:]
    along_a, across_a = (now * along).sum(-1), (now * across).sum(-1)
    along_j = (jerk * along).sum(-1)
    fine = (along_a >= ACCELERATION[0]) & (along_a <= ACCELERATION[1])
    fine &= (across_a.abs() <= LATERAL) & (along_j.abs() <= JERK_ALONG)
    fine &= jerk.norm(dim=-1) <= JERK
    return (fine | ~around.recorded).all(1).double()


def progress(plans: Tensor, driven: Tensor, recorded: Tensor) -> Tensor:
    """Share of the driven way that a plan covers [S], 0 to 1.

    The plan's point at the last recorded step is projected onto the driven polyline. A driven way
    shorter than SHORT_M asks for no progress and gives 1; no recorded step does, too.
    """
    steps = driven.shape[1]
    count = recorded.sum(1)
    zero = driven.new_zeros(len(driven), 1, 2)
    known = torch.where(recorded[..., None], driven, torch.nan)
    path = torch.cat([zero, known], dim=1).double()
    start, end = path[:, :-1], path[:, 1:]
    piece = (end - start).nan_to_num()
    length = piece.norm(dim=-1)  # [S, T]
    total = length.sum(1)
    last = (count - 1).clamp_min(0)
    point = plans.double()[torch.arange(len(plans)), last]
    along = ((point[:, None] - start.nan_to_num()) * piece).sum(-1)
    share = (along / length.square().clamp_min(1e-9)).clamp(0, 1)
    foot = start.nan_to_num() + share[..., None] * piece
    distance = (point[:, None] - foot).norm(dim=-1)
    distance = torch.where(recorded & (length > 1e-6), distance, torch.inf)
    nearest = distance.argmin(1)
    before = torch.cat([length.new_zeros(len(length), 1), length.cumsum(1)], dim=1)[:, :steps]
    rows = torch.arange(len(plans))
    covered = before[rows, nearest] + share[rows, nearest] * length[rows, nearest]
    moving = (total >= SHORT_M) & (count > 0)
    return torch.where(moving, (covered / total.clamp_min(1e-9)).clamp(0, 1), 1.0)
