"""The road map of a location: a jittered grid of bending streets with junctions and lights.

Every junction of three or more streets has lights that give one approach green at a time, so that
no two streams of cars ever cross. Streets have one or two lanes a direction and a parking strip at
the kerb.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from datamodules.town.geometry import (
    FloatArray,
    arc_lengths,
    headings,
    hermite,
    normals,
    rectangle,
    resample,
    shifted,
    smooth,
    strip,
)
from datamodules.town.log import (
    Lane,
    LightColour,
    RoadMap,
    StaticBlock,
    StopLine,
    TrafficLight,
)

LANE_WIDTH_M = 3.6
PARKING_M = 1.2  # strip between the outer lane and the kerb
WALKWAY_M = 2.6
CROSSING_M = 3.6  # depth of a crossing along the street
GRID_NODES = 4
STREETS = 20  # of the 24 edges of the grid
SPACING_M = 112.0
MARGIN_M = 46.0
GREEN_S, YELLOW_S, CLEARANCE_S = 9.0, 2.0, 1.0
LOCATIONS = (
    "singapore-onenorth",
    "singapore-hollandvillage",
    "singapore-queenstown",
    "boston-seaport",
)


@dataclass(frozen=True)
class Street:
    """A street from node a to node b; its `centre` stops short of both junctions."""

    a: int
    b: int
    lanes: int  # a direction
    centre: FloatArray  # [P, 2]
    crossing_at_m: float | None  # a crossing between junctions, measured along `centre`

    @property
    def half_width_m(self) -> float:
        """From the centre line to the kerb."""
        return self.lanes * LANE_WIDTH_M + PARKING_M


def build_road_map(location: str, seed: int) -> RoadMap:
    """A map of about 430 x 430 m; the same location and seed give the same map."""
    rng = np.random.default_rng([seed, zlib.crc32(location.encode())])
    nodes = _nodes(rng)
    streets = _streets(rng, nodes)
    builder = _MapBuilder(nodes, streets)
    builder.add_streets()
    builder.add_junctions()
    extent = MARGIN_M * 2 + SPACING_M * (GRID_NODES - 1)
    road = builder.finish(location, extent)
    return replace(road, blocks=_scenery(rng, road, streets, extent))


def _nodes(rng: np.random.Generator) -> FloatArray:
    """Node positions [GRID_NODES^2, 2]."""
    grid = np.stack(np.meshgrid(np.arange(GRID_NODES), np.arange(GRID_NODES)), axis=-1)
    return MARGIN_M + SPACING_M * grid.reshape(-1, 2) + rng.uniform(-13, 13, (GRID_NODES**2, 2))


def _streets(rng: np.random.Generator, nodes: FloatArray) -> list[Street]:
    """The grid's edges, some taken away; every node keeps two streets at least."""
    pairs = []
    for i in range(GRID_NODES**2):
        row, column = divmod(i, GRID_NODES)
        if column + 1 < GRID_NODES:
            pairs.append((i, i + 1))
        if row + 1 < GRID_NODES:
            pairs.append((i, i + GRID_NODES))
    degree = np.bincount(np.array(pairs).ravel(), minlength=len(nodes))
    hub = (GRID_NODES + 1) * int(rng.integers(1, GRID_NODES - 1))  # keeps its four streets
    kept = set(pairs)
    for index in rng.permutation(len(pairs)):
        a, b = pairs[index]
        if len(kept) <= STREETS or hub in (a, b) or min(degree[a], degree[b]) == 2:
            continue
        if _connected(kept - {(a, b)}):
            kept.remove((a, b))
            degree[[a, b]] -= 1
    radius = {node: 15.0 if degree[node] > 2 else 11.0 for node in range(len(nodes))}
    streets = []
    for a, b in sorted(kept):
        lanes = 2 if rng.random() < 0.3 else 1
        centre = _winding(rng, nodes[a], nodes[b], lanes)
        s = arc_lengths(centre)
        reach_a = radius[a] + (LANE_WIDTH_M if lanes == 2 else 0.0)
        reach_b = radius[b] + (LANE_WIDTH_M if lanes == 2 else 0.0)
        centre = centre[(s >= reach_a) & (s <= s[-1] - reach_b)]
        length = arc_lengths(centre)[-1]
        crossing = float(rng.uniform(0.35, 0.65) * length) if rng.random() < 0.45 else None
        streets.append(Street(a, b, lanes, resample(centre, 1.0), crossing))
    return streets


