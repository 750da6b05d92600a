"""Batches of noise with every field set, to try a model's parts without any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from odvla.encoders.protocol import fake_frames
from odvla.language.action_bins import ActionBins
from odvla.language.prompts import Dialect
from odvla.language.tokenizer import ChatTokenizer, train_tokenizer
from odvla.language.waypoints import format_future, format_waypoints, future_as_json
from odvla.types import (
    COMMANDS,
    DETECTION_CLASSES,
    HISTORY,
    MAP_CLASSES,
    WAYPOINTS,
    AgentTargets,
    Batch,
    BevGrid,
    Conversation,
    EgoState,
    MapTargets,
    PlanTargets,
    TrafficTargets,
)

FAKE_BINS = 256  # of plans of action tokens
AGENTS = 4  # annotated agents of a fake frame
SWEEP_POINTS = 34_700  # about what nuScenes' LIDAR_TOP sees in a turn


def fake_tokenizer(
    dialect: Dialect | None = None, vocab_size: int = 400, action_tokens: int = 0
) -> ChatTokenizer:
    """A tokenizer trained on the fake conversations of a dialect."""
    conversations = fake_conversations(fake_plan(4, 0), fake_ego(4, 0), ("plan", "qa"), dialect)
    texts = (t.text for c in conversations for t in c.turns)
    return train_tokenizer(texts, vocab_size, action_tokens)


def fake_batch(
    tokenizer: ChatTokenizer | None,
    *,
    rows: int = 2,
    steps: int = 1,
    image_size: tuple[int, int] = (160, 90),
    lidar_points: int = 0,
    grid: BevGrid | None = None,
    kinds: Sequence[str] = ("plan",),
    dialect: Dialect | None = None,
    seed: int = 0,
) -> Batch:
    """A batch of noise.

    Args:
        tokenizer: None: the batch has no talk.
        rows: clips B.
        steps: key-frames T of a clip.
        image_size: width, height.
        lidar_points: of a sweep; 0: no lidar.
        grid: where map targets are rastered; None: no map targets.
        kinds: conversations a row has.
        dialect: their wording; None: compact.
        seed: of all noise.
    """
    generator = torch.Generator().manual_seed(seed)
    agents = [_fake_agents(rows, generator) for _ in range(steps)]
    plan, ego = fake_plan(rows, seed), fake_ego(rows, seed)
    talk = None
    if tokenizer is not None:
        boxes = agents[-1].boxes[:, 0]
        conversations = fake_conversations(plan, ego, kinds, dialect, boxes)
        owners = [row for row in range(rows) for _ in kinds]
        talk = tokenizer.tokenise(conversations, owners)
    return Batch(
        clip=tuple(
            fake_frames(rows, image_size, seed, step=step, lidar_points=lidar_points)
            for step in range(steps)
        ),
        valid=torch.ones(rows, dtype=torch.bool),
        ego=ego,
        agents=tuple(agents),
        map=_fake_map(rows, grid, generator) if grid is not None else None,
        plan=plan,
        talk=talk,
        traffic=_fake_traffic(rows, seed),
    )


def sweep_points(encoder: object) -> int:
    """Points of the lidar sweep that an encoder's config asks for; 0: it reads none."""
    return SWEEP_POINTS if getattr(encoder, "needs_lidar", False) else 0


