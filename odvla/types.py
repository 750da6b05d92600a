"""The dataclasses that cross package borders, and the names every package shares.

Shape legend
    B  frames (or clips) in a batch        N  cameras, in the order of CAMERAS
    T  steps of a clip, oldest first       A  annotated agents (padded)
    M  map elements (padded)               G  conversations (any number a frame)
    L  text tokens (padded)                Q  query slots
    H, W  BEV rows (along y) and columns (along x); h, w  image rows and columns
    C  feature channels                    D  token width
    P  lidar points (padded)

Frame: nuScenes LIDAR_TOP at t0 unless a name says otherwise (x right, y forward, z up; metres,
seconds, radians). A box is (x, y, z, width, length, height, yaw, vx, vy): centre, nuScenes' wlh
order, yaw of the heading measured from +x counter-clockwise, velocity over ground in m/s expressed
in the axes of that frame (the motion of the car itself is not subtracted).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Float64, Int64, UInt8, jaxtyped
from torch import Tensor

CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
# The ten classes of the nuScenes detection task, in the order of UniAD's and BEVFormer's heads.
DETECTION_CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
# UniAD's three map thing classes; the drivable area is its one stuff class.
MAP_CLASSES = ("divider", "ped_crossing", "boundary")
# Index of a command, in the order of GPT-Driver's gt_ego_fut_cmd.
COMMANDS = ("turn right", "turn left", "keep forward")
WAYPOINTS = 6  # a plan: 3 s at 2 Hz
HISTORY = 4  # past positions given to the model: 2 s at 2 Hz
STEP_S = 0.5  # time between key-frames
BOX_DIM = 9
# What EgoState.motion is divided by, so that all is of the order of 1 in town driving: velocity,
# yaw rate, acceleration (metres a step), CAN acceleration, heading speed, steering, history.
EGO_SCALES = (5.0, 5.0, 0.3, 0.5, 0.5, 2.0, 2.0, 5.0, 0.3, *([5.0] * 8))

Stream = Literal["scene", "track", "map"]
# Ids of the slots of a text; negative, so that no vocabulary can collide (the reference's values).
IGNORE_INDEX = -100
SLOT_IDS = {"<SCENE>": -201, "<TRACK>": -202, "<MAP>": -203, "<OBJECT>": -204, "<EGO>": -205}

_T = TypeVar("_T")


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor inside nested dataclasses, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)}
        )
    return value


def shape_checked(cls: type[_T]) -> type[_T]:
    """A dataclass that compares its fields with their annotated shapes and types when it is made.

    Raises (when an object is made):
        jaxtyping.TypeCheckError: a field does not fit, or two give one dimension different sizes.
    """
    # jaxtyping looks at all arguments a second time beside a returned value, if there is to be one:
    # an __init__ that says nothing of its None is checked in half of the time.
    cls.__init__.__annotations__.pop("return", None)
    checked: type[_T] = jaxtyped(typechecker=beartype)(cls)
    return checked


class TensorFields:
    """Moves every tensor of a (nested) dataclass at once."""

    def to(self: _T, device: torch.device | str, *, non_blocking: bool = False) -> _T:
        """Copy with every tensor on `device`."""
        return _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        """Copy in page-locked memory (DataLoader calls this when asked to pin)."""
        return _map_tensors(self, lambda t: t.pin_memory())

    def detach(self: _T) -> _T:
        """Copy cut from the graph: what a temporal state becomes between two optimiser steps."""
        return _map_tensors(self, lambda t: t.detach())


@shape_checked
@dataclass(frozen=True)
class Cameras(TensorFields):
    """Calibration of N cameras, already scaled to the images it comes with."""

    intrinsics: Float[Tensor, "B N 3 3"]  # pixels
    lidar_to_cam: Float[Tensor, "B N 4 4"]  # LIDAR_TOP at t0 -> camera at its own exposure time


@shape_checked
@dataclass(frozen=True)
class LidarPoints(TensorFields):
    """One LIDAR_TOP sweep of B scenes, padded."""

    points: Float[Tensor, "B P 4"]  # x, y, z (metres, lidar frame), intensity 0..255
    mask: Bool[Tensor, "B P"]  # False: padding


@shape_checked
@dataclass(frozen=True)
class Frames(TensorFields):
    """One key-frame of B scenes: all that the car can see at that moment."""

    images: UInt8[Tensor, "B N 3 h w"]  # RGB; encoders normalise
    cameras: Cameras
    lidar_to_global: Float64[Tensor, "B 4 4"]
    timestamp_s: Float64[Tensor, " B"]
    can_bus: Float[Tensor, "B 18"]  # BEVFormer's vector
    scene_start: Bool[Tensor, " B"]  # True: temporal state of that row must be forgotten
    sample_tokens: tuple[str, ...]
    lidar: LidarPoints | None = None  # only where an encoder asks for it


@shape_checked
@dataclass(frozen=True)
class EgoState(TensorFields):
    """What the planner is told about the car itself: GPT-Driver's cached fields."""

    velocity: Float[Tensor, "B 2"]  # m/s
    yaw_rate: Float[Tensor, " B"]  # rad/s
    acceleration: Float[Tensor, "B 2"]  # last minus previous displacement, metres per step
    can_accel: Float[Tensor, "B 2"]  # m/s^2
    heading_speed: Float[Tensor, " B"]  # m/s
    steering: Float[Tensor, " B"]
    history: Float[Tensor, "B 4 2"]  # positions 2.0, 1.5, 1.0, 0.5 s ago
    command: Int64[Tensor, " B"]  # index into COMMANDS

    @property
    def last_step(self) -> Tensor:
        """Motion of the last 0.5 s [B, 2], metres."""
        return -self.history[:, -1]

    @property
    def motion(self) -> Tensor:
        """Every field but the command side by side [B, 17]."""
        return torch.cat(
            [
                self.velocity,
                self.yaw_rate[:, None],
                self.acceleration,
                self.can_accel,
                self.heading_speed[:, None],
                self.steering[:, None],
                self.history.flatten(1),
            ],
            dim=1,
        )


