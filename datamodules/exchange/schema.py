"""What a record of a file must hold, and records as flat tables of checked values.

Shape legend: N boxes of a key-frame; "N" in a shape is the same number in all of a record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from odvla.errors import UserError
from odvla.types import CAMERAS, HISTORY, WAYPOINTS

Kind = Literal["numbers", "text", "path", "texts"]
Value = NDArray[Any] | str | list[str]
Flat = dict[str, Value]  # "cams.CAM_FRONT.timestamp" and so on
BOXES = "N"
FUTURE_STEPS = 16  # of agents in UniAD's infos: 8 s


@dataclass(frozen=True)
class Field:
    """One field of a record."""

    name: str
    kind: Kind = "numbers"
    shape: tuple[int | str, ...] = ()
    may_be_nan: bool = False
    angles: tuple[int, ...] | None = None  # columns that are angles: 2 pi more is the same
    optional: bool = False


SENSOR = (
    Field("data_path", "path"),
    Field("type", "text"),
    Field("sample_data_token", "text"),
    Field("sensor2ego_translation", shape=(3,)),
    Field("sensor2ego_rotation", shape=(4,)),
    Field("ego2global_translation", shape=(3,)),
    Field("ego2global_rotation", shape=(4,)),
    Field("timestamp"),
    Field("sensor2lidar_rotation", shape=(3, 3)),
    Field("sensor2lidar_translation", shape=(3,)),
)
CAMERA = (*SENSOR, Field("cam_intrinsic", shape=(3, 3)))
# "sweeps" and "cams" stand between these; see flatten.
FRAME = (
    Field("lidar_path", "path"),
    Field("token", "text"),
    Field("prev", "text"),
    Field("next", "text"),
    Field("can_bus", shape=(18,)),
    Field("frame_idx"),
    Field("scene_token", "text"),
    Field("lidar2ego_translation", shape=(3,)),
    Field("lidar2ego_rotation", shape=(4,)),
    Field("ego2global_translation", shape=(3,)),
    Field("ego2global_rotation", shape=(4,)),
    Field("timestamp"),
)
AGENTS = (
    Field("gt_boxes", shape=(BOXES, 7), angles=(6,)),
    Field("gt_names", "texts", (BOXES,)),
    Field("gt_velocity", shape=(BOXES, 2), may_be_nan=True),
    Field("num_lidar_pts", shape=(BOXES,)),
    Field("num_radar_pts", shape=(BOXES,)),
    Field("valid_flag", shape=(BOXES,)),
)
UNIAD_AGENTS = (
    *AGENTS,
    Field("gt_inds", shape=(BOXES,)),
    Field("gt_ins_tokens", "texts", (BOXES,)),
    Field("fut_traj", shape=(BOXES, FUTURE_STEPS, 2)),
    Field("fut_traj_valid_mask", shape=(BOXES, FUTURE_STEPS, 2)),
    Field("visibility_tokens", shape=(BOXES,)),
)
CACHE = (
    *FRAME,
    Field("fut_valid_flag"),
    Field("map_location", "text"),
    *AGENTS,
    Field("gt_agent_fut_trajs", shape=(BOXES, 2 * WAYPOINTS)),
    Field("gt_agent_fut_masks", shape=(BOXES, WAYPOINTS)),
    Field("gt_agent_lcf_feat", shape=(BOXES, 9), may_be_nan=True, angles=(2,)),
    Field("gt_agent_fut_yaw", shape=(BOXES, WAYPOINTS), angles=tuple(range(WAYPOINTS))),
    Field("gt_agent_fut_goal", shape=(BOXES,)),
    Field("gt_ego_his_trajs", shape=(HISTORY + 1, 2)),
    Field("gt_ego_his_diff", shape=(HISTORY, 2)),
    Field("gt_ego_fut_trajs", shape=(WAYPOINTS + 1, 2)),
    Field("gt_ego_fut_diff", shape=(WAYPOINTS, 2)),
    Field("gt_ego_fut_masks", shape=(WAYPOINTS,)),
    Field("gt_ego_fut_cmd", shape=(3,)),
    Field("gt_ego_lcf_feat", shape=(9,)),
    # The public script that makes such a cache has none.
    Field("gt_tokens", "texts", (BOXES,), optional=True),
)


def flatten(record: Any, fields: Sequence[Field], path: Path, token: str) -> Flat:
    """A record of cameras, sweeps and fields as a flat table, checked.

    Sweeps lie on top of each other: "sweeps.timestamp" is [n], and "sweeps" is n.

    Raises:
        UserError: naming file, token, field, what it is and what it should be.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{path}, {token}: a record must be a dict, not {type(record).__name__}")
    checked = Checker(path, token)
    flat = checked.fields(record, fields)
    cameras = checked.container(record, "cams", Mapping)
    for name in CAMERAS:
        camera = checked.container(cameras, name, Mapping, "cams.")
        flat |= checked.fields(camera, CAMERA, f"cams.{name}.")
    sweeps = checked.container(record, "sweeps", list)
    rows = [
        checked.fields(sweep if isinstance(sweep, Mapping) else {}, SENSOR, f"sweeps.{number}.")
        for number, sweep in enumerate(sweeps)
    ]
    flat["sweeps"] = np.array(len(rows))
    for field in SENSOR:
        values: list[Any] = [row[f"sweeps.{n}.{field.name}"] for n, row in enumerate(rows)]
        empty = np.zeros((0, *(side for side in field.shape if isinstance(side, int))))
        stacked: Value = values
        if field.kind == "numbers":
            stacked = np.stack(values) if values else empty
        flat[f"sweeps.{field.name}"] = stacked
    return flat


