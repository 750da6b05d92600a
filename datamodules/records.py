"""The index of a nuScenes root: everything the readers need of its tables, maps and CAN bus.

An Index is a set of arrays that lie in one memory-mapped file (see index_file.py for where it
comes from, index_build.py for how it is made). Records are made when they are asked for: opening
costs nothing, and the workers of a machine share the arrays.

Shape legend: F key-frames of the root, P annotations of the root.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from datamodules.can_bus import CanBus
from datamodules.map_geometry import LocationMap, expansion_file
from datamodules.poses import FloatArray
from odvla.errors import UserError
from odvla.types import CAMERAS

LIDAR = "LIDAR_TOP"
# Split of this toolkit -> the devkit's split of a version.
SPLITS = {
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-test": {"test": "test"},
}
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class CameraRecord:
    """One image and its calibration."""

    name: str
    sample_data_token: str
    file: str  # relative to the root
    size: tuple[int, int]  # width, height in pixels
    intrinsics: FloatArray  # [3, 3] pixels of the file
    global_to_camera: FloatArray  # [4, 4] at the camera's own exposure time


@dataclass(frozen=True)
class FrameRecord:
    """One key-frame. prev and next are frame numbers, -1 at the ends of the scene."""

    token: str
    number: int  # position in Index.frames
    scene: int  # position in Index.scenes
    position: int  # 0 for the first key-frame of the scene
    prev: int
    next: int
    timestamp_us: int
    cameras: tuple[CameraRecord, ...]  # in the order of CAMERAS
    lidar_file: str
    lidar_to_global: FloatArray  # [4, 4] at the lidar's time, which is t0
    ego_to_global: FloatArray  # [4, 4] at t0
    ego_quaternion: FloatArray  # [4] rotation of ego_to_global as the table gives it
    first_annotation: int
    last_annotation: int  # one past the last row of Index.annotations


@dataclass(frozen=True)
class SceneRecord:
    """One scene: frames [first, last) of the index."""

    name: str
    token: str
    location: str
    description: str
    split: str  # train | val | test | "" (in no split of this version)
    first: int
    last: int


@dataclass(frozen=True)
class Annotations:
    """All annotated boxes of a root, in the global frame, sorted by key-frame."""

    token: NDArray[np.bytes_]  # [P]
    frame: NDArray[np.int64]  # [P] frame number
    instance: NDArray[np.int64]  # [P] row of the instance table: the track id
    category: NDArray[np.int64]  # [P] index into `categories`
    label: NDArray[np.int64]  # [P] index into DETECTION_CLASSES, -1 for other categories
    centre: FloatArray  # [P, 3] metres
    size: FloatArray  # [P, 3] width, length, height in metres
    rotation: FloatArray  # [P, 4] quaternion
    velocity: FloatArray  # [P, 2] m/s over ground in global axes; 0 where it cannot be told
    points: NDArray[np.int64]  # [P] lidar + radar points inside
    visibility: NDArray[np.int64]  # [P] level 1 (hidden) .. 4, 0 when not given
    next: NDArray[np.int64]  # [P] row of the instance's next annotation, -1: none
    prev: NDArray[np.int64]  # [P] row of the instance's previous annotation, -1: none
    categories: tuple[str, ...]


@dataclass(frozen=True)
class AgentPaths:
    """Where every annotated agent goes and came from; positions are 0 where the mask is False."""

    future_own: NDArray[np.float32]  # [P, 6, 2] in its own frame at t0: x right, y forward
    past_own: NDArray[np.float32]  # [P, 4, 2] latest first
    future_lidar: NDArray[np.float32]  # [P, 6, 2] in LIDAR_TOP at t0
    past_lidar: NDArray[np.float32]  # [P, 4, 2]
    future_mask: NDArray[np.bool_]  # [P, 6] annotated in that key-frame of the scene
    past_mask: NDArray[np.bool_]  # [P, 4]


@dataclass(frozen=True)
class EgoTable:
    """The car at every key-frame, as ego_state.py and ego_trajectories.py compute it."""

    history: FloatArray  # [F, 4, 2] positions 2.0 .. 0.5 s ago, continued backwards
    future: FloatArray  # [F, 6, 2] the next 3 s, last point repeated
    future_mask: NDArray[np.bool_]  # [F, 6]
    command: NDArray[np.int64]  # [F] index into COMMANDS
    velocity: NDArray[np.float32]  # [F, 2] and so on: the fields of EgoState
    yaw_rate: NDArray[np.float32]  # [F]
    acceleration: NDArray[np.float32]  # [F, 2]
    can_accel: NDArray[np.float32]  # [F, 2]
    heading_speed: NDArray[np.float32]  # [F]
    steering: NDArray[np.float32]  # [F]
    can_bus: NDArray[np.float32]  # [F, 18] BEVFormer's vector, motion since the last key-frame
    cached_velocity: FloatArray  # [F, 2] GPT-Driver's, with its quirk
    cached_yaw_rate: FloatArray  # [F] GPT-Driver's, with its quirk
    uniad_path: FloatArray  # [F, 6, 3] UniAD's planning label; its mask is future_mask
    uniad_velocity: FloatArray  # [F, 2] UniAD's


class TokenTable(Mapping[str, int]):
    """Token -> row of a table, by binary search in sorted tokens: no dict has to be built.

    Args:
        tokens: [n] in the order of the rows.
        order: [n] the rows by ascending token.
    """

    def __init__(self, tokens: NDArray[np.bytes_], order: NDArray[np.integer]) -> None:
        self.tokens = tokens
        self.order = order

    def __getitem__(self, token: str) -> int:
        """Row of a token.

        Raises:
            KeyError: there is no such token.
        """
        # Files may ask for half a character, which no token has.
        wanted = token.encode(errors="surrogatepass") if isinstance(token, str) else b""
        # By hand: searchsorted with a sorter would look at all of the file.
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if self.tokens[self.order[middle]] < wanted:
                low = middle + 1
            else:
                high = middle
        if not wanted or low == len(self.order) or self.tokens[self.order[low]] != wanted:
            raise KeyError(token)
        return int(self.order[low])

    def __iter__(self) -> Iterator[str]:
        return (token.decode() for token in self.tokens)

    def __len__(self) -> int:
        return len(self.order)


class FrameTable(Sequence[FrameRecord]):
    """Key-frames by number, each made when it is asked for; see frame_columns for the arrays."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["frame.token"])

    @overload
    def __getitem__(self, number: int) -> FrameRecord: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[FrameRecord, ...]: ...

    def __getitem__(self, number: int | slice) -> FrameRecord | tuple[FrameRecord, ...]:
        """One key-frame, or several."""
        if isinstance(number, slice):
            return tuple(self[k] for k in range(*number.indices(len(self))))
        number = range(len(self))[number]  # counts from the end, and refuses what is too far
        a = self.arrays
        cameras = tuple(
            CameraRecord(
                name,
                a["camera.token"][number, k].decode(),
                a["camera.file"][number, k].decode(),
                (int(a["camera.size"][number, k, 0]), int(a["camera.size"][number, k, 1])),
                a["camera.intrinsics"][number, k].copy(),
                a["camera.global_to_camera"][number, k].copy(),
            )
            for k, name in enumerate(CAMERAS)
        )
        bounds = a["frame.annotations"]
        return FrameRecord(
            token=a["frame.token"][number].decode(),
            number=number,
            scene=int(a["frame.scene"][number]),
            position=int(a["frame.position"][number]),
            prev=int(a["frame.prev"][number]),
            next=int(a["frame.next"][number]),
            timestamp_us=int(a["frame.timestamp_us"][number]),
            cameras=cameras,
            lidar_file=a["frame.lidar_file"][number].decode(),
            lidar_to_global=a["frame.lidar_to_global"][number].copy(),
            ego_to_global=a["frame.ego_to_global"][number].copy(),
            ego_quaternion=a["frame.ego_quaternion"][number].copy(),
            first_annotation=int(bounds[number]),
            last_annotation=int(bounds[number + 1]),
        )