def fake_conversations(
    plan: PlanTargets,
    ego: EgoState,
    kinds: Sequence[str],
    dialect: Dialect | None = None,
    object_boxes: torch.Tensor | None = None,
) -> list[Conversation]:
    """One conversation of each kind for each row; object_boxes [B, 9] for kinds with an object."""
    dialect = dialect or Dialect("compact")
    conversations = []
    form = dialect.plan_form
    if form.values == "tokens" and form.bins is None:
        form = replace(form, bins=ActionBins.of(plan.waypoints, FAKE_BINS))
    for row, waypoints in enumerate(plan.waypoints):
        one = EgoState(**{name: value[row : row + 1] for name, value in vars(ego).items()})
        driven = future_as_json(waypoints, np.ones(len(waypoints)))
        for kind in kinds:
            answers = {
                "plan": format_waypoints(waypoints, form, one.last_step[0]),
                "agent": format_future(waypoints, decimals=form.decimals),
            }
            answer = answers.get(kind, "There is a car ahead.")
            has_object = kind in ("agent", "caption_object") and object_boxes is not None
            conversations.append(
                Conversation(
                    id=f"fake-{row}-{kind}",
                    sample_token=f"fake-{row}",
                    kind=kind,
                    turns=dialect.turns(kind, answer, one, "What is ahead?"),
                    reference=answer,
                    meta=form.as_meta() | ({"driven": driven} if kind == "agent" else {}),
                    object_box=tuple(object_boxes[row].tolist())
                    if has_object and object_boxes is not None
                    else None,
                )
            )
    return conversations


def fake_plan(rows: int, seed: int) -> PlanTargets:
    """Plans of cars that drive on, more or less."""
    generator = torch.Generator().manual_seed(seed + 1)
    steps = torch.randn(rows, WAYPOINTS, 2, generator=generator) * 0.3
    steps[..., 1] += 3.0
    return PlanTargets(steps.cumsum(1), torch.ones(rows, WAYPOINTS, dtype=torch.bool))


def fake_ego(rows: int, seed: int) -> EgoState:
    """Noise as the state of cars."""
    generator = torch.Generator().manual_seed(seed + 2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    return EgoState(
        velocity=noise(2),
        yaw_rate=noise(),
        acceleration=noise(2),
        can_accel=noise(2),
        heading_speed=noise(),
        steering=noise(),
        history=noise(HISTORY, 2),
        command=torch.randint(len(COMMANDS), (rows,), generator=generator),
    )


def _fake_agents(rows: int, generator: torch.Generator) -> AgentTargets:
    boxes = torch.zeros(rows, AGENTS, 9)
    boxes[..., :2] = torch.rand(rows, AGENTS, 2, generator=generator) * 40 - 20
    boxes[..., 3:6] = torch.tensor([1.9, 4.5, 1.6])
    shape = (rows, AGENTS)
    later = torch.Generator().manual_seed(3)
    ego = torch.zeros(rows, 9)
    ego[:, 3:7] = torch.tensor([1.73, 4.08, 1.56, torch.pi / 2])
    return AgentTargets(
        boxes=boxes,
        labels=torch.randint(len(DETECTION_CLASSES), shape, generator=generator),
        track_ids=torch.arange(AGENTS).expand(shape).clone(),
        mask=torch.ones(shape, dtype=torch.bool),
        future=torch.randn(*shape, WAYPOINTS, 2, generator=generator),
        future_mask=torch.ones(*shape, WAYPOINTS, dtype=torch.bool),
        past=torch.randn(*shape, 4, 2, generator=later),
        past_mask=torch.ones(*shape, 4, dtype=torch.bool),
        ego=ego,
    )


def _fake_traffic(rows: int, seed: int) -> TrafficTargets:
    """Some boxes ahead at each step."""
    generator = torch.Generator().manual_seed(seed + 4)
    count = AGENTS * WAYPOINTS
    boxes = torch.rand(rows, count, 5, generator=generator) * torch.tensor([20.0, 24, 0, 0, 6])
    boxes += torch.tensor([-10.0, 0.0, 1.9, 4.5, 0.0])
    return TrafficTargets(
        boxes=boxes,
        step=torch.arange(WAYPOINTS).repeat(AGENTS).expand(rows, count).clone(),
        mask=torch.ones(rows, count, dtype=torch.bool),
    )


def _fake_map(rows: int, grid: BevGrid, generator: torch.Generator) -> MapTargets:
    elements = len(MAP_CLASSES)
    raster = (rows, elements, grid.rows, grid.columns)
    return MapTargets(
        masks=torch.rand(raster, generator=generator) < 0.1,
        labels=torch.arange(elements).expand(rows, elements).clone(),
        mask=torch.ones(rows, elements, dtype=torch.bool),
        drivable=torch.rand(rows, grid.rows, grid.columns, generator=generator) < 0.5,
    )