def _connected(pairs: set[tuple[int, int]]) -> bool:
    """Whether every node of the grid can be reached from the first."""
    reached = {0}
    for _ in range(GRID_NODES**2):
        reached |= {node for pair in pairs if reached & set(pair) for node in pair}
    return len(reached) == GRID_NODES**2


def _winding(
    rng: np.random.Generator, start: FloatArray, end: FloatArray, lanes: int
) -> FloatArray:
    """A smooth street between two nodes, straight where it meets them: [P, 2] every metre."""
    along = end - start
    length = float(np.linalg.norm(along))
    along = along / length
    left = np.array([-along[1], along[0]])
    # A wide street needs wider bends, or its inner kerb would fold over.
    most = 0.13 * length * (0.75 if lanes == 2 else 1.0)
    bend = rng.choice([-1.0, 1.0]) * rng.uniform(0.45 * most, most)
    if rng.random() < 0.75:  # an S
        knots = [
            (0.0, 0.0),
            (0.24, 0.0),
            (0.42, bend * 0.5),
            (0.6, -bend * 0.5),
            (0.78, 0.0),
            (1, 0),
        ]
    else:
        knots = [(0.0, 0.0), (0.24, 0.0), (0.5, bend), (0.76, 0.0), (1.0, 0.0)]
    points = np.array([start + u * length * along + v * left for u, v in knots])
    return smooth(resample(points, 1.0), 6.0, 1.0)


