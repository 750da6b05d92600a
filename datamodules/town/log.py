"""What the town's simulation hands to its renderers and writers: what was true, no files.

Global frame of a location: x east, y north, z up, metres; the ground is the plane z = 0. Yaw is
measured from +x, counter-clockwise. Simulated at TICK_S; key-frames are every TICKS_PER_KEYFRAME
ticks. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TICK_S = 0.05
TICKS_PER_KEYFRAME = 10
KEYFRAMES_PER_SCENE = 40  # 20 s at 2 Hz
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
SCENERY = -1  # stands for the id of what is no actor
LightColour = Literal["red", "yellow", "green"]


@dataclass(frozen=True)
class Lane:
    """One lane: a centre line [P, 2] in driving direction, sampled about every metre."""

    id: int
    centre: FloatArray
    width_m: float
    is_connector: bool  # inside a junction
    successors: tuple[int, ...]
    left_neighbour: int | None = None  # same direction
    right_neighbour: int | None = None
    stop_line: int | None = None  # id of the stop line at its end


@dataclass(frozen=True)
class StopLine:
    """A stop line polygon [P, 2] and the light or crossing that makes one stop there."""

    id: int
    polygon: FloatArray
    cue: Literal["TRAFFIC_LIGHT", "PED_CROSSING", "STOP_SIGN"]
    light: int | None


@dataclass(frozen=True)
class TrafficLight:
    """A light on a pole, running through `cycle` (colour, seconds) from `offset_s` on."""

    id: int
    position: FloatArray  # [3], centre of the lamp box
    yaw: float  # direction the lamps face
    cycle: tuple[tuple[LightColour, float], ...]
    offset_s: float

    def colour(self, t_s: float) -> LightColour:
        """Colour shown at time t_s of the scene."""
        phase = (t_s + self.offset_s) % sum(seconds for _, seconds in self.cycle)
        for colour, seconds in self.cycle:
            if phase < seconds:
                return colour
            phase -= seconds
        return self.cycle[-1][0]


@dataclass(frozen=True)
class StaticBlock:
    """Scenery that is drawn but never annotated: houses and trees."""

    kind: Literal["building", "tree"]
    position: FloatArray  # [2] centre
    size: FloatArray  # width (x), length (y), height in metres
    yaw: float
    colour: tuple[int, int, int]  # RGB


@dataclass(frozen=True)
class Boxes:
    """Upright boxes on the ground at one moment, in arrays of one row a box.

    Attributes:
        id: [n] of the actor, or SCENERY.
        xy: [n, 2] centres on the ground.
        yaw: [n] directions of the lengths.
        size_wlh: [n, 3].
    """

    id: NDArray[np.int64]
    xy: FloatArray
    yaw: FloatArray
    size_wlh: FloatArray

    def within(self, reach_m: float, of: FloatArray) -> Boxes:
        """Those nearer to a point [2] than reach_m, in the same order."""
        near = np.linalg.norm(self.xy - of, axis=1) < reach_m
        return Boxes(self.id[near], self.xy[near], self.yaw[near], self.size_wlh[near])

    def and_then(self, others: Boxes) -> Boxes:
        """These boxes and then others."""
        return Boxes(
            np.concatenate([self.id, others.id]),
            np.concatenate([self.xy, others.xy]),
            np.concatenate([self.yaw, others.yaw]),
            np.concatenate([self.size_wlh, others.size_wlh]),
        )

    def corners(self) -> FloatArray:
        """Corners [n, 8, 3]: four at the bottom, four at the top."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        turn = np.stack([c, s, -s, c], axis=-1).reshape(-1, 2, 2)
        half = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
        corners = np.zeros((len(self.id), 8, 3))
        ground = (half * self.size_wlh[:, None, [1, 0]]) @ turn + self.xy[:, None]
        corners[:, :4, :2] = corners[:, 4:, :2] = ground
        corners[:, 4:, 2] = self.size_wlh[:, None, 2]
        return corners


