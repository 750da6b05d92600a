"""What UniAD's panoptic map head minimises (Panoptic SegFormer's losses on a BEV).

Every decoder layer: classes by focal loss, boxes by L1 and GIoU, after a Hungarian matching by the
same. The last layer's matching also says which queries the mask decoder gets ("query filter"); a
second one, with the masks, says which of them paints what; Dice compares the masks after every mask
layer. The drivable area needs no matching. Things and drivable area are balanced by their numbers.

What is unusual: scenes of a batch are matched each for itself and normalised together; frames
without any element are fine.

Shape legend: B rows, Q thing queries, N of them in the mask decoder (padded), M map elements
(padded), K classes of things, P matched pairs of all rows, H x W cells, S = H * W.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odvla.losses.boxes_2d import boxes_of_masks, generalized_iou
from odvla.losses.matching import Matches, focal_cost, focal_loss, hungarian
from odvla.queries.panoptic_map import PanopticMap, corners, in_cells
from odvla.queries.track_life import take
from odvla.types import MapDecoding, MapPredictions, MapTargets

DICE_EPS = 1e-6  # of the loss
DICE_COST_EPS = 1e-3  # of the matching cost
MASK_SCALE = 2  # masks are compared at twice the BEV's resolution
# UniAD's assigner with masks doubles the class weight it is given, in its constructor.
MASKED_CLASS_FACTOR = 2.0
STUFF_CLASS_FACTOR = 2.0  # UniAD's, on top of the class weight
THING_CLASS_FACTOR = 2.0  # the same for things of the mask decoder, before it is multiplied by 0


@dataclass(frozen=True)
class MatchCosts:
    """What a query and an element must have in common to be matched."""

    cls: float = 2.0
    box: float = 5.0
    iou: float = 2.0
    mask: float = 0.0


@dataclass(frozen=True)
class PanopticMapLossConfig:
    """Weights of losses and matchings; the defaults are UniAD's."""

    cls: float = 2.0
    box: float = 5.0
    iou: float = 2.0
    mask: float = 2.0
    # Classes and boxes of things in the mask decoder: UniAD computes these losses and multiplies
    # them by 0. Factors of the weights above.
    mask_layer_cls: float = 0.0
    mask_layer_box: float = 0.0
    layers: MatchCosts = field(default_factory=MatchCosts)
    query_filter: MatchCosts = field(default_factory=MatchCosts)
    masked: MatchCosts = field(
        default_factory=lambda: MatchCosts(cls=2.0 * MASKED_CLASS_FACTOR, mask=2.0)
    )
    # Rounds of matching that choose queries for the mask decoder. UniAD asks for 3, but its loop
    # looks at costs that it has just overwritten and stops after the first, always.
    filter_rounds: int = 1
    # "uniad": boxes of elements end at the index of their last cell. "none": at its far edge.
    compat: Literal["none", "uniad"] = "none"

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: no round of matching.
        """
        if self.filter_rounds < 1:
            raise ValueError(f"filter_rounds must be at least 1, not {self.filter_rounds}")

    def build(self) -> PanopticMapCriterion:
        """The criterion."""
        return PanopticMapCriterion(self)


@dataclass(frozen=True)
class ThingTargets:
    """Map elements as the losses want them."""

    boxes: Tensor  # [B, M, 4] x1, y1, x2, y2 in cells
    labels: Tensor  # int64 [B, M]
    masks: Tensor  # [B, M, H, W] 0 or 1
    mask: Tensor  # bool [B, M]

    @classmethod
    def of(cls, targets: MapTargets, *, far_edge: bool) -> ThingTargets:
        """From masks; elements without a cell on the grid do not count."""
        return cls(
            boxes=boxes_of_masks(targets.masks, far_edge=far_edge),
            labels=targets.labels,
            masks=targets.masks.float(),
            mask=targets.mask & targets.masks.flatten(2).any(-1),
        )


@dataclass(frozen=True)
class Filtered:
    """Queries that the mask decoder gets, padded to the row with the most (one at least)."""

    query: Tensor  # int64 [B, N]
    mask: Tensor  # bool [B, N]
    first: Matches  # of the first round: what the last decoder layer is compared with


class PanopticMapCriterion(nn.Module):
    """Losses of one frame of B scenes; see the module's head.

    Args:
        config: weights.
    """

    def __init__(self, config: PanopticMapLossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, head: PanopticMap, predictions: MapPredictions, targets: MapTargets
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; their sum is what is minimised.

        Args:
            head: the module that made the predictions: its mask decoder is asked once more, for
                the queries that were matched.
            predictions: of B rows.
            targets: of the same rows.

        Returns:
            map_class, map_box, map_iou, map_mask, drivable_class, drivable_mask.

        Raises:
            ValueError: the predictions are not a panoptic head's.
        """
        if predictions.decoding is None:
            raise ValueError(
                "the panoptic map losses need the predictions of PanopticMap, with their decoding"
            )
        things = ThingTargets.of(targets, far_edge=self.config.compat == "none")
        terms = self.terms(head, predictions.decoding, things, targets.drivable)
        losses: dict[str, Tensor] = {}
        for name, term in terms.items():
            kind = _KINDS[name.rsplit(".", 1)[-1].removesuffix("_f")]
            losses[kind] = losses[kind] + term if kind in losses else term
        return losses

    def terms(
        self, head: PanopticMap, decoding: MapDecoding, things: ThingTargets, drivable: Tensor
    ) -> dict[str, Tensor]:
        """Every single loss, by the reference's names.

        `d<n>.` is decoder layer n, or with `_f` at the end mask layer n; without it, the last.

        Args:
            head: see `forward`.
            decoding: of B rows.
            things: of the same rows.
            drivable: bool [B, H, W].
        """
        losses: dict[str, Tensor] = {}
        last = len(decoding.layer_logits) - 1
        for number in range(last):
            logits, boxes = decoding.layer_logits[number], decoding.layer_boxes[number]
            cost = self.cost(logits, boxes, things, self.config.layers)
            everyone = torch.ones_like(logits[..., 0], dtype=torch.bool)
            matches = hungarian(cost, everyone, things.mask)
            losses |= _named(f"d{number}.", self._detection(logits, boxes, matches, things))
        filtered = self.filter(decoding, things)
        last_layer = decoding.layer_logits[-1], decoding.layer_boxes[-1]
        losses |= _named("", self._detection(*last_layer, filtered.first, things))
        positives = max(len(filtered.first.row), 1)
        losses |= self._masks(head, decoding, things, filtered, positives)
        present = drivable.flatten(1).any(1)
        areas = max(int(present.sum()), 1)
        share = positives / (positives + areas)
        losses = {name: loss * share for name, loss in losses.items()}
        area_losses = self._area(head, decoding.memory, drivable.float(), present)
        return losses | {name: loss * (1 - share) for name, loss in area_losses.items()}

    # -- matching ---------------------------------------------------------------------------------

    @torch.no_grad()
    def cost(
        self, logits: Tensor, boxes: Tensor, things: ThingTargets, costs: MatchCosts
    ) -> Tensor:
        """What it costs to match queries with elements [B, Q, M], masks left out.

        Args:
            logits: [B, Q, K].
            boxes: [B, Q, 4] fractions (cx, cy, w, h).
            things: M elements.
            costs: weights.
        """
        size = _size(things)
        labels = things.labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
        of_class = focal_cost(logits).gather(-1, labels)
        apart = (boxes.unsqueeze(2) - _centred(things, size).unsqueeze(1)).abs().sum(-1)
        found = in_cells(corners(boxes), size).unsqueeze(2)
        overlap = generalized_iou(found, things.boxes.unsqueeze(1))
        return costs.cls * of_class + costs.box * apart - costs.iou * overlap

    @torch.no_grad()
    def filter(self, decoding: MapDecoding, things: ThingTargets) -> Filtered:
        """Queries of the last layer that are worth a mask."""
        logits, boxes = decoding.layer_logits[-1], decoding.layer_boxes[-1]
        cost = self.cost(logits, boxes, things, self.config.query_filter)
        free = torch.ones_like(logits[..., 0], dtype=torch.bool)
        rounds = []
        for _ in range(self.config.filter_rounds):
            matches = hungarian(cost, free, things.mask)
            rounds.append(matches)
            free[matches.row, matches.query] = False
        count = max(int((~free).sum(1).max()), 1)
        order = free.to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        return Filtered(order, ~free.gather(1, order), rounds[0])

    @torch.no_grad()
    def match_masks(
        self, decoding: MapDecoding, masks: Tensor, things: ThingTargets, filtered: Filtered
    ) -> Matches:
        """Who paints what; `query` of the result counts the N filtered queries.

        Args:
            decoding: its last layer counts.
            masks: [B, N, S], the mask decoder's final ones.
            things: M elements.
            filtered: which queries the N are.
        """
        costs = self.config.masked
        logits = take(decoding.layer_logits[-1], filtered.query)
        boxes = take(decoding.layer_boxes[-1], filtered.query)
        cost = self.cost(logits, boxes, things, costs)
        wanted = things.masks.flatten(2)
        both = masks @ wanted.transpose(1, 2)
        sums = (masks.square().sum(-1) + DICE_COST_EPS).unsqueeze(2)
        sums = sums + (wanted.square().sum(-1) + DICE_COST_EPS).unsqueeze(1)
        return hungarian(cost + costs.mask * (1 - 2 * both / sums), filtered.mask, things.mask)

    # -- losses -----------------------------------------------------------------------------------

    def _detection(
        self, logits: Tensor, boxes: Tensor, matches: Matches, things: ThingTargets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class, L1 and GIoU losses of a decoder layer."""
        wanted = torch.zeros_like(logits)
        labels = things.labels[matches.row, matches.target]
        wanted[matches.row, matches.query, labels] = 1
        positives = max(len(matches.row), 1)
        classes = self.config.cls * focal_loss(logits, wanted).sum() / positives
        return classes, *self._boxes(boxes, matches, things, positives)

    def _boxes(
        self, boxes: Tensor, matches: Matches, things: ThingTargets, positives: int
    ) -> tuple[Tensor, Tensor]:
        """L1 and GIoU losses of boxes [B, Q, 4] (fractions) that were matched."""
        size = _size(things)
        found = boxes[matches.row, matches.query]
        true = _centred(things, size)[matches.row, matches.target]
        apart = (found - true).abs().sum() / positives
        overlap = generalized_iou(in_cells(corners(found), size), in_cells(corners(true), size))
        return self.config.box * apart, self.config.iou * (1 - overlap).sum() / positives

    def _masks(
        self,
        head: PanopticMap,
        decoding: MapDecoding,
        things: ThingTargets,
        filtered: Filtered,
        positives: int,
    ) -> dict[str, Tensor]:
        """Losses of the things in the mask decoder."""
        query = take(decoding.layer_queries[-1], filtered.query)
        painted = head.thing_masks(decoding.memory, query, paint_layers=True)
        matches = self.match_masks(decoding, painted.mask, things, filtered)
        size = _size(things)
        true = _enlarged(things.masks[matches.row, matches.target])

        def dice(masks: Tensor) -> Tensor:
            own = masks[matches.row, matches.query].unflatten(1, size)
            loss = soft_dice(_enlarged(own), true).sum() + 0 * masks.sum()
            return self.config.mask * loss / positives

        losses = {"loss_mask_things": dice(painted.mask)}
        start = take(decoding.start, filtered.query)
        wanted = torch.zeros_like(take(decoding.layer_logits[-1], filtered.query))
        labels = things.labels[matches.row, matches.target]
        wanted[matches.row, matches.query, labels] = 1
        for number, masks in enumerate(painted.layer_masks):
            losses[f"d{number}.loss_mask_things_f"] = dice(masks)
            x = painted.layer_queries[number]
            boxes = head.boxes(head.mask_reg_branches[number], x, start)
            apart, overlap = self._boxes(boxes, matches, things, positives)
            focal = focal_loss(head.thing_branches[number](x).float(), wanted)
            focal = (focal * filtered.mask.unsqueeze(-1)).sum() / positives
            classes = self.config.cls * THING_CLASS_FACTOR * focal
            # Kept in the sum even at weight 0: no parameter is left without a gradient.
            losses[f"d{number}.loss_cls_f"] = self.config.mask_layer_cls * classes
            losses[f"d{number}.loss_bbox_f"] = self.config.mask_layer_box * apart
            losses[f"d{number}.loss_iou_f"] = self.config.mask_layer_box * overlap
        return losses

    def _area(
        self, head: PanopticMap, memory: Tensor, drivable: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the drivable area [B, H, W]; rows that have none teach its class only."""
        painted = head.stuff_masks(memory, *head.stuff(len(memory)), paint_layers=True)
        count = present.sum().clamp(min=1)
        true = _enlarged(drivable)

        def dice(masks: Tensor) -> Tensor:
            own = _enlarged(masks[:, 0].unflatten(1, drivable.shape[1:]))
            return self.config.mask * (soft_dice(own, true) * present).sum() / count

        losses = {"loss_mask_stuff": dice(painted.mask)}
        for number, (masks, x) in enumerate(
            zip(painted.layer_masks, painted.layer_queries, strict=True)
        ):
            losses[f"d{number}.loss_mask_stuff_f"] = dice(masks)
            logits = head.stuff_branches[number](x).float()[:, 0, 0]
            focal = focal_loss(logits, present.float()).sum() / count
            losses[f"d{number}.loss_cls_stuff_f"] = self.config.cls * STUFF_CLASS_FACTOR * focal
        return losses


# The reference's names to those of the sums.
_KINDS = {
    "loss_cls": "map_class",
    "loss_bbox": "map_box",
    "loss_iou": "map_iou",
    "loss_mask_things": "map_mask",
    "loss_mask_stuff": "drivable_mask",
    "loss_cls_stuff": "drivable_class",
}


def _named(prefix: str, losses: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    names = ("loss_cls", "loss_bbox", "loss_iou")
    return {f"{prefix}{name}": loss for name, loss in zip(names, losses, strict=True)}


def _size(things: ThingTargets) -> tuple[int, int]:
    rows, columns = things.masks.shape[-2:]
    return rows, columns


def _centred(things: ThingTargets, size: tuple[int, int]) -> Tensor:
    """Boxes of the elements [B, M, 4] as fractions (cx, cy, w, h)."""
    rows, columns = size
    low, high = (things.boxes / things.boxes.new_tensor([columns, rows] * 2)).chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def _enlarged(masks: Tensor) -> Tensor:
    """[P, H, W] to [P, S] at MASK_SCALE times the resolution."""
    if len(masks) == 0:
        return masks.flatten(1)
    larger = F.interpolate(masks.unsqueeze(1), scale_factor=MASK_SCALE, mode="bilinear")
    return larger.flatten(1)


def soft_dice(values: Tensor, targets: Tensor) -> Tensor:
    """1 - Dice coefficient with squares in the denominator (V-Net, Milletari et al. 2016).

    Args:
        values: [..., S], >= 0, no logits.
        targets: [..., S].

    Returns:
        [...].
    """
    both = (values * targets).sum(-1)
    sums = values.square().sum(-1) + targets.square().sum(-1) + 2 * DICE_EPS
    return 1 - 2 * both / sums
