"""What stage 0 minimises: detection, tracking and map losses, as in UniAD's first stage.

Agents: a carried query stays bound to the annotated instance it was matched with a step earlier;
all other queries and instances are matched by cost. Map: things by cost, the drivable area alone.

Shape legend: B rows, Q queries, A agents, M map elements, K classes, H x W BEV cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla import geometry
from odvla.losses.matching import (
    Matches,
    dice_loss,
    focal_cost,
    focal_loss,
    gaussian_focal_loss,
    hungarian,
)
from odvla.types import (
    MAP_CLASSES,
    AgentPredictions,
    AgentTargets,
    BevGrid,
    MapPredictions,
    MapTargets,
)

# x, y, z, log w, log l, log h, sin, cos, vx, vy: what an error of 1 in each counts.
CODE_WEIGHTS = (1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.2, 0.2)
NO_OBJECT = len(MAP_CLASSES)
MASK_POSITIVE_WEIGHT = 3.0  # lines fill few cells
BESIDE_WEIGHT = 0.25  # of proposals in cells beside an agent's


@dataclass(frozen=True)
class PerceptionLossConfig:
    """Weights of the losses (0 turns one off) and of the matching costs."""

    heatmap: float = 1.0
    agent_class: float = 2.0
    cell_box: float = 0.5
    agent_box: float = 0.5
    map_class: float = 1.0
    map_mask: float = 1.0
    map_dice: float = 1.0
    drivable: float = 2.0
    no_object: float = 0.2  # of unmatched map queries in their cross-entropy
    cost_class: float = 2.0
    cost_box: float = 0.25
    # Pairs farther apart are not matched (carried queries excepted). Newborn queries start at peaks
    # of the heatmap: where it missed an agent, only the heatmap can learn to find it.
    match_within_m: float = 8.0
    heat_sigma_cells: float = 0.7

    def build(self, grid: BevGrid) -> PerceptionCriterion:
        """The criterion for predictions on `grid`."""
        return PerceptionCriterion(self, grid)


def heat_targets(targets: AgentTargets, grid: BevGrid, classes: int, sigma: float) -> Tensor:
    """A Gaussian with peak 1 on the cell of each agent's centre: [B, K, H, W].

    Args:
        targets: agents; those outside the grid make no peak.
        grid: the heatmap's cells.
        classes: K.
        sigma: in cells.
    """
    unit = geometry.to_bev_unit(grid, targets.boxes[..., :2])
    cell = (unit * unit.new_tensor([grid.columns, grid.rows])).floor()  # B, A, 2
    x = torch.arange(grid.columns, device=cell.device) - cell[..., :1]
    y = torch.arange(grid.rows, device=cell.device) - cell[..., 1:]
    blob = (-(x[..., None, :] ** 2 + y[..., :, None] ** 2) / (2 * sigma**2)).exp()  # B, A, H, W
    inside = targets.mask & (unit >= 0).all(-1) & (unit < 1).all(-1)
    blob = blob * inside[..., None, None]
    heat = blob.new_zeros(len(blob), classes, grid.rows, grid.columns)
    index = targets.labels[..., None, None].expand_as(blob)
    return heat.scatter_reduce(1, index, blob, "amax")


class PerceptionCriterion(nn.Module):
    """Losses of a clip; see the module's head.

    Args:
        config: weights.
        grid: the BEV's cells.
    """

    code_weights: Tensor

    def __init__(self, config: PerceptionLossConfig, grid: BevGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)

    def forward(
        self,
        agent_steps: tuple[AgentPredictions, ...],
        agent_targets: tuple[AgentTargets, ...],
        map_predictions: MapPredictions | None,
        map_targets: MapTargets | None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; their sum is what is minimised.

        Args:
            agent_steps: predictions of the clip's steps, oldest first; the first one's carried
                queries (tracks from before the clip) count as unbound.
            agent_targets: one item a step, or none at all.
            map_predictions: of the last step, or None.
            map_targets: of the last step, or None.

        Returns:
            heatmap, cell_box, agent_class, agent_box, map_class, map_mask, map_dice, drivable;
            those without predictions or targets, or with weight 0, are left out.
        """
        losses: dict[str, Tensor] = {}
        if agent_steps and agent_targets:
            losses |= self._agents(agent_steps, agent_targets)
        if map_predictions is not None and map_targets is not None:
            losses |= self._map(map_predictions, map_targets)
        return {
            name: getattr(self.config, name) * loss
            for name, loss in losses.items()
            if getattr(self.config, name) != 0
        }

    def _agents(
        self, steps: tuple[AgentPredictions, ...], targets: tuple[AgentTargets, ...]
    ) -> dict[str, Tensor]:
        names = ["agent_class", "agent_box"]
        names += ["heatmap"] * (steps[0].heatmap is not None)
        names += ["cell_box"] * (steps[0].cell_codes is not None)
        total = {name: steps[0].layer_logits[-1].new_zeros(()) for name in names}
        bound: Tensor | None = None  # instance of each query of the previous step, -1: none
        for predicted, target in zip(steps, targets, strict=True):
            matches, bound = self.match(predicted, target, bound)
            positives = max(len(matches.row), 1)
            if predicted.heatmap is not None:
                heat = heat_targets(
                    target, self.grid, predicted.heatmap.shape[1], self.config.heat_sigma_cells
                )
                peaks = (heat == 1).sum().clamp(min=1)
                total["heatmap"] += gaussian_focal_loss(predicted.heatmap, heat).sum() / peaks
            if predicted.cell_codes is not None:
                total["cell_box"] += self._proposals(predicted.cell_codes, target)
            wanted = torch.zeros_like(predicted.layer_logits[-1])
            labels = target.labels[matches.row, matches.target]
            wanted[matches.row, matches.query, labels] = 1
            code = geometry.box_code(target.boxes[matches.row, matches.target])
            for logits, boxes in zip(predicted.layer_logits, predicted.layer_boxes, strict=True):
                total["agent_class"] += focal_loss(logits, wanted).sum() / positives
                error = geometry.box_code(boxes[matches.row, matches.query]) - code
                total["agent_box"] += (error.abs() * self.code_weights).sum() / positives
        layers = len(steps[0].layer_logits)
        total["agent_class"] /= layers
        total["agent_box"] /= layers
        return {name: value / len(steps) for name, value in total.items()}

    def _proposals(self, cell_codes: Tensor, target: AgentTargets) -> Tensor:
        """Error of the boxes proposed by the cells under agents' centres and, less, around them.

        Peaks of a young heatmap lie beside the centre as often as on it.
        """
        size = target.boxes.new_tensor([self.grid.columns, self.grid.rows])
        centre = (geometry.to_bev_unit(self.grid, target.boxes[..., :2]) * size).floor()  # B, A, 2
        code = geometry.box_code(target.boxes)
        total = cell_codes.new_zeros(())
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                cell = centre + centre.new_tensor([dx, dy])
                inside = target.mask & (cell >= 0).all(-1) & (cell < size).all(-1)
                row, agent = inside.nonzero(as_tuple=True)
                x, y = cell[row, agent].long().unbind(-1)
                error = (cell_codes[row, :, y, x] - code[row, agent]).abs() * self.code_weights
                total = total + error.sum() * (1.0 if dx == dy == 0 else BESIDE_WEIGHT)
        return total / ((1 + 8 * BESIDE_WEIGHT) * target.mask.sum().clamp(min=1))

    @torch.no_grad()
    def match(
        self, predicted: AgentPredictions, target: AgentTargets, bound: Tensor | None
    ) -> tuple[Matches, Tensor]:
        """Who is who in one step.

        Args:
            predicted: Q queries.
            target: A agents.
            bound: int64 [B, Q'] instance (track id) of each query of the previous step, -1: none;
                None: no previous step.

        Returns:
            The matches, and the instances [B, Q] that the queries are bound to from now on. A query
            whose instance is not annotated now keeps it, as background.
        """
        used = predicted.mask
        if used is None:
            used = torch.ones_like(predicted.track_ids, dtype=torch.bool)
        owner = torch.full_like(predicted.track_ids, -1)
        if bound is not None:
            source = predicted.carried_from
            owner = torch.where(source >= 0, bound.gather(1, source.clamp(min=0)), -1)
        same = (owner.unsqueeze(-1) == target.track_ids.unsqueeze(1)) & (owner >= 0).unsqueeze(-1)
        same &= target.mask.unsqueeze(1) & used.unsqueeze(-1)  # B, Q, A
        kept_row, kept_query, kept_target = same.nonzero(as_tuple=True)
        cost = self._agent_cost(predicted, target)
        free = hungarian(cost, used & (owner < 0), target.mask & ~same.any(1))
        apart = (
            predicted.boxes[free.row, free.query, :2] - target.boxes[free.row, free.target, :2]
        ).norm(dim=-1)
        near = apart <= self.config.match_within_m
        free = Matches(free.row[near], free.query[near], free.target[near])
        matches = Matches(
            torch.cat([kept_row, free.row]),
            torch.cat([kept_query, free.query]),
            torch.cat([kept_target, free.target]),
        )
        owner[free.row, free.query] = target.track_ids[free.row, free.target]
        return matches, owner

    def _agent_cost(self, predicted: AgentPredictions, target: AgentTargets) -> Tensor:
        batch, agents = target.labels.shape
        logits = predicted.layer_logits[-1]
        labels = target.labels.unsqueeze(1).expand(batch, logits.shape[1], agents)
        of_class = focal_cost(logits).gather(-1, labels)
        # A query can only learn the box of a thing near it: the centre decides.
        centres = predicted.boxes[..., None, :2] - target.boxes[:, None, :, :2]
        distance = centres.abs().sum(-1)
        return self.config.cost_class * of_class + self.config.cost_box * distance

    def _map(self, predicted: MapPredictions, target: MapTargets) -> dict[str, Tensor]:
        masks = target.masks.flatten(2).float()  # B, M, S
        names = ("map_class", "map_mask", "map_dice")
        total = {name: masks.new_zeros(()) for name in names}
        class_weights = masks.new_ones(NO_OBJECT + 1)
        class_weights[NO_OBJECT] = self.config.no_object
        for logits, mask_logits in zip(predicted.layer_logits, predicted.layer_masks, strict=True):
            painted = mask_logits.flatten(2)
            everyone = torch.ones(painted.shape[:2], dtype=torch.bool, device=painted.device)
            cost = self._map_cost(logits, painted, target.labels, masks)
            matches = hungarian(cost, everyone, target.mask)
            wanted = torch.full_like(everyone, NO_OBJECT, dtype=torch.int64)
            wanted[matches.row, matches.query] = target.labels[matches.row, matches.target]
            total["map_class"] += F.cross_entropy(logits.transpose(1, 2), wanted, class_weights)
            own = painted[matches.row, matches.query]
            true = masks[matches.row, matches.target]
            positives = max(len(own), 1)
            total["map_mask"] += _line_bce(own, true).sum() / positives
            total["map_dice"] += dice_loss(own, true).sum() / positives
        total = {name: value / len(predicted.layer_logits) for name, value in total.items()}
        drivable = target.drivable.flatten(1).float()
        area = predicted.drivable.flatten(1)
        bce = F.binary_cross_entropy_with_logits(area, drivable)
        return total | {"drivable": bce + dice_loss(area, drivable).mean()}

    @torch.no_grad()
    def _map_cost(self, logits: Tensor, painted: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        """[B, Q, M], without ever making a [B, Q, M, S] tensor."""
        cells = painted.shape[-1]
        index = labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
        of_class = -logits.softmax(-1).gather(-1, index)
        on, off = F.softplus(-painted), F.softplus(painted)  # BCE where the target is 1 and 0
        across = masks.transpose(1, 2)
        bce = MASK_POSITIVE_WEIGHT * (on @ across) + off @ (1 - across)
        probability = painted.sigmoid()
        overlap = probability @ across
        sums = probability.sum(-1, keepdim=True) + masks.sum(-1).unsqueeze(1)
        dice = 1 - (2 * overlap + 1) / (sums + 1)
        weights = self.config
        return (
            weights.map_class * of_class + weights.map_mask * bce / cells + weights.map_dice * dice
        )


def _line_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean BCE [P] of masks [P, S] of thin lines: a missed cell counts more than a false one."""
    weight = logits.new_tensor(MASK_POSITIVE_WEIGHT)
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    return loss.mean(-1)
