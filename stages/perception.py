"""Stage 0, perception: encoder, agent and map queries learn by detection, tracking and map.

Two ways to learn: `PerceptionLossConfig` judges what the model says by itself (the small query
modules); `ClipLossConfig` is UniAD's, where the ground truth decides through the clip which query
is which agent (TrackFormer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odvla.augmentation import AugmentationConfig, augment
from odvla.errors import UserError
from odvla.freezing import FreezePlan
from odvla.losses.clip import ClipCriterion, ClipLossConfig
from odvla.losses.perception import PerceptionLossConfig
from odvla.metrics.map_segmentation import map_cells
from odvla.outputs import Perception, Teaching, VLAState
from odvla.rows import rows_of
from odvla.types import Batch
from odvla.vla import DrivingVLA
from stages.base import Record, StageConfig, StageLoss, StageModule
from stages.optimisation import LearningRates, OptimiserConfig

TRAINS = FreezePlan(("encoder.*", "queries.*"))
# UniAD trains its image backbone at a tenth of the rate.
OPTIMISER = OptimiserConfig(
    lr=LearningRates(backbone=2e-5, encoder=2e-4, queries=2e-4), weight_decay=0.01
)
LOSSES = PerceptionLossConfig()
DECIMALS = 4


@dataclass(frozen=True)
class PerceptionStageConfig(StageConfig):
    """Settings of stage 0; optimiser and clipping norm are UniAD's."""

    freeze: FreezePlan = TRAINS
    optimiser: OptimiserConfig = OPTIMISER
    gradient_clip: float = 35.0
    losses: PerceptionLossConfig | ClipLossConfig = LOSSES
    augmentation: AugmentationConfig | None = None  # of training images; None: they stay
    min_score: float = 0.02  # detections below are not written
    max_boxes: int = 300  # a key-frame; the devkit takes 500

    def build(self, vla: DrivingVLA, total_steps: int = 1, seed: int = 0) -> PerceptionStage:
        """The stage on a model."""
        return PerceptionStage(vla, self, total_steps, seed)


class PerceptionStage(StageModule):
    """Detection, tracking, map."""

    name = "perception"
    config: PerceptionStageConfig

    def __init__(
        self,
        vla: DrivingVLA,
        config: PerceptionStageConfig,
        total_steps: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(vla, config, total_steps, seed)
        grid = vla.encoder.grid
        if grid is None or not {"track", "map"} & set(vla.queries):
            raise UserError(
                "the perception stage needs a bird's-eye-view encoder and agent or map queries, "
                "which this model lacks; leave the stage out of `run`"
            )
        track = dict(vla.queries.items()).get("track")
        if isinstance(config.losses, ClipLossConfig) and not hasattr(track, "learn"):
            raise UserError(
                "stages.perception.losses is a ClipLossConfig, which needs agent queries that "
                f"learn from a clip (TrackFormerConfig), not {type(track).__name__}"
            )
        self.criterion = config.losses.build(grid)

    def loss_of(self, batch: Batch, state: VLAState | None) -> StageLoss:
        """Named losses, a mean over the clips."""
        clip, teaching = batch.clip, None
        if self.training and self.config.augmentation is not None:
            clip = augment(clip, self.config.augmentation)
        if isinstance(self.criterion, ClipCriterion):
            if len(batch.agents) != len(clip):
                raise UserError("data.perception.targets must hold agents for a ClipLossConfig")
            history = self.criterion.config.history
            teaching = Teaching(batch.agents, self.criterion.matcher, history)
        seen, state = self.vla.perceive(clip, state, teaching=teaching)
        rows = batch.valid
        kept = int(rows.sum())
        if kept == 0:
            return StageLoss(torch.zeros((), device=rows.device), 0, state=state)
        of_map = rows_of(seen.map_predictions, rows), rows_of(batch.map, rows)
        if isinstance(self.criterion, ClipCriterion):
            head = dict(self.vla.queries.items()).get("map")
            parts = self.criterion(rows_of(seen.lessons, rows), head, *of_map)
        else:
            agents = rows_of(seen.agent_steps, rows), rows_of(batch.agents, rows)
            parts = self.criterion(*agents, *of_map)
        if not parts:
            raise UserError("no loss is left: stages.perception.losses or data.perception.targets")
        return StageLoss(torch.stack(list(parts.values())).sum(), kept, parts, state, seen)

    @property
    def predicts_in_validation(self) -> bool:
        """Unless the ground truth helps in a validation, as in UniAD's matching over a clip."""
        return not isinstance(self.criterion, ClipCriterion)

    def records_of(self, found: StageLoss, batch: Batch) -> list[Record]:
        """Of what was judged: to look again would take as long as the validation."""
        if found.seen is None or not self.predicts_in_validation:
            return []
        return self._records(batch, found.seen)

    def predict_rows(self, batch: Batch) -> list[Record]:
        """Detections of every key-frame, and how far its map was met."""
        seen, self.streams["seeing"] = self.vla.perceive(batch.clip, self.streams.get("seeing"))
        return self._records(batch, seen)

    def _records(self, batch: Batch, seen: Perception) -> list[Record]:
        if not seen.agent_steps:
            return []
        found = seen.agent_steps[-1]
        used = found.scores >= self.config.min_score
        if found.mask is not None:
            used &= found.mask
        records = []
        for row, token in batch.valid_rows():
            order = found.scores[row].argsort(descending=True, stable=True)
            chosen = order[used[row, order]][: self.config.max_boxes]
            records.append(
                {
                    "sample_token": token,
                    "kind": "detection",
                    "boxes": _rounded(found.boxes[row, chosen]),
                    "labels": found.labels[row, chosen].tolist(),
                    "scores": _rounded(found.scores[row, chosen]),
                    "track_ids": found.track_ids[row, chosen].tolist(),
                }
            )
        return records + self._map_records(batch, seen)

    def _map_records(self, batch: Batch, seen: Perception) -> list[Record]:
        """Cells of the map that were met, where there are both map and prediction."""
        if seen.map_predictions is None or batch.map is None:
            return []
        inside, either = map_cells(seen.map_predictions, batch.map)
        return [
            {
                "sample_token": token,
                "kind": "map",
                "intersection": inside[row].tolist(),
                "union": either[row].tolist(),
            }
            for row, token in batch.valid_rows()
        ]


def _rounded(values: Tensor) -> list[Any]:
    """Numbers with as many decimals as mean something."""
    return torch.round(values.double().cpu(), decimals=DECIMALS).tolist()
