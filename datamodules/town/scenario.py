"""One scene: a route for the expert, things that happen on it, and the traffic around.

The rule for what happens: the next three seconds must hang on what the cameras see. Every scene
therefore has several of: bends of many radii, a vehicle ahead that brakes and starts again, lights,
people on crossings, parked trucks and road works to swing around, turns at junctions.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from datamodules.town.bodies import BARRIER, CONE, WORKER, pick_body, pick_person
from datamodules.town.driver import Driver
from datamodules.town.geometry import FloatArray, arc_lengths, headings, normals, rectangle
from datamodules.town.log import RoadMap, SceneLog, TrafficLight
from datamodules.town.paths import Obstacle, Path, build_path, centre_line, random_route
from datamodules.town.recorder import record_scene
from datamodules.town.roads import LANE_WIDTH_M, PARKING_M
from datamodules.town.traffic import (
    KERB_M,
    WALK_MPS,
    Body,
    Recording,
    Traffic,
    Vehicle,
    Walker,
)

WARM_UP_S = 4.0
DURATION_S = 20.0
ROUTE_M = 270.0
USUAL_MPS = 7.0  # what one gets through the town at, bends and all
REAR_AXLE_TO_CENTRE_M = 1.44
EGO_BODY = Body("vehicle.car", (1.73, 4.084, 1.56), (230, 230, 230), "white", "car")
EGO_FRONT_M = REAR_AXLE_TO_CENTRE_M + EGO_BODY.size_wlh[1] / 2


@dataclass(frozen=True)
class Parked:
    """A body at the kerb, on the pavement side of a lane."""

    body: Body
    lane: int
    at_m: float
    position: FloatArray  # [2] box centre
    yaw: float


def simulate_scene(road: RoadMap, name: str, index: int, seed: int) -> SceneLog:
    """Simulate one scene of 20 s; the same arguments give the same log.

    Args:
        road: map of the scene's location.
        name: nuScenes name of the scene.
        index: position in the generated set.
        seed: of the town.
    """
    rng = np.random.default_rng([seed, index, zlib.crc32(name.encode())])
    route = _route(road, rng)
    plain = build_path(road, route)
    parked, obstacles = _obstacles(road, plain, rng)
    path = build_path(road, route, obstacles)
    start = float(rng.uniform(6.0, 20.0))
    lights = _lights(road, path, start, rng)
    ego = Vehicle(
        EGO_BODY,
        Driver(path, start, 4.0, EGO_FRONT_M),
        centre_m=REAR_AXLE_TO_CENTRE_M,
    )
    vehicles = [ego, *_leaders(path, start, rng)]
    vehicles += _others(road, path, start, vehicles, obstacles, rng)
    walkers = _walkers(road, path, start, rng)
    recording = _drive(road, lights, vehicles, walkers, parked)
    return record_scene(
        road=replace(road, lights=lights),
        name=name,
        index=index,
        seed=seed,
        path=path,
        vehicles=vehicles,
        walkers=walkers,
        parked=parked,
        recording=recording,
        rng=rng,
    )


def _drive(
    road: RoadMap,
    lights: Sequence[TrafficLight],
    vehicles: list[Vehicle],
    walkers: list[Walker],
    parked: list[Parked],
) -> Recording:
    """Run the traffic; whoever touches somebody is taken out of the lists, and all starts anew.

    Leaving a body out of the log alone would not do: others have reacted to it already.
    """
    standing = [rectangle(p.position, p.yaw, *p.body.size_wlh[:2]) for p in parked]
    boxes = np.array(standing).reshape(-1, 4, 2)
    while True:
        fresh = [replace(vehicle, driver=copy(vehicle.driver)) for vehicle in vehicles]
        traffic = Traffic(road, lights, fresh, [copy(walker) for walker in walkers], boxes)
        recording = traffic.run(WARM_UP_S, DURATION_S)
        if recording.clash is None:
            return recording
        if recording.clash < len(vehicles):
            del vehicles[recording.clash]
        else:
            del walkers[recording.clash - len(vehicles)]


def _route(road: RoadMap, rng: np.random.Generator) -> tuple[int, ...]:
    """Of some random routes, one with bends, turns and lights in its first 170 m."""
    streets = [lane for lane in road.lanes if not lane.is_connector]
    candidates = []
    for _ in range(12):
        lane = streets[int(rng.integers(len(streets)))]
        route = random_route(road, lane.id, ROUTE_M, rng)
        line, begins = centre_line(road, route)
        steering = float(np.abs(np.diff(headings(line[arc_lengths(line) < 170]))).sum())
        # A light or two that the ego car gets to within the scene.
        lit = sum(
            road.lanes[lane].stop_line is not None and 40 < end < 130
            for lane, end in zip(route, begins[1:], strict=False)
        )
        candidates.append((min(steering, 4.0) + 0.8 * lit + rng.uniform(0, 1.5), route))
    return max(candidates)[1]


def _obstacles(
    road: RoadMap, path: Path, rng: np.random.Generator
) -> tuple[list[Parked], list[Obstacle]]:
    """Parked trucks and cars, and road works, at the kerb of the ego car's route."""
    parked: list[Parked] = []
    obstacles: list[Obstacle] = []
    crossings = np.array([polygon.mean(0) for polygon in road.ped_crossings])
    at = float(rng.uniform(34, 62))
    while at < path.length_m - 40:
        lane = path.lane_at(at)
        centre = road.lanes[lane].centre
        along = at - float(path.lane_start_m[path.lanes.index(lane)])
        length = float(arc_lengths(centre)[-1])
        outer = road.lanes[lane].right_neighbour is None
        if not road.lanes[lane].is_connector and outer and 16 < along < length - 22:
            kind = rng.choice(
                ["truck", "car", "works", "bus", "trailer"], p=[0.4, 0.22, 0.22, 0.1, 0.06]
            )
            body = pick_body(str(kind), rng) if kind != "works" else BARRIER
            place = centre[round(along)]
            bend = float(np.abs(np.interp(at + np.arange(-8, 9), path.s, path.curvature)).max())
            sagitta = body.size_wlh[1] ** 2 * bend / 8
            on_crossing = np.linalg.norm(crossings - place, axis=1).min() < body.size_wlh[1] / 2 + 4
            if sagitta > 0.3 or on_crossing:
                at += 6.0  # a long body would reach far into a bend; nobody parks on a crossing
                continue
            if kind == "works":
                parked += _road_works(centre, lane, along)
                obstacles.append(Obstacle(lane, along, 5.0, 1.15, "a construction site"))
            else:
                parked.append(_park(body, centre, lane, along))
                swing = 1.0 + (body.size_wlh[0] - 2.5) if kind != "car" else 0.5
                half = body.size_wlh[1] / 2
                obstacles.append(Obstacle(lane, along, half, swing, f"a parked {body.name}"))
        at += float(rng.uniform(36, 80))
    return parked + _kerb_cars(road, path, parked, rng), obstacles