class _MapBuilder:
    """Collects lanes and polygons; ids are positions in the lists."""

    def __init__(self, nodes: FloatArray, streets: list[Street]) -> None:
        self.nodes = nodes
        self.streets = streets
        self.lanes: list[Lane] = []
        self.segments: list[tuple[FloatArray, bool]] = []
        self.crossings: list[FloatArray] = []
        self.walkways: list[FloatArray] = []
        self.stop_lines: list[StopLine] = []
        self.lights: list[TrafficLight] = []
        self.road_dividers: list[FloatArray] = []
        self.lane_dividers: list[FloatArray] = []
        # (street, from a to b) -> lane ids, innermost (left) first
        self.of_street: dict[tuple[int, bool], list[int]] = {}

    def add_streets(self) -> None:
        """Lanes, markings, walkways and mid-block crossings of every street."""
        for number, street in enumerate(self.streets):
            half = street.half_width_m
            self.segments.append((strip(street.centre, half, half), False))
            for left, right in ((half + WALKWAY_M, -half), (-half, half + WALKWAY_M)):
                self.walkways.append(strip(street.centre, left, right))
            self.road_dividers.append(street.centre)
            for onward in (True, False):
                line = street.centre if onward else street.centre[::-1]
                ids = []
                for k in range(street.lanes):
                    ids.append(len(self.lanes))
                    offset = -(k + 0.5) * LANE_WIDTH_M
                    centre = resample(shifted(line, offset), 1.0)
                    self.lanes.append(Lane(ids[-1], centre, LANE_WIDTH_M, False, ()))
                    if k:
                        self.lane_dividers.append(shifted(line, -k * LANE_WIDTH_M))
                self.of_street[number, onward] = ids
                for k, lane in enumerate(ids):
                    self.lanes[lane] = replace(
                        self.lanes[lane],
                        left_neighbour=ids[k - 1] if k else None,
                        right_neighbour=ids[k + 1] if k + 1 < len(ids) else None,
                    )
            if street.crossing_at_m is not None:
                self._add_crossing(street, street.crossing_at_m)

    def add_junctions(self) -> None:
        """Connectors through every node; lights, stop lines and crossings where streets meet."""
        for node in range(len(self.nodes)):
            arms = self._arms(node)
            incoming = [self.of_street[number, not leaves] for number, leaves in arms]
            outgoing = [self.of_street[number, leaves] for number, leaves in arms]
            for i, lanes_in in enumerate(incoming):
                for j, lanes_out in enumerate(outgoing):
                    if i != j:
                        self._connect(lanes_in, lanes_out, len(arms))
            if len(arms) > 2:
                for i, (number, leaves) in enumerate(arms):
                    self._add_approach(self.streets[number], leaves, incoming[i], i, len(arms))
            self._add_junction_area(arms)

    def finish(self, location: str, extent_m: float) -> RoadMap:
        """The map; polygons that are drivable are the road segments."""
        return RoadMap(
            location=location,
            extent_m=(extent_m, extent_m),
            lanes=tuple(self.lanes),
            drivable=tuple(polygon for polygon, _ in self.segments),
            road_segments=tuple(self.segments),
            ped_crossings=tuple(self.crossings),
            walkways=tuple(self.walkways),
            stop_lines=tuple(self.stop_lines),
            lights=tuple(self.lights),
            road_dividers=tuple(self.road_dividers),
            lane_dividers=tuple(self.lane_dividers),
        )

    def _arms(self, node: int) -> list[tuple[int, bool]]:
        """Streets at a node as (street, node is its a end), counter-clockwise by direction."""
        arms = [
            (number, street.a == node)
            for number, street in enumerate(self.streets)
            if node in (street.a, street.b)
        ]

        def angle(arm: tuple[int, bool]) -> float:
            number, leaves = arm
            end = self.streets[number].centre[0 if leaves else -1]
            return float(np.arctan2(*(end - self.nodes[node])[::-1]))

        return sorted(arms, key=angle)

    def _connect(self, lanes_in: list[int], lanes_out: list[int], arms: int) -> None:
        """Connectors from an approach to an exit, each lane to the lane of its side."""
        start = self.lanes[lanes_in[0]].centre
        end = self.lanes[lanes_out[0]].centre
        turn = _wrap(headings(end)[0] - headings(start)[-1])
        # Left turns leave from the inner lane, right turns from the outer one.
        if arms > 2 and turn > 0.6:
            pairs = [(lanes_in[0], lanes_out[0])]
        elif arms > 2 and turn < -0.6:
            pairs = [(lanes_in[-1], lanes_out[-1])]
        else:
            pairs = [
                (lane, lanes_out[min(k, len(lanes_out) - 1)]) for k, lane in enumerate(lanes_in)
            ]
        for source, target in pairs:
            a, b = self.lanes[source].centre, self.lanes[target].centre
            curve = hermite(a[-1], headings(a)[-1], b[0], headings(b)[0])
            lane = Lane(
                id=len(self.lanes),
                centre=resample(curve, 1.0),
                width_m=LANE_WIDTH_M,
                is_connector=True,
                successors=(target,),
            )
            self.lanes.append(lane)
            before = self.lanes[source]
            self.lanes[source] = replace(before, successors=(*before.successors, lane.id))

    def _add_approach(
        self, street: Street, leaves: bool, incoming: list[int], turn: int, arms: int
    ) -> None:
        """Crossing, stop line and light where a street enters a junction."""
        length = arc_lengths(street.centre)[-1]
        # The crossing lies just inside the street, the stop line a step before it.
        at = 3.0 if leaves else length - 3.0
        self._add_crossing(street, at)
        light = self._add_light(street, leaves, turn, arms)
        toward = street.centre[::-1] if leaves else street.centre  # in driving direction
        end = toward[: len(toward) - 6]
        half = street.lanes * LANE_WIDTH_M
        yaw = headings(end)[-1]
        centre = end[-1] - normals(end)[-1] * half / 2
        line = StopLine(
            id=len(self.stop_lines),
            polygon=rectangle(centre, yaw, half, 1.0)[::-1],
            cue="TRAFFIC_LIGHT",
            light=light,
        )
        self.stop_lines.append(line)
        for lane in incoming:
            self.lanes[lane] = replace(self.lanes[lane], stop_line=line.id)

    def _add_light(self, street: Street, leaves: bool, turn: int, arms: int) -> int:
        """A light on the right kerb at the junction's edge, green in its own turn only."""
        toward = street.centre[::-1] if leaves else street.centre
        yaw = headings(toward)[-1]
        right = -normals(toward)[-1]
        position = toward[-1] + right * (street.half_width_m + 0.8)
        phase = GREEN_S + YELLOW_S + CLEARANCE_S
        cycle: tuple[tuple[LightColour, float], ...] = (
            ("green", GREEN_S),
            ("yellow", YELLOW_S),
            ("red", CLEARANCE_S + phase * (arms - 1)),
        )
        light = TrafficLight(
            id=len(self.lights),
            position=np.array([*position, 4.2]),
            yaw=_wrap(yaw + np.pi),
            cycle=cycle,
            offset_s=-phase * turn % (phase * arms),
        )
        self.lights.append(light)
        return light.id

    def _add_crossing(self, street: Street, at_m: float) -> None:
        """Zebra stripes over the whole street, `at_m` along its centre."""
        index = int(np.clip(round(at_m), 1, len(street.centre) - 2))
        yaw = headings(street.centre)[index]
        self.crossings.append(
            rectangle(street.centre[index], yaw, 2 * street.half_width_m, CROSSING_M)[::-1]
        )

    def _add_junction_area(self, arms: list[tuple[int, bool]]) -> None:
        """The drivable polygon that joins the ends of all arms, with rounded kerbs between them."""
        corners = []
        for number, leaves in arms:
            street = self.streets[number]
            outward = street.centre if leaves else street.centre[::-1]
            # The area reaches a little into the street, so that no gap shows between polygons.
            left = normals(outward)[1] * street.half_width_m
            corners.append((outward[1] - left, outward[1] + left, headings(outward)[0]))
        outline = []
        for i, (right, left, yaw) in enumerate(corners):
            next_right, _, next_yaw = corners[(i + 1) % len(corners)]
            outline += [right, left]
            kerb = hermite(left, yaw + np.pi, next_right, next_yaw)
            outline += list(resample(kerb, 1.5)[1:-1])
        polygon = np.array(outline)
        self.segments.append((polygon, len(arms) > 2))