@shape_checked
@dataclass(frozen=True)
class AgentTargets(TensorFields):
    """Annotated agents of one key-frame."""

    boxes: Float[Tensor, "B A 9"]
    labels: Int64[Tensor, "B A"]  # index into DETECTION_CLASSES
    track_ids: Int64[Tensor, "B A"]  # the same number for one instance through a data root
    mask: Bool[Tensor, "B A"]  # False: padding
    future: Float[Tensor, "B A 6 2"]  # positions in the agent's own frame (x right, y forward)
    future_mask: Bool[Tensor, "B A 6"]
    past: Float[Tensor, "B A 4 2"] | None = None  # the same 0.5, 1.0, 1.5, 2.0 s ago
    past_mask: Bool[Tensor, "B A 4"] | None = None
    ego: Float[Tensor, "B 9"] | None = None  # the car's own box


@shape_checked
@dataclass(frozen=True)
class MapTargets(TensorFields):
    """Map elements rastered on the BEV grid of the frame."""

    masks: Bool[Tensor, "B M H W"]
    labels: Int64[Tensor, "B M"]  # index into MAP_CLASSES
    mask: Bool[Tensor, "B M"]  # False: padding
    drivable: Bool[Tensor, "B H W"]


@shape_checked
@dataclass(frozen=True)
class PlanTargets(TensorFields):
    """Where the car's LIDAR_TOP went in the next 3 s, every 0.5 s."""

    waypoints: Float[Tensor, "B 6 2"]
    mask: Bool[Tensor, "B 6"]  # False: the scene ended before


@shape_checked
@dataclass(frozen=True)
class TrafficTargets(TensorFields):
    """Where others are when the car reaches its waypoints; A counts the boxes of all six steps."""

    boxes: Float[Tensor, "B A 5"]  # x, y, width, length, yaw in the frame of t0
    step: Int64[Tensor, "B A"]  # which of the six waypoints, from 0
    mask: Bool[Tensor, "B A"]  # False: padding


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; text may hold slots (SLOT_IDS)."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record of a language dataset, ready to be tokenised.

    `object_box` (BOX_DIM floats, frame of the sample) is set when the text holds <OBJECT>, or
    `object_track`, the id of a track that the model itself follows.
    `reference` is what metrics compare with; `meta` holds what they group by (template_type, ...).
    """

    id: str
    sample_token: str
    # plan | agent | caption_object | caption_map | caption_scene | caption | qa | narration |
    # drivelm | omnidrive | omnidrive_plan | text
    kind: str
    turns: tuple[Turn, ...]
    reference: str
    object_box: tuple[float, ...] | None = None
    meta: dict[str, str] = field(default_factory=dict)
    object_track: int | None = None


@shape_checked
@dataclass(frozen=True)
class Talk(TensorFields):
    """G tokenised conversations, right-padded. A slot is one negative id (SLOT_IDS)."""

    input_ids: Int64[Tensor, "G L"]
    labels: Int64[Tensor, "G L"]  # IGNORE_INDEX where no loss is due
    mask: Bool[Tensor, "G L"]  # False: padding
    prompt_length: Int64[
        Tensor, " G"
    ]  # ids before the last assistant turn's text: what generation starts from
    frame_index: Int64[Tensor, " G"]  # row of the Frames this conversation is about
    object_boxes: Float[Tensor, "G 9"]  # NaN where the text has no <OBJECT>
    conversations: tuple[Conversation, ...]
    object_tracks: Int64[Tensor, " G"] | None = None  # track id of <OBJECT>; -1, None: by its box


@dataclass(frozen=True)
class Batch(TensorFields):
    """B clips of T key-frames and the conversations about their last frames.

    `clip` is oldest first; its last item is "now", which ego, map, plan and talk belong to.
    `agents` has one item a step, because tracks are learned through a clip. `valid` is False for
    rows that only fill up a streamed group of scenes. `clip` is empty for text-only batches.
    """

    clip: tuple[Frames, ...]
    valid: Tensor  # bool [B]
    ego: EgoState | None = None
    agents: tuple[AgentTargets, ...] = ()
    map: MapTargets | None = None
    plan: PlanTargets | None = None
    talk: Talk | None = None
    traffic: TrafficTargets | None = None

    def valid_rows(self) -> list[tuple[int, str]]:
        """Row and sample token of "now" of every valid row."""
        tokens = self.clip[-1].sample_tokens
        return [(row, tokens[row]) for row, valid in enumerate(self.valid.tolist()) if valid]


@dataclass(frozen=True)
class BevGrid:
    """A BEV raster in the LIDAR_TOP frame.

    Cell (row i, column j) has its centre at
    (x_min_m + (j + 0.5) * cell_m, y_min_m + (i + 0.5) * cell_m).
    """

    x_min_m: float
    y_min_m: float
    cell_m: float
    rows: int
    columns: int

    @property
    def extent_m(self) -> tuple[float, float, float, float]:
        """x_min, x_max, y_min, y_max."""
        return (
            self.x_min_m,
            self.x_min_m + self.columns * self.cell_m,
            self.y_min_m,
            self.y_min_m + self.rows * self.cell_m,
        )


@shape_checked
@dataclass(frozen=True)
class SceneFeatures(TensorFields):
    """What an encoder made of six images. bev is None for encoders without a bird's-eye view."""

    levels: tuple[Float[Tensor, "B N C _h _w"], ...]  # image features, fine to coarse
    bev: Float[Tensor, "B H W C"] | None = None
    grid: BevGrid | None = None