def _park(
    body: Body, centre: FloatArray, lane: int, along_m: float, onto_pavement_m: float = -0.05
) -> Parked:
    """Stand with the right wheels at the kerb, or some way beyond it."""
    index = round(along_m)
    right = LANE_WIDTH_M / 2 + PARKING_M - body.size_wlh[0] / 2 + onto_pavement_m
    position = centre[index] - normals(centre)[index] * right
    return Parked(body, lane, along_m, position, float(headings(centre)[index]))


def _kerb_cars(
    road: RoadMap, path: Path, taken: list[Parked], rng: np.random.Generator
) -> list[Parked]:
    """Cars along both kerbs of the streets on the way, half on the pavement: in nobody's way."""
    way = path.points[path.s < 210][::10]
    crossings = np.array([polygon.mean(0) for polygon in road.ped_crossings])
    blocked = [parked.position for parked in taken]
    cars = []
    for lane in road.lanes:
        if lane.is_connector or lane.right_neighbour is not None:
            continue
        if np.linalg.norm(lane.centre[::6, None] - way[None], axis=-1).min() > 12:
            continue
        at = float(rng.uniform(10, 26))
        while at < len(lane.centre) - 12:
            kind = "car" if rng.random() < 0.88 else "truck"
            car = _park(pick_body(kind, rng), lane.centre, lane.id, at, onto_pavement_m=0.75)
            clear = not blocked or np.linalg.norm(blocked - car.position, axis=1).min() > 13
            if clear and np.linalg.norm(crossings - car.position, axis=1).min() > 9:
                cars.append(car)
                blocked.append(car.position)
            at += float(rng.choice([8.0, 14.0, 30.0]) + rng.uniform(0, 5))
    return cars


