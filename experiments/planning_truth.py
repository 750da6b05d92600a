"""What plans are held to: driven paths, other road users, and a check that the metric is sane.

Shape legend: S key-frames of a split, T = 6 steps 0.5 s apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.ego_state import UNIAD_PLAN_POINT_M
from datamodules.nuscenes import EvaluationFrame, NuScenesDataModule
from datamodules.occupancy import VEHICLES, metric_orientation
from datamodules.road_users import RoadUsers, road_users
from odvla.errors import UserError
from odvla.metrics.collisions import Traffic, collisions
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import DATA_ROOT, ProtocolCard
from odvla.types import COMMANDS, DETECTION_CLASSES, STEP_S, EgoState

CHUNK = 256  # samples whose rasters are in memory at once (62 MB)
DRIVEN_POINTS = {"lidar": 0.0, "uniad": UNIAD_PLAN_POINT_M}


@dataclass(frozen=True)
class PlanningSplit:
    """Key-frames side by side: ego states [S], driven paths [S, 6, 2], masks [S, 6]."""

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    ego: EgoState
    waypoints: Tensor
    mask: Tensor

    def rows(self, rows: Sequence[int]) -> PlanningSplit:
        """Some of the key-frames."""
        picked = torch.tensor(rows, dtype=torch.long)
        return PlanningSplit(
            tokens=tuple(self.tokens[row] for row in rows),
            scenes=tuple(self.scenes[row] for row in rows),
            ego=EgoState(**{name: value[picked] for name, value in vars(self.ego).items()}),
            waypoints=self.waypoints[picked],
            mask=self.mask[picked],
        )

    @property
    def commands(self) -> list[str]:
        """Command of every key-frame."""
        return [COMMANDS[number] for number in self.ego.command.tolist()]

    @property
    def speeds_mps(self) -> list[float]:
        """Speed of every key-frame over the last half second."""
        return (self.ego.last_step.norm(dim=-1) / STEP_S).tolist()


def planning_split(frames: Iterable[EvaluationFrame]) -> PlanningSplit:
    """Stack the key-frames of a split."""
    rows = list(frames)
    fields = {
        name: torch.cat([getattr(row.ego, name) for row in rows])
        for name in EgoState.__dataclass_fields__
    }
    return PlanningSplit(
        tokens=tuple(row.sample_token for row in rows),
        scenes=tuple(row.scene_name for row in rows),
        ego=EgoState(**fields),
        waypoints=torch.cat([row.plan.waypoints for row in rows]),
        mask=torch.cat([row.plan.mask for row in rows]),
    )


@dataclass(frozen=True)
class GivenRasters:
    """Rasters that somebody's file holds instead of ours."""

    source: str  # what stands for their content
    of: Callable[[str], NDArray[np.bool_]]  # token -> [6, 200, 200] as the metric reads them


@dataclass
class PlanningTruth:
    """The ground truth of a split, read piece by piece as protocols ask for it.

    `source` stands for a file that driven paths and masks of the split were taken from, `rasters`
    are those of files, by whom they show; what no file has is computed from the data root.
    """

    data: NuScenesDataModule
    split: PlanningSplit
    split_name: str = "val"
    _driven: dict[str, Tensor] = field(default_factory=dict)
    source: str = DATA_ROOT
    rasters: Mapping[str, GivenRasters] = field(default_factory=dict)

    @classmethod
    def of(cls, data: NuScenesDataModule, split: str = "val") -> PlanningTruth:
        """All key-frames of a split.

        Raises:
            UserError: the root has no such split.
        """
        return cls(data, planning_split(data.evaluation_frames(split)), split)

    def rows(self, rows: Sequence[int]) -> PlanningTruth:
        """Of some of the key-frames."""
        picked = torch.tensor(rows, dtype=torch.long)
        driven = {name: path[picked] for name, path in self._driven.items()}
        return replace(self, split=self.split.rows(rows), _driven=driven)

    def card(self, card: ProtocolCard) -> ProtocolCard:
        """A protocol's card with where this truth is from."""
        given = self.rasters.get(card.occupancy) if card.geometry == "raster" else None
        if given is not None:
            card = replace(card, traffic=given.source)
        return card if self.source == DATA_ROOT else replace(card, driven="file", truth=self.source)

    def driven(self, card: ProtocolCard) -> Tensor:
        """Driven paths [S, 6, 2] of the point that a protocol follows."""
        if card.driven == "lidar" or self.source != DATA_ROOT:
            return self.split.waypoints
        if card.driven not in self._driven:
            height_m = DRIVEN_POINTS[card.driven]
            frames = self.data.evaluation_frames(self.split_name, height_m=height_m)
            by_token = {frame.sample_token: frame.plan.waypoints for frame in frames}
            paths = [by_token[token] for token in self.split.tokens]
            self._driven[card.driven] = torch.cat(paths)
        return self._driven[card.driven]

    def chunks(self, cards: Iterable[ProtocolCard]) -> Iterable[tuple[slice, TrafficOf]]:
        """Rows, a few at a time, and the traffic that each of the protocols asks for."""
        cards = list(cards)
        for start in range(0, len(self.split.tokens), CHUNK):
            here = slice(start, min(start + CHUNK, len(self.split.tokens)))
            tokens = self.split.tokens[here]
            kinds = {card.occupancy for card in cards if card.geometry == "raster"}
            rasters = {str(kind): self._raster(tokens, kind) for kind in sorted(kinds)}
            polygons = any(card.geometry == "polygons" for card in cards)
            users = [self.users(token) for token in tokens] if polygons else []

            def traffic(
                card: ProtocolCard,
                rasters: dict[str, Tensor] = rasters,
                users: list[RoadUsers] = users,
            ) -> Traffic:
                if card.geometry == "raster":
                    return Traffic(raster=rasters[card.occupancy])
                return box_traffic(users, card.occupancy)

            yield here, traffic

    def users(self, token: str) -> RoadUsers:
        """Road users from t0 on."""
        return road_users(self.data.index, self.data.index.frame(token))

    def _raster(self, tokens: Sequence[str], occupancy: str) -> Tensor:
        if occupancy == "every_box":
            raise UserError("a protocol with occupancy every_box needs geometry polygons")
        pedestrians = occupancy == "vehicles+pedestrians"
        given = self.rasters.get(occupancy)
        rasters: NDArray[np.bool_] | None = None
        for row, token in enumerate(tokens):
            if given is not None:
                cells = given.of(token)
            else:
                found = self.data.occupancy(token, pedestrians=pedestrians).numpy()
                cells = metric_orientation(found)
            if rasters is None:
                rasters = np.empty((len(tokens), *cells.shape), dtype=bool)
            rasters[row] = cells
        return torch.from_numpy(rasters)


