"""What is true around the car at a key-frame: the one source of every text the town writes.

Frame: LIDAR_TOP at that moment (x right, y forward), metres, m/s, radians. Only annotated things
are known here, because a text must not speak of what no sensor of the car can see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from scipy.spatial import cKDTree

from datamodules.town.log import (
    TICK_S,
    TICKS_PER_KEYFRAME,
    Actor,
    FloatArray,
    Lane,
    LightColour,
    SceneLog,
)

LIDAR_AHEAD_M = 0.943713  # of the rear axle, as mounted on nuScenes' cars
LOOK_AHEAD_M = 45.0  # road, lights and crossings are spoken of this far ahead
STEP_M = 1.0  # lane centres are sampled about this finely
BEND_RAD = 0.3  # heading change over BEND_M of road that is called a bend
BEND_M = 30.0
OWN_LANE_M = 1.8  # a centre this close to our way stands in it
BESIDE_LANE_M = 2.6  # nearer than this, a parked body or a cone narrows our lane
MOVING_MPS = 0.3

# nuScenes-QA's six directions: 60 degrees each, "front" around straight ahead.
SECTORS = ("front", "front left", "back left", "back", "back right", "front right")
# The class names of NuScenes-QA (nuScenes' ten, with spaces), by raw category.
CLASS_NAMES = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.rigid": "bus",
    "vehicle.bus.bendy": "bus",
    "vehicle.construction": "construction vehicle",
    "vehicle.trailer": "trailer",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic cone",
    "movable_object.barrier": "barrier",
}
# NuScenes-QA's words for nuScenes' attributes.
STATUS_NAMES = {
    "vehicle.moving": "moving",
    "vehicle.stopped": "stopped",
    "vehicle.parked": "parked",
    "cycle.with_rider": "with rider",
    "cycle.without_rider": "without rider",
    "pedestrian.moving": "moving",
    "pedestrian.standing": "standing",
    "pedestrian.sitting_lying_down": "not standing",
}
Place = Literal[
    "our lane", "left lane", "right lane", "oncoming lane", "kerb", "pavement", "crossing",
    "junction", "road", "side street", "off road",
]  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One annotated actor as the car sees it."""

    actor: Actor
    name: str  # one of CLASS_NAMES' values
    status: str  # one of STATUS_NAMES' values, "" for cones and barriers
    x_m: float  # centre of the box
    y_m: float
    distance_m: float
    sector: str  # one of SECTORS, seen from the car
    heading: float  # relative to the car's own, left positive, in (-pi, pi]
    speed_mps: float
    velocity: tuple[float, float]  # over ground, in the lidar's axes
    braking: bool
    place: Place
    ahead_m: float | None  # along our way, where that way is this close (BESIDE_LANE_M) to it

    @property
    def moving(self) -> bool:
        """Whether it moves."""
        return self.speed_mps > MOVING_MPS


@dataclass(frozen=True)
class FrameFacts:
    """One key-frame."""

    scene: str
    keyframe: int
    things: tuple[Thing, ...]  # nearest first
    speed_mps: float
    acceleration: float
    braking: bool
    narration: str
    reason: str
    lanes_each_way: int
    in_junction: bool
    junction_ahead_m: float | None  # where our lane ends in one, from the lidar
    light: LightColour | None  # of the next stop line within LOOK_AHEAD_M
    light_ahead_m: float | None  # to its stop line, along the lane
    crossing_ahead_m: float | None  # to where our way enters it; 0 when on it
    bend: Literal["", "left", "right"]  # of the road over the next BEND_M

    @property
    def leader(self) -> Thing | None:
        """The nearest vehicle on our way ahead that takes part in the traffic."""
        ahead = [(t.ahead_m, t) for t in self.things if t.place == "our lane" and t.ahead_m]
        return min(ahead, key=lambda pair: pair[0], default=(0.0, None))[1]


def to_lidar(log: SceneLog, tick: int, points: FloatArray) -> FloatArray:
    """Global points [..., 2] as (x right, y forward) of LIDAR_TOP at a tick."""
    yaw = log.ego.track.yaw[tick]
    ahead = np.array([np.cos(yaw), np.sin(yaw)])
    right = np.array([ahead[1], -ahead[0]])
    moved = np.asarray(points) - (log.ego.track.xy[tick] + LIDAR_AHEAD_M * ahead)
    return np.stack([moved @ right, moved @ ahead], axis=-1)