def _road_works(centre: FloatArray, lane: int, along_m: float) -> list[Parked]:
    """A barrier across the lane's edge with a row of cones before and behind it."""
    pieces = []
    for ahead, right, body in (
        (-5.0, 2.4, CONE),
        (-3.4, 1.7, CONE),
        (-1.8, 1.0, CONE),
        (0.0, 1.75, BARRIER),
        (2.0, 1.0, CONE),
        (3.8, 1.9, CONE),
        (2.4, 2.5, WORKER),
    ):
        index = round(along_m + ahead)
        position = centre[index] - normals(centre)[index] * right
        pieces.append(Parked(body, lane, along_m + ahead, position, float(headings(centre)[index])))
    return pieces


def _lights(
    road: RoadMap, path: Path, start: float, rng: np.random.Generator
) -> tuple[TrafficLight, ...]:
    """Set the lights so that the ego car meets green often and never waits for long."""
    lights = list(road.lights)
    arrival_s, last = -WARM_UP_S, start
    for at, line in path.stops:
        number = road.stop_lines[line].light
        if number is None or at < start:
            continue
        arrival_s += (at - last) / USUAL_MPS
        last = at
        wait_s = float(rng.uniform(1.0, 5.0)) if rng.random() < 0.3 else float(rng.uniform(-5, 0))
        shift = -(arrival_s + wait_s) - lights[number].offset_s
        # All lights of a junction move together: their turns stay in order.
        centre = lights[number].position[:2]
        for other, light in enumerate(road.lights):
            if (
                np.linalg.norm(light.position[:2] - centre) < 60
                and light.cycle == lights[number].cycle
            ):
                lights[other] = replace(light, offset_s=light.offset_s + shift)
        arrival_s += max(0.0, wait_s)
    return tuple(lights)


def _leaders(path: Path, start: float, rng: np.random.Generator) -> list[Vehicle]:
    """Vehicles ahead on the ego car's own route that slow down and start again at times."""
    vehicles = []
    gap = float(rng.uniform(9, 34))
    for number in range(int(rng.choice([0, 1, 2], p=[0.65, 0.25, 0.1]))):
        kind = str(
            rng.choice(
                ["car", "truck", "bus", "motorcycle", "bicycle"], p=[0.6, 0.16, 0.08, 0.1, 0.06]
            )
        )
        body = pick_body(kind, rng)
        s = start + EGO_FRONT_M + gap + body.size_wlh[1] / 2
        moods = []
        t = float(rng.uniform(0.5, 6)) if number == 0 else 99.0
        while t < DURATION_S:
            slow = float(rng.choice([0.0, 2.0, 4.0], p=[0.15, 0.35, 0.5]))
            lasting = float(rng.uniform(1.5, 3.5))
            moods.append((t, t + lasting, slow))
            t += lasting + float(rng.uniform(3.5, 8.0))
        driver = Driver(
            path,
            s,
            4.0,
            body.size_wlh[1] / 2,
            keenness=float(rng.uniform(0.7, 1.0)) if kind != "bicycle" else 0.5,
            moods=tuple(moods),
        )
        vehicles.append(Vehicle(body, driver))
        gap += body.size_wlh[1] + float(rng.uniform(8, 22))
    return vehicles


