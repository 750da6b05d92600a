"""Everybody moves: vehicles on paths, people on pavements and crossings, one clock for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from datamodules.town.driver import LOOK_AHEAD_M, Driver, Hold, Leader
from datamodules.town.geometry import FloatArray, distances, rectangle, rectangles_overlap
from datamodules.town.log import RoadMap, TrafficLight

STEP_S = 0.1
WALK_MPS = 1.5
YELLOW_BRAKE = 3.0  # who would have to brake harder than this drives on
KERB_M = 0.9  # people wait this far from the kerb
STEP_OUT_M = 26.0  # people step onto a crossing when the ego car is this near
ROOM_M = 0.12  # boxes closer than this count as touching


@dataclass(frozen=True)
class Body:
    """What stands or drives: its kind, its size and how it is spoken of."""

    category: str
    size_wlh: tuple[float, float, float]
    colour: tuple[int, int, int]
    colour_name: str
    name: str  # "car", "truck", ...


@dataclass
class Vehicle:
    """A body with a driver. `centre_m`: from the driver's reference point to the box centre."""

    body: Body
    driver: Driver
    centre_m: float = 0.0


@dataclass
class Walker:
    """A person on a straight line. On a crossing it starts when the ego car comes near."""

    body: Body
    start: FloatArray  # [2]
    end: FloatArray  # [2]
    speed: float
    crossing: int | None = None
    walked: float = 0.0
    state: Literal["waiting", "walking", "done"] = "walking"

    @cached_property
    def length_m(self) -> float:
        """Length of the walk."""
        return float(np.linalg.norm(self.end - self.start))

    @property
    def position(self) -> FloatArray:
        """Where the person is now: [2]."""
        return self.start + (self.end - self.start) * min(1.0, self.walked / self.length_m)

    @cached_property
    def yaw(self) -> float:
        """Direction of the walk."""
        return float(np.arctan2(*(self.end - self.start)[::-1]))


@dataclass
class Recording:
    """States of everything at every step of the clock; lists of rows, one a step."""

    vehicles: list[list[tuple[float, float, float]]] = field(default_factory=list)  # s, v, a
    reasons: list[tuple[str, str]] = field(default_factory=list)  # of the ego car
    walkers: list[list[tuple[float, float, float, str]]] = field(default_factory=list)
    clash: int | None = None  # body that got into another's way, and that ended the recording