def _scenery(
    rng: np.random.Generator, road: RoadMap, streets: list[Street], extent_m: float
) -> tuple[StaticBlock, ...]:
    """Houses and trees beside the streets, never on a road or walkway."""
    centres = np.concatenate([polygon for polygon, _ in road.road_segments])
    blocks = []
    for street in streets:
        left, yaw = normals(street.centre), headings(street.centre)
        for side in (-1.0, 1.0):
            at = rng.uniform(4, 12)
            length = arc_lengths(street.centre)[-1]
            while at < length - 4:
                index = int(at)
                is_tree = rng.random() < 0.45
                depth, width = (2.4, 2.4) if is_tree else rng.uniform(8, 13, 2)
                away = street.half_width_m + WALKWAY_M + depth / 2 + rng.uniform(0.6, 3.0)
                position = street.centre[index] + left[index] * side * away
                reach = float(np.hypot(depth, width)) / 2 + WALKWAY_M
                inside = (position > 2).all() and (position < extent_m - 2).all()
                if inside and np.linalg.norm(centres - position, axis=1).min() > reach:
                    blocks.append(_block(rng, is_tree, position, depth, width, float(yaw[index])))
                at += (5.0 if is_tree else width) + rng.uniform(2, 9)
    return tuple(blocks)


def _block(
    rng: np.random.Generator,
    is_tree: bool,
    position: FloatArray,
    depth: float,
    width: float,
    street_yaw: float,
) -> StaticBlock:
    if is_tree:
        green = (int(rng.integers(35, 70)), int(rng.integers(90, 135)), int(rng.integers(30, 60)))
        size = np.array([depth, width, rng.uniform(4, 7)])
        return StaticBlock("tree", position, size, 0.0, green)
    walls = ((176, 150, 124), (150, 108, 92), (190, 186, 176), (128, 138, 150), (204, 188, 150))
    colour = walls[int(rng.integers(len(walls)))]
    size = np.array([depth, width, rng.uniform(6, 18)])
    return StaticBlock("building", position, size, street_yaw - np.pi / 2, colour)


def _wrap(angle: float) -> float:
    return float((angle + np.pi) % (2 * np.pi) - np.pi)