def _others(
    road: RoadMap,
    path: Path,
    start: float,
    vehicles: list[Vehicle],
    obstacles: list[Obstacle],
    rng: np.random.Generator,
) -> list[Vehicle]:
    """Traffic on the streets around the first part of the route."""
    way = path.points[(path.s > start - 30) & (path.s < start + 190)]
    taken = [vehicle.driver.path.position(vehicle.driver.s) for vehicle in vehicles]
    wanted = int(rng.integers(9, 14))
    near = [
        lane.id
        for lane in road.lanes
        if not lane.is_connector
        and np.linalg.norm(lane.centre[:, None] - way[None, ::8], axis=-1).min() < 45
    ]
    found: list[Vehicle] = []
    for _ in range(120):
        if len(found) >= wanted:
            break
        lane = near[int(rng.integers(len(near)))]
        if lane in path.lanes and rng.random() < 0.85:
            continue  # queues in front of the ego car are seldom, or all it would do is wait
        kind = str(
            rng.choice(
                ["car", "truck", "bus", "motorcycle", "bicycle", "construction"],
                p=[0.66, 0.11, 0.06, 0.08, 0.07, 0.02],
            )
        )
        body = pick_body(kind, rng)
        centre = road.lanes[lane].centre
        s = float(rng.uniform(4, max(5.0, len(centre) - 14)))
        position = centre[min(round(s), len(centre) - 1)]
        if min(float(np.linalg.norm(position - other)) for other in taken) < 15:
            continue
        # Long enough for the whole scene, so that nobody arrives at its end.
        route = random_route(road, lane, 330.0, rng)
        line = build_path(road, route, obstacles, left_m=-0.9 if kind == "bicycle" else 0.0)
        half = body.size_wlh[1] / 2
        keen = 0.45 if kind == "bicycle" else float(rng.uniform(0.75, 1.05))
        found.append(Vehicle(body, Driver(line, s, 4.0, half, keenness=keen)))
        taken.append(position)
    return found


def _walkers(road: RoadMap, path: Path, start: float, rng: np.random.Generator) -> list[Walker]:
    """People on the pavements, and some who cross when the ego car comes."""
    walkers = []
    for enter, _, crossing in path.crossings:
        if enter < start + 14 or rng.random() > 0.2:
            continue
        polygon = road.ped_crossings[crossing]
        middle = polygon.mean(0)
        # Crossings are rectangles whose longer side goes over the street.
        sides = polygon[1] - polygon[0], polygon[2] - polygon[1]
        over = max(sides, key=lambda side: float(np.linalg.norm(side)))
        reach = over / 2 * (1 + 2 * KERB_M / np.linalg.norm(over)) * rng.choice([-1, 1])
        for person in range(int(rng.integers(1, 3))):
            aside = np.array([-over[1], over[0]]) / np.linalg.norm(over) * (person - 0.5) * 1.2
            walkers.append(
                Walker(
                    body=pick_person(rng),
                    start=middle - reach + aside,
                    end=middle + reach + aside,
                    speed=WALK_MPS * float(rng.uniform(0.95, 1.15)),
                    crossing=crossing,
                    state="waiting",
                )
            )
    return walkers + _strollers(road, path, start, rng)


def _strollers(road: RoadMap, path: Path, start: float, rng: np.random.Generator) -> list[Walker]:
    """People who walk along the pavement and never step onto the road."""
    way = path.points[(path.s > start - 10) & (path.s < start + 160)][::10]
    walkers = []
    for polygon in road.walkways:
        middle = (polygon[: len(polygon) // 2] + polygon[len(polygon) // 2 :][::-1]) / 2
        close = np.linalg.norm(middle[:, None] - way[None], axis=-1).min(1) < 22
        if close.sum() < 12 or rng.random() < 0.3:
            continue
        index = np.flatnonzero(close)
        for _ in range(int(rng.integers(2, 6))):
            first = int(rng.choice(index))
            length = int(rng.integers(10, 32)) * int(rng.choice([-1, 1]))
            last = int(np.clip(first + length, 0, len(middle) - 1))
            # A straight walk must stay on a bending pavement.
            chord = middle[[first, last]]
            between = middle[min(first, last) : max(first, last) + 1]
            line = np.linspace(0, 1, len(between))[:, None]
            ends = chord if first <= last else chord[::-1]
            straight = ends[0] + line * (ends[1] - ends[0])
            if len(between) < 8 or np.linalg.norm(straight - between, axis=1).max() > 0.9:
                continue
            body = pick_person(rng)
            speed = float(rng.choice([0.0, 1.2, 1.4], p=[0.25, 0.4, 0.35]))
            walkers.append(Walker(body, chord[0], chord[1], speed * rng.uniform(0.9, 1.1)))
    return walkers