def sector_of(x_m: float, y_m: float) -> str:
    """Direction of an offset (x right, y forward), one of SECTORS."""
    leftward = math.atan2(-x_m, y_m)  # 0 ahead, left positive
    return SECTORS[math.floor((leftward + math.pi / 6) / (math.pi / 3)) % 6]


def wrap(angle: float | FloatArray) -> FloatArray:
    """Angle within (-pi, pi]."""
    return np.pi - (np.pi - np.asarray(angle)) % (2 * np.pi)


class SceneFacts:
    """Facts of every key-frame of one scene; geometry of its map is prepared once."""

    def __init__(self, log: SceneLog) -> None:
        self.log = log
        road = log.road
        self._lane_points = np.concatenate([lane.centre for lane in road.lanes])
        self._lane_of_point = np.concatenate(
            [np.full(len(lane.centre), number) for number, lane in enumerate(road.lanes)]
        )
        self._yaw_of_point = np.concatenate([_headings(lane.centre) for lane in road.lanes])
        self._tree = cKDTree(self._lane_points)
        self._crossings = _Areas(road.ped_crossings)
        self._walkways = _Areas(road.walkways)
        self._junctions = _Areas([area for area, crossed in road.road_segments if crossed])
        self._drivable = _Areas(road.drivable)
        self._number = {lane.id: number for number, lane in enumerate(road.lanes)}
        self._route = self._ego_lanes()

    def at(self, keyframe: int, actor_ids: Sequence[int]) -> FrameFacts:
        """Facts of a key-frame with the actors annotated in it.

        Args:
            keyframe: number within the scene.
            actor_ids: ids of the annotated actors.
        """
        log, tick = self.log, keyframe * TICKS_PER_KEYFRAME
        lane = log.road.lanes[self._route[keyframe]]
        way = self._way(keyframe)
        local = to_lidar(log, tick, way)
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1))])
        # Distances count from the lidar, not from the lane point next to it.
        along += float(np.hypot(*local[0]) * np.sign(local[0, 1]))
        light, light_ahead_m = self._light(lane, tick, local, along)
        on_crossing = self._crossings.contain(way) & (along < LOOK_AHEAD_M)
        position = log.ego.track.xy[tick]
        in_junction = bool(self._junctions.contain(position[None])[0])
        junction = self._junctions.contain(way) & (along < LOOK_AHEAD_M) & (along > 0)
        near = along < BEND_M
        turned = _headings(way)[near] if near.sum() > 2 else np.zeros(1)
        bend = float(turned[-1] - turned[0])
        return FrameFacts(
            scene=log.name,
            keyframe=keyframe,
            things=self._things(keyframe, actor_ids, lane, local, along),
            speed_mps=float(log.ego.track.speed[tick]),
            acceleration=float(log.ego.acceleration[tick]),
            braking=bool(log.ego.braking[tick]),
            narration=log.ego.narration[tick],
            reason=log.ego.reason[tick],
            lanes_each_way=self._lane_count(lane),
            in_junction=in_junction,
            junction_ahead_m=(
                float(along[junction][0]) if junction.any() and not in_junction else None
            ),
            light=light,
            light_ahead_m=light_ahead_m,
            crossing_ahead_m=max(0.0, float(along[on_crossing][0])) if on_crossing.any() else None,
            bend="left" if bend > BEND_RAD else "right" if bend < -BEND_RAD else "",
        )

    def _ego_lanes(self) -> list[int]:
        """Lane (its place in road.lanes) that the car is on at each key-frame."""
        log = self.log
        ticks = range(0, len(log.ego.track.xy), TICKS_PER_KEYFRAME)
        xy, yaw = log.ego.track.xy[::TICKS_PER_KEYFRAME], log.ego.track.yaw
        distance, point = self._tree.query(xy, k=24)
        lanes = log.road.lanes
        streets: list[int | None] = []
        for row, tick in enumerate(ticks):
            fits = [
                int(self._lane_of_point[p])
                for d, p in zip(distance[row], point[row], strict=True)
                if d < 3.0 and abs(wrap(self._yaw_of_point[p] - yaw[tick])) < 0.8
            ]
            street = next((n for n in fits[:1] if not lanes[n].is_connector), None)
            streets.append(street)
        route = []
        for row, street in enumerate(streets):
            route.append(street if street is not None else self._connector(streets, row, xy[row]))
        return route

    def _connector(self, streets: list[int | None], row: int, position: FloatArray) -> int:
        """The connector from the last street to the next one; the nearest where either is open."""
        lanes = self.log.road.lanes
        before = next((s for s in reversed(streets[:row]) if s is not None), None)
        after = next((s for s in streets[row:] if s is not None), None)
        fits = [
            number
            for number, lane in enumerate(lanes)
            if lane.is_connector
            and (before is None or lane.id in lanes[before].successors)
            and (after is None or lanes[after].id in lane.successors)
        ]
        # The last key-frames of a scene tell best which way an unfinished turn goes.
        last = self.log.ego.track.xy[-1] if after is None else position
        fits = fits or list(range(len(lanes)))
        return min(fits, key=lambda n: float(np.linalg.norm(lanes[n].centre - last, axis=1).min()))

    def _way(self, keyframe: int) -> FloatArray:
        """Lane centres from beside the car on, [P, 2], as far as the route is known."""
        lanes, route = self.log.road.lanes, self._route
        position = to_lidar_origin(self.log, keyframe * TICKS_PER_KEYFRAME)
        centre = lanes[route[keyframe]].centre
        first = int(np.linalg.norm(centre - position, axis=1).argmin())
        pieces = [centre[first:]]
        following = [b for a, b in zip(route[keyframe:-1], route[keyframe + 1 :], strict=True)
                     if a != b]  # fmt: skip
        current = lanes[route[keyframe]]
        while sum(map(len, pieces)) * STEP_M < LOOK_AHEAD_M + BEND_M:
            choices = [self._number[lane] for lane in current.successors]
            wanted = [n for n in following if n in choices]
            if not wanted and len(choices) != 1:
                break  # nobody knows yet which way it will turn
            current = lanes[wanted[0] if wanted else choices[0]]
            pieces.append(current.centre[1:])
        way = np.concatenate(pieces)
        return way if len(way) > 1 else np.concatenate([centre[-2:-1], way])

    def _lane_count(self, lane: Lane) -> int:
        """Lanes a direction of the street the car is on, or of the one that it leads to."""
        while lane.is_connector and lane.successors:
            lane = self.log.road.lanes[self._number[lane.successors[0]]]
        return 1 + (lane.left_neighbour is not None or lane.right_neighbour is not None)

    def _light(
        self, lane: Lane, tick: int, way: FloatArray, along: FloatArray
    ) -> tuple[LightColour | None, float | None]:
        road = self.log.road
        if lane.stop_line is None:
            return None, None
        line = next(line for line in road.stop_lines if line.id == lane.stop_line)
        if line.light is None:
            return None, None
        middle = to_lidar(self.log, tick, line.polygon.mean(0))
        # The line lies beside our lane centre: its place along our way is what counts.
        ahead_m = float(along[np.linalg.norm(way - middle, axis=1).argmin()])
        if not 0.0 < ahead_m < LOOK_AHEAD_M:
            return None, None
        light = next(light for light in road.lights if light.id == line.light)
        return light.colour(tick * TICK_S), ahead_m

    def _things(
        self,
        keyframe: int,
        actor_ids: Sequence[int],
        lane: Lane,
        way: FloatArray,
        along: FloatArray,
    ) -> tuple[Thing, ...]:
        log, tick = self.log, keyframe * TICKS_PER_KEYFRAME
        by_id = {actor.id: actor for actor in log.actors}
        actors = [by_id[number] for number in actor_ids]
        if not actors:
            return ()
        xy = np.array([actor.track.xy[tick] for actor in actors])
        yaw = np.array([actor.track.yaw[tick] for actor in actors])
        local = to_lidar(log, tick, xy)
        heading = wrap(yaw - log.ego.track.yaw[tick])
        gap = np.linalg.norm(local[:, None] - way[None], axis=-1)
        where = gap.argmin(1)
        areas = np.stack(
            [areas.contain(xy) for areas in
             (self._crossings, self._junctions, self._walkways, self._drivable)], axis=-1
        )  # fmt: skip
        lanes = self._lanes_of(xy, yaw)
        things = []
        for row, actor in enumerate(actors):
            aside = float(gap[row, where[row]])
            ahead = float(along[where[row]]) if aside < BESIDE_LANE_M else None
            if ahead is not None and not 1.0 < ahead < along[-1]:
                ahead = None
            x, y = float(local[row, 0]), float(local[row, 1])
            speed = float(actor.track.speed[tick])
            # Rightwards is sin and forwards cos of an angle measured to the left of straight on.
            turned = float(heading[row])
            things.append(
                Thing(
                    actor=actor,
                    name=CLASS_NAMES[actor.category],
                    status=STATUS_NAMES.get(actor.attribute[tick], ""),
                    x_m=x,
                    y_m=y,
                    distance_m=float(np.hypot(x, y)),
                    sector=sector_of(x, y),
                    heading=turned,
                    speed_mps=speed,
                    velocity=(-speed * float(np.sin(turned)), speed * float(np.cos(turned))),
                    braking=bool(actor.braking[tick]),
                    place=self._place(
                        actor,
                        tick,
                        turned,
                        ahead if aside < OWN_LANE_M else None,
                        lane,
                        lanes[row],
                        areas[row],
                    ),
                    ahead_m=ahead,
                )
            )
        return tuple(sorted(things, key=lambda thing: thing.distance_m))

    def _lanes_of(self, xy: FloatArray, yaw: FloatArray) -> list[int | None]:
        """The lane that leads along each body: place in road.lanes."""
        distance, point = self._tree.query(xy, k=8)
        aligned = np.abs(wrap(self._yaw_of_point[point] - yaw[:, None])) < 0.7
        fits = aligned & (distance < 2.0)
        return [
            int(self._lane_of_point[point[row, fits[row].argmax()]]) if fits[row].any() else None
            for row in range(len(xy))
        ]

    def _place(
        self,
        actor: Actor,
        tick: int,
        heading: float,
        ahead_m: float | None,
        ego_lane: Lane,
        lane: int | None,
        areas: np.ndarray,
    ) -> Place:
        crossing, junction, walkway, drivable = (bool(flag) for flag in areas)
        if actor.category.startswith("human"):
            return (
                "crossing" if crossing and drivable
                else "pavement" if walkway
                else "road" if drivable
                else "off road"
            )  # fmt: skip
        if actor.attribute[tick] == "vehicle.parked":
            return "kerb"
        if not actor.category.startswith("vehicle"):
            return "road" if drivable else "off road"
        if ahead_m is not None and abs(heading) < 1.2:
            return "our lane"
        if junction:
            return "junction"
        number = None if lane is None else self.log.road.lanes[lane].id
        if number is not None and number == ego_lane.left_neighbour:
            return "left lane"
        if number is not None and number == ego_lane.right_neighbour:
            return "right lane"
        if number == ego_lane.id:
            return "our lane"  # behind us
        return "oncoming lane" if abs(heading) > 2.3 else "side street"


class _Areas:
    """Polygons that many points are looked up in."""

    def __init__(self, polygons: Sequence[FloatArray]) -> None:
        self._tree = shapely.STRtree([shapely.Polygon(polygon) for polygon in polygons])

    def contain(self, points: FloatArray) -> np.ndarray:
        """Whether each of [P, 2] lies in any of the polygons: [P]."""
        found = np.zeros(len(points), dtype=bool)
        found[self._tree.query(shapely.points(points), predicate="intersects")[0]] = True
        return found


def to_lidar_origin(log: SceneLog, tick: int) -> FloatArray:
    """Where LIDAR_TOP is on the plane at a tick: [2]."""
    yaw = log.ego.track.yaw[tick]
    return log.ego.track.xy[tick] + LIDAR_AHEAD_M * np.array([np.cos(yaw), np.sin(yaw)])


def _headings(points: FloatArray) -> FloatArray:
    """Unwrapped direction of a polyline at each of its points."""
    along = np.gradient(points, axis=0)
    return np.unwrap(np.arctan2(along[:, 1], along[:, 0]))