class Traffic:
    """The clock of one scene. Vehicle 0 is the ego car."""

    def __init__(
        self,
        road: RoadMap,
        lights: Sequence[TrafficLight],
        vehicles: list[Vehicle],
        walkers: list[Walker],
        standing: FloatArray,
    ) -> None:
        """Take everybody in their first state, and the boxes that never move [P, 4, 2]."""
        self.road = road
        self.lights = lights
        self.vehicles = vehicles
        self.walkers = walkers
        self.standing = standing
        self._standing_middle, self._standing_reach = _circles(standing)
        sizes = np.array([vehicle.body.size_wlh for vehicle in vehicles])
        self._half = sizes[:, 0] / 2
        self._length = sizes[:, 1]
        self._centre_m = np.array([vehicle.centre_m for vehicle in vehicles])

    def run(self, warm_up_s: float, duration_s: float) -> Recording:
        """Drive, and stop at the first clash.

        The warm-up is not recorded, so that nobody starts from an invented state.

        Returns:
            Rows for every step so far. `clash` counts through the vehicles and then the walkers.
        """
        recording = Recording()
        steps = round((warm_up_s + duration_s) / STEP_S)
        for step in range(steps + 1):
            t_s = step * STEP_S - warm_up_s
            centre, yaw = self._poses()
            recording.clash = self._clash(centre, yaw)
            if recording.clash is not None:
                return recording
            self._decide(t_s, step, centre, yaw)
            if t_s >= -1e-9:
                recording.vehicles.append(
                    [(v.driver.s, v.driver.speed, v.driver.acceleration) for v in self.vehicles]
                )
                ego = self.vehicles[0].driver
                recording.reasons.append((ego.reason, ego.subject))
                recording.walkers.append([(*w.position, w.yaw, w.state) for w in self.walkers])
            for vehicle in self.vehicles:
                vehicle.driver.advance(STEP_S)
            self._walk()
        return recording

    def _decide(self, t_s: float, step: int, centre: FloatArray, yaw: FloatArray) -> None:
        speed = np.array([vehicle.driver.speed for vehicle in self.vehicles])
        parts = self._parts(centre, yaw)
        apart = distances(centre[:, None], centre)
        for number, vehicle in enumerate(self.vehicles):
            if number and (step + number) % 2:
                continue  # all but the ego car think every other step: half the work
            driver = vehicle.driver
            leader = self._leader(number, parts, apart[number], yaw, speed)
            driver.decide(t_s, leader, self._holds(driver, t_s))

    def _poses(self) -> tuple[FloatArray, FloatArray]:
        """Box centres [V, 2] and yaws [V]."""
        poses = np.array([vehicle.driver.path.pose(vehicle.driver.s) for vehicle in self.vehicles])
        yaw = poses[:, 2]
        direction = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
        return poses[:, :2] + self._centre_m[:, None] * direction, yaw

    def _parts(self, centre: FloatArray, yaw: FloatArray) -> FloatArray:
        """Five points along the middle of each vehicle, which stand for its box: [V, 5, 2]."""
        along = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
        at = np.linspace(-0.5, 0.5, 5)[:, None] * self._length[:, None, None]
        return centre[:, None] + at * along[:, None]

    def _clash(self, centre: FloatArray, yaw: FloatArray) -> int | None:
        """The body that is to go because it touches another: of two vehicles, the later one."""
        count = len(self.vehicles)
        people = [i for i, walker in enumerate(self.walkers) if walker.crossing is not None]
        moving = rectangle(centre, yaw, 2 * self._half + ROOM_M, self._length + ROOM_M)
        if people:
            crossing = [self.walkers[i] for i in people]
            sizes = np.array([walker.body.size_wlh for walker in crossing])
            at = np.array([walker.position for walker in crossing])
            facing = np.array([walker.yaw for walker in crossing])
            moving = np.concatenate([moving, rectangle(at, facing, sizes[:, 0], sizes[:, 1])])
        middle, reach = _circles(moving)
        middle = np.concatenate([middle, self._standing_middle])
        reach = np.concatenate([reach, self._standing_reach])
        apart = distances(middle[:count, None], middle)
        first, second = np.nonzero(apart < reach[:count, None] + reach[None])
        later = second > first
        first, second = first[later], second[later]
        if not len(first):
            return None
        every = np.concatenate([moving, self.standing])
        touching = rectangles_overlap(every[first], every[second])
        for a, b in zip(first[touching], second[touching], strict=True):
            if b < count:
                return int(b)
            if a:
                return int(a)
            if b < count + len(people):
                return count + people[b - count]
        return None

    def _leader(
        self, number: int, parts: FloatArray, apart: FloatArray, yaw: FloatArray, speed: FloatArray
    ) -> Leader | None:
        """The nearest vehicle that stands in our way within LOOK_AHEAD_M.

        Args:
            number: which vehicle we are.
            parts: points that stand for each vehicle [V, 5, 2].
            apart: distances from our centre to each vehicle's [V].
            yaw: of each vehicle [V].
            speed: of each vehicle [V].
        """
        driver = self.vehicles[number].driver
        path = driver.path
        first = int(path.s.searchsorted(driver.s))
        look_m = min(LOOK_AHEAD_M, 14.0 + 5.0 * driver.speed)
        last = int(path.s.searchsorted(driver.s + driver.front_m + look_m))
        way = path.points[first:last:2]
        if len(way) < 2:
            return None
        reach = self._half[number] + self._half + 0.25
        near = apart < look_m + 14
        near[number] = False
        others = np.flatnonzero(near)
        if len(others):
            # Most of them are beside the whole way.
            there = parts[others]
            beside = np.maximum(there.min(1) - way.max(0), way.min(0) - there.max(1))
            others = others[(beside < reach[others, None]).all(1)]
        if not len(others):
            return None
        distance = distances(parts[others, :, None], way)
        hit = (distance < reach[others, None, None]).any(1)  # [others, way]
        if not hit.any():
            return None
        where = np.where(hit.any(1), hit.argmax(1), len(way))
        nearest = int(where.argmin())
        other = others[nearest]
        gap = path.s[first + 2 * int(where[nearest])] - driver.s - driver.front_m
        turned = float(yaw[other] - yaw[number])
        if gap < -2.0 and speed[other] > 0 and np.cos(turned) < 0.3:
            return None  # it crosses behind our bumper
        return Leader(
            gap_m=float(gap),
            speed=float(max(0.0, speed[other] * np.cos(turned))),
            braking=self.vehicles[other].driver.acceleration < -0.8,
            name=self.vehicles[other].body.name,
        )

    def _holds(self, driver: Driver, t_s: float) -> list[Hold]:
        """Lights and people that ask us to stop."""
        holds = []
        front = driver.s + driver.front_m
        for at, line in driver.path.stops:
            gap = at - front
            light = self.road.stop_lines[line].light
            if light is None or not -0.8 < gap < LOOK_AHEAD_M:
                continue
            colour = self.lights[light].colour(t_s)
            needed = driver.speed**2 / (2 * max(gap, 0.1))
            if colour == "red" or (colour == "yellow" and needed < YELLOW_BRAKE):
                holds.append(Hold(gap, f"{colour} light"))
        for enter, leave, crossing in driver.path.crossings:
            gap = enter - 1.2 - front
            if -1.0 < gap < LOOK_AHEAD_M and self._someone_on(driver, crossing, (enter, leave)):
                holds.append(Hold(gap, "pedestrian"))
        return holds

    def _someone_on(self, driver: Driver, crossing: int, span: tuple[float, float]) -> bool:
        """Whether a person on the crossing has not yet passed our path."""
        walking = [w for w in self.walkers if w.crossing == crossing and w.state == "walking"]
        if not walking:
            return False
        here = driver.path.position(sum(span) / 2)
        for walker in walking:
            direction = (walker.end - walker.start) / walker.length_m
            if float(np.dot(walker.position - here, direction)) < 2.3:
                return True
        return False

    def _walk(self) -> None:
        ego = self.vehicles[0].driver
        front = ego.s + ego.front_m
        for walker in self.walkers:
            if walker.state == "waiting":
                for enter, _, crossing in ego.path.crossings:
                    gap = enter - front
                    stoppable = ego.speed**2 / (2 * 2.6) + 2.0
                    if crossing == walker.crossing and stoppable < gap < STEP_OUT_M:
                        walker.state = "walking"
            elif walker.state == "walking":
                walker.walked += walker.speed * STEP_S
                if walker.walked >= walker.length_m:
                    walker.state = "done"


def _circles(boxes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centres [n, 2] and radii [n] of the circles around boxes [n, 4, 2]."""
    middle = boxes.mean(1)
    return middle, distances(boxes[:, 0], middle)
