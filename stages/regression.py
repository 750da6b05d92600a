"""Stage 3 without written plans: a planner regresses them (odvla/planner.py).

Beside the language model, or from its state at the end of the request, with the loss going back
through it.

Its records are those of plans in text, so that the same tables are made of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from odvla.errors import UserError
from odvla.language.waypoints import POINTS, format_waypoints
from odvla.losses.collision import CollisionLossConfig, collision_loss
from odvla.outputs import Perception, Regression, VLAState
from odvla.types import COMMANDS, Batch
from odvla.vla import DrivingVLA
from stages.base import Record, StageLoss, StageModule
from stages.plan_ablations import KIND_OF, Ablation, OtherVision, hide_ego, tell_less

if TYPE_CHECKING:
    from stages.planning import PlanningStageConfig


@dataclass(frozen=True)
class RegressionLossConfig:
    """What a regressed plan is to minimise.

    Args:
        distance: "l2", the distance of each waypoint, as UniAD; "l1", the sum of both coordinates'.
        collision: what driving into others costs beside it; off by default.
    """

    distance: Literal["l2", "l1"] = "l2"
    collision: CollisionLossConfig = field(default_factory=CollisionLossConfig)

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            UserError: there is no such distance.
        """
        if self.distance not in ("l1", "l2"):
            raise UserError(f"planning.regression.distance is l1 or l2, not {self.distance!r}")


class RegressionStage(StageModule):
    """Plans of the car, as numbers."""

    name = "planning"
    config: PlanningStageConfig
    others: OtherVision

    def __init__(
        self, vla: DrivingVLA, config: PlanningStageConfig, total_steps: int = 1, seed: int = 0
    ) -> None:
        super().__init__(vla, config, total_steps, seed)
        if vla.planner is None:
            raise UserError(
                "stages.planning.actions=regression needs a planner: set model.planner.dim=64"
            )
        able = vla.planner.config.reads
        if unable := [name for name in config.planner_reads if name not in able]:
            raise UserError(
                f"stages.planning.planner_reads names {unable[0]!r}, but model.planner.reads has "
                f"{', '.join(able)}"
            )
        self.reads = config.planner_reads or able
        remembered = config.remember_tokens or config.feature_cache
        if remembered and "bev" in self.reads:
            raise UserError(
                "model.planner reads the bird's-eye view, which remembered tokens do not hold: set "
                "stages.planning.remember_tokens=false and feature_cache=false, or let the planner "
                "read streams, model.planner.reads=[scene,track,map]"
            )

    def loss_of(self, batch: Batch, state: VLAState | None) -> StageLoss:
        """Mean distance of the known waypoints, and what collisions cost."""
        if batch.plan is None:
            raise UserError("the batch lacks plan targets")
        found = self.regress(batch, state, seen=self.recall(batch))
        order = 2 if self.config.regression.distance == "l2" else 1
        known = batch.plan.mask & (batch.valid & found.asked)[:, None]
        count = int(known.sum())
        # An unknown waypoint may be anything, and would reach the gradient even if masked later.
        gaps = torch.where(known[..., None], found.waypoints - batch.plan.waypoints, 0.0)
        loss = torch.linalg.vector_norm(gaps, order, dim=-1).sum() / max(1, count)
        parts: dict[str, torch.Tensor] = {}
        collision = self.config.regression.collision
        if collision.weight:
            if batch.traffic is None:
                raise UserError(
                    "stages.planning.regression.collision needs the boxes of others: set "
                    "data.planning.targets=[traffic]"
                )
            driven = batch.plan.waypoints
            cost = collision_loss(found.waypoints, driven, known, batch.traffic, collision)
            parts = {"distance": loss.detach(), "collision": cost.detach()}
            loss = loss + collision.weight * cost
        return StageLoss(self.vla.counted(loss), count, parts, found.state)

    def regress(
        self,
        batch: Batch,
        state: VLAState | None = None,
        *,
        blind: bool = False,
        seen: Perception | None = None,
    ) -> Regression:
        """Plans from what this stage reads; see DrivingVLA.regress."""
        return self.vla.regress(batch, state, reads=self.reads, blind=blind, seen=seen)

    def on_test_epoch_start(self) -> None:
        """Streams start anew."""
        super().on_test_epoch_start()
        self.others = OtherVision()

    def predict_rows(self, batch: Batch) -> list[Record]:
        """One plan a key-frame, and one for everything that is hidden in turn."""
        records, seen = self._plans(batch, "plan", "seeing", seen=self.recall(batch))
        for ablation in self.config.ablations:
            kind = KIND_OF[ablation]
            if ablation == "no_vision":
                found, _ = self._plans(batch, kind, "blind", blind=True)
            elif ablation == "other_vision":
                other = self.others.swap(batch)
                found, _ = self._plans(other, kind, ablation, batch, seen=self.recall(other))
            else:
                less = self._told_less(batch, ablation)
                found, _ = self._plans(less, kind, ablation, batch, seen=seen)
            records += found
        return records

    def _told_less(self, batch: Batch, ablation: Ablation) -> Batch:
        """The batch without a part of the ego state, in numbers and in requests that are read."""
        assert batch.ego is not None
        if "language" not in self.reads or batch.talk is None:
            return replace(batch, ego=hide_ego(batch.ego, ablation))
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return tell_less(batch, ablation, data.dialect, self.vla.tokenizer)

    def _plans(
        self,
        batch: Batch,
        kind: str,
        stream: str,
        owner: Batch | None = None,
        *,
        blind: bool = False,
        seen: Perception | None = None,
    ) -> tuple[list[Record], Perception]:
        """Plans of one kind for the key-frames of `owner` (the batch), and what was seen."""
        owner = owner or batch
        with torch.no_grad():
            found = self.regress(batch, self.streams.get(stream), blind=blind, seen=seen)
        self.streams[stream] = found.state
        return [
            self.record(found.waypoints[r].tolist(), kind, owner, r, t)
            for r, t in owner.valid_rows()
            if found.asked[r]
        ], found.perception

    def record(
        self, waypoints: list[list[float]], kind: str, batch: Batch, row: int, token: str
    ) -> Record:
        """A plan beside the path that was driven, as the records of plans in text have it."""
        if batch.plan is None or batch.ego is None:
            raise UserError(f"the batch of {token} lacks plan targets or ego state")
        return {
            "id": f"{token}_trajectory",
            "sample_token": token,
            "kind": kind,
            "question": "",
            "text": format_waypoints(waypoints),
            "meta": {"command": COMMANDS[int(batch.ego.command[row])], **POINTS.as_meta()},
            "waypoints": [[round(x, 4), round(y, 4)] for x, y in waypoints],
            "failure": None,
            "reference": batch.plan.waypoints[row].tolist(),
            "mask": batch.plan.mask[row].tolist(),
        }