TrafficOf = Callable[[ProtocolCard], Traffic]


def box_traffic(users: Sequence[RoadUsers], occupancy: str) -> Traffic:
    """Boxes at the six steps of several samples, of those whom a protocol counts."""
    wanted = [DETECTION_CLASSES.index(name) for name in VEHICLES]
    if occupancy == "vehicles+pedestrians":
        wanted.append(DETECTION_CLASSES.index("pedestrian"))
    width = max((one.mask.shape[1] for one in users), default=0)
    steps = users[0].mask.shape[0] - 1
    boxes = np.zeros((len(users), steps, width, 7), dtype=np.float32)
    mask = np.zeros(boxes.shape[:3], dtype=bool)
    for row, one in enumerate(users):
        count = one.mask.shape[1]
        boxes[row, :, :count] = one.boxes[1:]
        counted = one.points > 0 if occupancy == "every_box" else np.isin(one.label, wanted)
        mask[row, :, :count] = (one.mask & counted)[1:]
    return Traffic(boxes=torch.from_numpy(boxes), mask=torch.from_numpy(mask))


class GroundTruthCheck:
    """Scores the driven paths as if they were plans; stops where that does not come out perfect.

    A wrong frame, a flipped raster or a second transformation shows here and nowhere else (a
    re-scorer of others' plans once printed 23.7 m for that reason).

    Args:
        cards: the protocols by name.
    """

    def __init__(self, cards: Mapping[str, ProtocolCard]) -> None:
        # The first process alone evaluates, also where others live: nothing is to be gathered.
        self.metrics = {
            name: PlanningMetric(card, sync_on_compute=False) for name, card in cards.items()
        }

    def add(
        self, name: str, tokens: Sequence[str], driven: Tensor, mask: Tensor, traffic: Traffic
    ) -> None:
        """Check some samples under one protocol.

        Raises:
            UserError: the L2 is not 0, a collision was counted on the driven path, or no sample
                counts under the protocol.
        """
        one = PlanningMetric(self.metrics[name].card, sync_on_compute=False)
        # The plans are a copy: nothing of the metric can compare a thing with itself.
        one.update(tokens, driven.clone(), driven, mask, traffic)
        try:
            found = one.samples()
        except ValueError as error:
            raise UserError(f"the ground truth under {name!r}: {error}") from error
        if float(found.l2_m.max()) > 0 or bool(found.hits.any()):
            raise UserError(
                f"the ground truth scored against itself under {name!r} has an L2 of up to "
                f"{float(found.l2_m.max())} m and {int(found.hits.sum())} collisions instead of 0: "
                "the evaluation is broken, nothing was scored"
            )
        again = collisions(driven, traffic, replace(one.card, shape="box"))
        order = np.argsort(np.array(tokens))
        if not torch.equal(found.driven_hits, again[torch.from_numpy(order)]):
            raise UserError(
                f"the ground truth under {name!r} collides at other steps than were counted: the "
                "evaluation is broken, nothing was scored"
            )