@shape_checked
@dataclass(frozen=True)
class AgentPredictions(TensorFields):
    """Decoded agents, one a query; layer_* hold one item a decoder layer, the final one last."""

    layer_logits: tuple[Float[Tensor, "B Q K"], ...]
    layer_boxes: tuple[Float[Tensor, "B Q 9"], ...]
    track_ids: Int64[Tensor, "B Q"]  # -1: not a track
    carried_from: Int64[
        Tensor, "B Q"
    ]  # query index in the previous step that became this one; -1: newborn
    heatmap: Float[Tensor, "B K H W"] | None = None  # logits that newborn queries are drawn from
    mask: Bool[Tensor, "B Q"] | None = None  # False: an empty slot; None: every slot is in use
    cell_codes: Float[Tensor, "B 10 H W"] | None = None  # box each cell proposes (box_code)

    @property
    def boxes(self) -> Tensor:
        """Final boxes [B, Q, 9]."""
        return self.layer_boxes[-1]

    @property
    def scores(self) -> Tensor:
        """Probability of the most likely class [B, Q]."""
        return self.layer_logits[-1].sigmoid().amax(-1)

    @property
    def labels(self) -> Tensor:
        """Most likely class [B, Q]."""
        return self.layer_logits[-1].argmax(-1)


@shape_checked
@dataclass(frozen=True)
class MapDecoding(TensorFields):
    """What a panoptic map head knows before it paints masks: what its losses start from.

    P thing queries, K classes of things, S = H * W cells; one item a decoder layer, the final one
    last. Boxes are fractions of the grid, (centre x, centre y, width, height).
    """

    layer_logits: tuple[Float[Tensor, "B P K"], ...]  # one sigmoid a class
    layer_boxes: tuple[Float[Tensor, "B P 4"], ...]
    layer_queries: tuple[Float[Tensor, "B P C"], ...]
    start: Float[Tensor, "B P _R"]  # logits of the boxes (or points) that the last layer moved
    memory: Float[Tensor, "B S C"]  # encoded cells, row by row


@shape_checked
@dataclass(frozen=True)
class MapPredictions(TensorFields):
    """Decoded map elements, one a query, and the drivable area."""

    layer_logits: tuple[Float[Tensor, "B Q K"], ...]  # classes of MAP_CLASSES plus "no object" last
    layer_masks: tuple[Float[Tensor, "B Q H W"], ...]  # mask logits
    drivable: Float[Tensor, "B H W"]  # logits
    # Of a panoptic head, whose Q are (query, class) pairs that it merges to one map; else None.
    labels: Int64[Tensor, "B Q"] | None = None  # index into MAP_CLASSES
    kept: Bool[Tensor, "B Q"] | None = None  # True: an element of the merged map
    lanes: Bool[Tensor, "B L H W"] | None = None  # the merged map: cells of each class
    decoding: MapDecoding | None = None


@shape_checked
@dataclass(frozen=True)
class TokenSet(TensorFields):
    """Tokens of one stream.

    Rows of feats where mask is False are padding and must not reach the language model.
    For the track stream, `query_index` says which row of `predictions` each token is.
    """

    stream: Stream
    feats: Float[Tensor, "B N D"]
    mask: Bool[Tensor, "B N"]
    predictions: AgentPredictions | MapPredictions | None = None
    query_index: Int64[Tensor, "B N"] | None = None
