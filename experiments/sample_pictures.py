"""Pictures of samples with what the model said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.nuscenes import NuScenesDataModule
from experiments.evaluation import read_predictions
from experiments.pictures import ScenePicture, draw_scene, save_picture
from odvla.types import Batch, BevGrid

MIN_SCORE = 0.3  # of boxes that are drawn
PREDICTIONS = "predictions.jsonl"
MAP_CELL_M = 0.25


def scene_picture(
    batch: Batch,
    extent_m: tuple[float, float, float, float],
    *,
    plan: Sequence[Sequence[float]] | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
    title: str = "",
) -> ScenePicture:
    """What is drawn of the last frame of a batch of one row.

    Args:
        batch: one row, with whatever targets there are.
        extent_m: x_min, x_max, y_min, y_max of the map targets.
        plan: [6][2] metres; None: none is drawn.
        boxes: [Q][9] predicted ones.
        title: printed above.
    """
    frames = batch.clip[-1]
    agents = batch.agents[-1] if batch.agents else None
    annotated = agents.boxes[0][agents.mask[0]].numpy() if agents is not None else None
    driven = batch.plan.waypoints[0][batch.plan.mask[0]].numpy() if batch.plan else None
    elements = batch.map.mask[0] if batch.map is not None else None
    return ScenePicture(
        front=frames.images[0, 0].permute(1, 2, 0).contiguous().numpy(),
        front_intrinsics=frames.cameras.intrinsics[0, 0].numpy(),
        lidar_to_front=frames.cameras.lidar_to_cam[0, 0].numpy(),
        plan=np.asarray(plan, float) if plan is not None else None,
        driven=driven,
        predicted_boxes=np.asarray(boxes, float).reshape(-1, 9) if boxes is not None else None,
        annotated_boxes=annotated,
        drivable=batch.map.drivable[0].numpy() if batch.map is not None else None,
        map_masks=batch.map.masks[0][elements].numpy() if batch.map is not None else None,
        map_labels=batch.map.labels[0][elements].tolist() if batch.map is not None else (),
        extent_m=extent_m,
        title=title,
    )


def full_size_frame(data: NuScenesDataModule, sample_token: str) -> Batch:
    """One key-frame as people want to see it: images as on disk, the map in cells of MAP_CELL_M.

    Raises:
        UserError: no such sample, or a broken image.
    """
    size = data.index.frame(sample_token).cameras[0].size
    x_min, x_max, y_min, y_max = data.config.grid.extent_m
    rows, columns = round((y_max - y_min) / MAP_CELL_M), round((x_max - x_min) / MAP_CELL_M)
    fine = BevGrid(x_min, y_min, MAP_CELL_M, rows, columns)
    config = replace(data.config, image_size=size, cache_images=False, grid=fine)
    return NuScenesDataModule(config).frame(sample_token)


def draw_predictions(data: NuScenesDataModule, folder: Path, count: int) -> list[Path]:
    """Draw some samples of the val split with their plans and detections.

    Args:
        data: the root the predictions were made on.
        folder: the experiment's run folder.
        count: samples, spread evenly over those with a plan (with a detection, without plans).

    Returns:
        The pictures' paths.
    """
    plans = _by_sample(folder / "planning" / PREDICTIONS, "plan")
    detections = _by_sample(folder / "perception" / PREDICTIONS, "detection")
    tokens = sorted(plans or detections)
    step = max(1, len(tokens) // max(count, 1))
    paths = []
    for token in tokens[step // 2 :: step][:count]:
        found = detections.get(token)
        boxes = None
        if found is not None:
            scored = zip(found["boxes"], found["scores"], strict=True)
            boxes = [box for box, score in scored if score >= MIN_SCORE]
        picture = scene_picture(
            full_size_frame(data, token),
            data.config.grid.extent_m,
            plan=plans[token]["waypoints"] if token in plans else None,
            boxes=boxes,
            title=token,
        )
        paths.append(folder / "pictures" / f"{token}.png")
        save_picture(draw_scene(picture), paths[-1])
    return paths


def draw_cases(
    data: NuScenesDataModule, folder: Path, samples: Sequence[dict[str, Any]], count: int
) -> list[Path]:
    """Draw the worst and the median plans of an evaluation, and plans that collide.

    Args:
        data: the root the predictions were made on.
        folder: the pictures go into it.
        samples: records of planning_scores.sample_records.
        count: of each kind.

    Returns:
        The pictures' paths; names tell kind, rank and sample.
    """
    protocol = next(iter(samples[0]["collision"]), "") if samples else ""
    scored = [s for s in samples if protocol in s["l2_avg_m"] and s["plan"] is not None]
    scored.sort(key=lambda sample: -sample["l2_avg_m"][protocol])
    middle = max(0, len(scored) // 2 - count // 2)
    hits = [s for s in scored if any(s["collision"][protocol])]
    kinds = {
        "worst": scored[:count],
        "median": scored[middle : middle + count],
        "collision": hits[:count],
    }
    paths = []
    for kind, chosen in kinds.items():
        for rank, sample in enumerate(chosen, start=1):
            token = sample["sample_token"]
            title = f"{kind} {rank}: {sample['l2_avg_m'][protocol]:.2f} m  {token}"
            picture = scene_picture(
                full_size_frame(data, token),
                data.config.grid.extent_m,
                plan=sample["plan"],
                title=title,
            )
            paths.append(folder / f"{kind}-{rank}-{token}.png")
            save_picture(draw_scene(picture), paths[-1])
    return paths


def _by_sample(path: Path, kind: str) -> dict[str, Any]:
    """Records of one kind by sample token; none where the stage was not run."""
    if not path.is_file():
        return {}
    return {r["sample_token"]: r for r in read_predictions(path) if r["kind"] == kind}