@dataclass(frozen=True)
class RoadMap:
    """One location; polygons are simple counter-clockwise [P, 2] arrays, lines [P, 2] arrays."""

    location: str
    extent_m: tuple[float, float]  # canvas edge: width, height; everything lies in [0, w] x [0, h]
    lanes: tuple[Lane, ...]
    drivable: tuple[FloatArray, ...]
    road_segments: tuple[tuple[FloatArray, bool], ...]  # polygon, is_intersection
    ped_crossings: tuple[FloatArray, ...]
    walkways: tuple[FloatArray, ...]
    stop_lines: tuple[StopLine, ...]
    lights: tuple[TrafficLight, ...]
    road_dividers: tuple[FloatArray, ...]  # between directions
    lane_dividers: tuple[FloatArray, ...]  # between lanes of one direction
    blocks: tuple[StaticBlock, ...] = ()

    @cached_property
    def houses(self) -> Boxes:
        """The blocks that are solid: they hide what is behind them, and stop laser beams."""
        houses = [block for block in self.blocks if block.kind == "building"]
        sizes = np.array([block.size for block in houses]).reshape(-1, 3)
        return Boxes(
            id=np.full(len(houses), SCENERY),
            xy=np.array([block.position for block in houses]).reshape(-1, 2),
            yaw=np.array([block.yaw for block in houses], float),
            size_wlh=sizes[:, [1, 0, 2]],
        )


@dataclass(frozen=True)
class Track:
    """Motion of one body over all K ticks of a scene."""

    xy: FloatArray  # [K, 2] centre of the box on the ground
    yaw: FloatArray  # [K]
    speed: FloatArray  # [K] m/s along the heading

    def __post_init__(self) -> None:
        """Check that every array covers the same ticks."""
        if not len(self.xy) == len(self.yaw) == len(self.speed):
            raise ValueError("xy, yaw and speed of a Track must have one row a tick")


@dataclass(frozen=True)
class Actor:
    """Somebody or something that is annotated."""

    id: int
    category: str  # nuScenes raw category, e.g. vehicle.car, human.pedestrian.adult
    size_wlh: FloatArray  # [3]
    colour: tuple[int, int, int]  # RGB
    colour_name: str  # for captions: "red", "white", ...
    track: Track
    present: BoolArray  # [K] False: not in the world
    braking: BoolArray  # [K] brake lights on
    attribute: tuple[str, ...]  # [K] nuScenes attribute name, "" for classes without
    intent: str  # for captions: "parked", "following the lane", "crossing the street", ...


@dataclass(frozen=True)
class EgoLog:
    """The expert's drive, at nuScenes' ego frame: the ground under the middle of the rear axle."""

    track: Track
    acceleration: FloatArray  # [K] longitudinal, m/s^2
    yaw_rate: FloatArray  # [K] rad/s
    steering: FloatArray  # [K] road-wheel angle in rad, left positive
    braking: BoolArray  # [K]
    narration: tuple[str, ...]  # [K] what it is doing, e.g. "the car is slowing down"
    reason: tuple[str, ...]  # [K] why, e.g. "because the light ahead is red"


@dataclass(frozen=True)
class SceneLog:
    """One 20 s scene (K = KEYFRAMES_PER_SCENE * TICKS_PER_KEYFRAME ticks)."""

    name: str  # scene-0061
    index: int  # position in the generated set
    seed: int
    road: RoadMap
    ego: EgoLog
    actors: tuple[Actor, ...]
    daylight: float  # 1 noon .. 0.25 dusk; drawn as brightness
    description: str  # nuScenes scene description, comma separated
    start_time_s: float  # Unix time of tick 0

    @property
    def location(self) -> str:
        """Name of the map this scene lies on."""
        return self.road.location

    def actor_boxes(self, tick: int) -> Boxes:
        """Boxes of the actors that are in the world at a tick."""
        actors = [actor for actor in self.actors if actor.present[tick]]
        return Boxes(
            id=np.array([actor.id for actor in actors], np.int64),
            xy=np.array([actor.track.xy[tick] for actor in actors]).reshape(-1, 2),
            yaw=np.array([actor.track.yaw[tick] for actor in actors]),
            size_wlh=np.array([actor.size_wlh for actor in actors]).reshape(-1, 3),
        )
