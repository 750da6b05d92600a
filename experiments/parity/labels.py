"""Case m: planning labels, commands and poses of made-up drives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.ego_trajectories import planning_label
from datamodules.poses import rigid, yaw_of
from datamodules.records import Index, index_of_poses
from experiments.parity.golden import Check, Golden, Kind


def planning_labels(golden: Golden, stem: str) -> Iterator[Check]:
    """Every drive of the file: label, mask, command, velocity and the poses they come from."""
    for number, case in enumerate(golden.facts(stem)["cases"]):
        index = _drive(case)
        frame = index.frames[case["index"]]
        wanted = {name: _tensor(value) for name, value in case.items() if _numeric(value)}
        label = planning_label(index, frame, steps=len(case["sdc_planning"]))
        ours = {
            "sdc_planning": label.path,
            "sdc_planning_mask": np.repeat(label.mask[:, None], 2, axis=1),
            "command": label.command,
            "sdc_velocity_lidar": label.velocity,
            "l2g_r_mat": frame.lidar_to_global[:3, :3].T,
            "l2g_t": frame.lidar_to_global[:3, 3],
            "patch_angle_deg": np.degrees(yaw_of(frame.ego_to_global[:3, :3])) % 360,
        }
        for name, value in ours.items():
            kind: Kind = "index" if name in ("sdc_planning_mask", "command") else "activation"
            yield Check(f"{number}/{name}", _tensor(value), wanted[name], kind)


def _drive(case: dict[str, Any]) -> Index:
    """The recorded poses as the index of a root with one scene."""
    sensor, poses = case["lidar2ego"], case["poses"]
    return index_of_poses(
        rigid([p["translation"] for p in poses], [p["rotation"] for p in poses]),
        rigid(sensor["translation"], sensor["rotation"]),
        np.array([p["rotation"] for p in poses]),
        np.array([p["timestamp_us"] for p in poses]),
    )


def _numeric(value: Any) -> bool:
    """Numbers and lists of them; the poses are neither."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float)


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(np.asarray(value, dtype=np.float64))