@dataclass(frozen=True)
class Index:
    """A nuScenes root, ready to be read frame by frame."""

    root: Path
    version: str
    scenes: tuple[SceneRecord, ...]
    frames: Sequence[FrameRecord]
    annotations: Annotations
    can_bus: CanBus
    number_of_token: Mapping[str, int] = field(repr=False)
    annotation_rows: Mapping[str, int] = field(repr=False)
    maps: Mapping[str, LocationMap] = field(repr=False, default_factory=dict)
    paths: AgentPaths | None = field(repr=False, default=None)  # None while it is being built
    ego: EgoTable | None = field(repr=False, default=None)  # None while it is being built
    arrays: Arrays = field(repr=False, default_factory=dict)
    file: Path | None = None

    def frame(self, sample_token: str) -> FrameRecord:
        """The key-frame of a sample token.

        Raises:
            UserError: the root has no such sample.
        """
        if sample_token not in self.number_of_token:
            raise UserError(f"sample {sample_token!r} is not in {self.root / self.version}")
        return self.frames[self.number_of_token[sample_token]]

    def scenes_of(self, split: str) -> tuple[SceneRecord, ...]:
        """Scenes of a split, in table order.

        Raises:
            UserError: this version has no such split, or no scene of it is there.
        """
        if split not in SPLITS[self.version]:
            raise UserError(
                f"{self.version} has no split {split!r}, only {list(SPLITS[self.version])}"
            )
        scenes = tuple(scene for scene in self.scenes if scene.split == split)
        if not scenes:
            raise UserError(f"{self.root / self.version} holds no scene of the {split} split")
        return scenes

    def location(self, frame: FrameRecord) -> str:
        """Map the frame lies on."""
        return self.scenes[frame.scene].location

    def map_of(self, frame: FrameRecord) -> LocationMap:
        """Geometry of the map the frame lies on.

        Raises:
            UserError: the root has no map expansion of that location.
        """
        location = self.location(frame)
        if location not in self.maps:
            path = expansion_file(self.root, location)
            raise UserError(f"map expansion {path} is missing (map targets need it)")
        return self.maps[location]

    @cached_property
    def instance_tokens(self) -> tuple[str, ...]:
        """Tokens of the instance table; Annotations.instance counts them."""
        return tuple(token.decode() for token in self.arrays["instance.token"])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for another process maps the same file."""
        if self.file is None:
            return Index, tuple(getattr(self, f.name) for f in fields(self))
        from datamodules.index_file import map_index

        return map_index, (self.file, self.root)


def index_of_arrays(root: Path, version: str, arrays: Arrays, file: Path | None = None) -> Index:
    """The index over arrays by the names that index_build.py gives them."""
    categories = tuple(name.decode() for name in arrays["category.name"])
    boxes = {f.name: arrays[f"annotation.{f.name}"] for f in fields(Annotations)[:-1]}
    locations = tuple(name.decode() for name in arrays["map.location"])
    return Index(
        root=root,
        version=version,
        scenes=tuple(_scenes(arrays)),
        frames=FrameTable(arrays),
        annotations=Annotations(**boxes, categories=categories),
        can_bus=CanBus(**{f.name: arrays[f"can_bus.{f.name}"] for f in fields(CanBus)}),
        number_of_token=TokenTable(arrays["frame.token"], arrays["frame.by_token"]),
        annotation_rows=TokenTable(arrays["annotation.token"], arrays["annotation.by_token"]),
        maps={
            name: LocationMap.of_columns(_under(arrays, f"map.{name}."))
            for name in locations
            if name
        },
        paths=_record(AgentPaths, "path.", arrays),
        ego=_record(EgoTable, "ego.", arrays),
        arrays=arrays,
        file=file,
    )


def _scenes(arrays: Arrays) -> Iterator[SceneRecord]:
    texts = ("name", "token", "location", "description", "split")
    bounds = arrays["scene.frames"].tolist()
    for number, (first, last) in enumerate(pairwise(bounds)):
        words = {name: arrays[f"scene.{name}"][number].decode() for name in texts}
        yield SceneRecord(**words, first=first, last=last)


def _under(arrays: Arrays, prefix: str) -> dict[str, NDArray[Any]]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _record(kind: Any, prefix: str, arrays: Arrays) -> Any:
    """A dataclass of the arrays under a prefix; None where there are none yet."""
    found = _under(arrays, prefix)
    return kind(**found) if found else None


def index_of_poses(
    ego_to_global: FloatArray,
    lidar_to_ego: FloatArray,
    quaternions: FloatArray,
    times_us: NDArray[np.int64],
) -> Index:
    """One scene of bare poses, without cameras, boxes or CAN bus: enough for the car's own path.

    Args:
        ego_to_global: [F, 4, 4].
        lidar_to_ego: [4, 4].
        quaternions: [F, 4] rotations of ego_to_global.
        times_us: [F].
    """
    last = len(times_us) - 1
    frames = tuple(
        FrameRecord(
            token=str(k),
            number=k,
            scene=0,
            position=k,
            prev=k - 1,
            next=k + 1 if k < last else -1,
            timestamp_us=int(times_us[k]),
            cameras=(),
            lidar_file="",
            lidar_to_global=ego_to_global[k] @ lidar_to_ego,
            ego_to_global=ego_to_global[k],
            ego_quaternion=quaternions[k],
            first_annotation=0,
            last_annotation=0,
        )
        for k in range(last + 1)
    )
    zeros = np.zeros((last + 1, 3))
    none = np.zeros(0, dtype=np.int64)
    nowhere = np.zeros((0, 4))
    boxes = Annotations(
        none.astype(np.bytes_), none, none, none, none, nowhere[:, :3], nowhere[:, :3], nowhere,
        nowhere[:, :2], none, none, none, none, (),
    )  # fmt: skip
    return Index(
        root=Path(),
        version="v1.0-mini",
        scenes=(SceneRecord("", "", "", "", "", 0, last + 1),),
        frames=frames,
        annotations=boxes,
        can_bus=CanBus(zeros, zeros, zeros, zeros[:, 0], zeros[:, 0], zeros[:, 0] > 0),
        number_of_token={frame.token: frame.number for frame in frames},
        annotation_rows={},
    )


def without_derived(index: Index) -> Index:
    """The same index, whose readers compute from poses and boxes what it has stored."""
    return replace(index, paths=None, ego=None)