@dataclass(frozen=True)
class Checker:
    """Checks the values of one record; its messages name file, token and field."""

    path: Path
    token: str

    def container(self, record: Any, name: str, kind: type, prefix: str = "") -> Any:
        """A dict or list of a record.

        Raises:
            UserError: it is missing or something else.
        """
        if name not in record:
            raise UserError(f"{self.path}, {self.token}: field {prefix + name!r} is missing")
        if not isinstance(record[name], kind):
            wanted = "list" if kind is list else "dict"
            raise UserError(
                f"{self.path}, {self.token}: field {prefix + name!r} must be a {wanted}, not "
                f"{type(record[name]).__name__}"
            )
        return record[name]

    def fields(self, record: Mapping[str, Any], fields: Iterable[Field], prefix: str = "") -> Flat:
        """The values of some fields by name.

        Raises:
            UserError: one is missing, or does not have its kind or shape.
        """
        sizes: dict[str, int] = {}
        flat: Flat = {}
        for field in fields:
            if field.name not in record:
                if field.optional:
                    continue
                raise UserError(
                    f"{self.path}, {self.token}: field {prefix + field.name!r} is missing"
                )
            flat[prefix + field.name] = self.value(
                record[field.name], field, prefix + field.name, sizes
            )
        return flat

    def value(self, value: Any, field: Field, name: str, sizes: dict[str, int]) -> Value:
        """One value, as an array, a text or a list of texts."""
        if field.kind in ("text", "path"):
            if not isinstance(value, str):
                raise self._wrong(name, "a text", f"it is {value!r:.80}")
            return str(value)
        if field.kind == "texts":
            texts = np.asarray(value).tolist() if isinstance(value, np.ndarray) else value
            if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
                raise self._wrong(name, "a list of texts", f"it is {value!r:.80}")
            self._check_shape((len(texts),), field, name, sizes)
            return [str(text) for text in texts]
        try:
            numbers = np.asarray(value)
        except ValueError as error:
            raise self._wrong(name, "numbers", str(error)) from error
        if numbers.size == 0 and numbers.dtype.kind not in "biuf":
            numbers = numbers.astype(np.float64)
        if numbers.dtype.kind not in "biuf":
            raise self._wrong(name, "numbers", f"it is {value!r:.80}")
        self._check_shape(numbers.shape, field, name, sizes)
        good = ~np.isinf(numbers) if field.may_be_nan else np.isfinite(numbers)
        if not good.all():
            raise self._wrong(name, "finite numbers", "it has others")
        return numbers

    def _check_shape(
        self, shape: tuple[int, ...], field: Field, name: str, sizes: dict[str, int]
    ) -> None:
        fits = len(shape) == len(field.shape) and all(
            got == (sizes.setdefault(side, got) if isinstance(side, str) else side)
            for got, side in zip(shape, field.shape, strict=True)
        )
        if not fits:
            wanted = tuple(sizes.get(s, s) if isinstance(s, str) else s for s in field.shape)
            text = str(wanted).replace("'", "")
            raise self._wrong(name, f"of shape {text}", f"its shape is {shape}")

    def _wrong(self, name: str, wanted: str, found: str) -> UserError:
        return UserError(f"{self.path}, {self.token}: field {name!r} must be {wanted}, {found}")
