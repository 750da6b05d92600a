"""The map expansion of a location: the JSON file that the devkit's NuScenesMap reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import shapely

from datamodules.town.geometry import FloatArray, arc_lengths, headings, rectangle, shifted
from datamodules.town.log import Lane, RoadMap
from datamodules.town.tokens import make_token

VERSION = "1.3"
ARC_M = 4.0  # a lane is cut into arcs of about this length
STRAIGHT_CURVATURE = 1e-4
EMPTY_LAYERS = ("road_block", "carpark_area")
Record = dict[str, Any]


def map_expansion(road: RoadMap, seed: int) -> Record:
    """All layers of version 1.3 for one location.

    Road blocks and car parks, which this town has not, are empty layers.
    """
    writer = _MapWriter(road.location, seed)
    layers: Record = {name: [] for name in EMPTY_LAYERS}
    layers["drivable_area"] = [writer.drivable_area(road)]
    area = layers["drivable_area"][0]["token"]
    layers["road_segment"] = [
        {
            **writer.polygon_record("road_segment", number, polygon),
            "is_intersection": junction,
            "drivable_area_token": area,
        }
        for number, (polygon, junction) in enumerate(road.road_segments)
    ]
    layers["ped_crossing"] = [
        {**writer.polygon_record("ped_crossing", number, polygon), "road_segment_token": ""}
        for number, polygon in enumerate(road.ped_crossings)
    ]
    layers["walkway"] = [
        writer.polygon_record("walkway", number, polygon)
        for number, polygon in enumerate(road.walkways)
    ]
    layers["traffic_light"] = [
        writer.traffic_light(road, number) for number in range(len(road.lights))
    ]
    layers["stop_line"] = [writer.stop_line(road, number) for number in range(len(road.stop_lines))]
    layers["road_divider"] = [
        {**writer.line_record("road_divider", number, line), "road_segment_token": ""}
        for number, line in enumerate(road.road_dividers)
    ]
    layers["lane_divider"] = [
        writer.lane_divider(number, line) for number, line in enumerate(road.lane_dividers)
    ]
    layers["lane"] = [writer.lane(lane) for lane in road.lanes if not lane.is_connector]
    layers["lane_connector"] = [
        writer.polygon_record("lane_connector", lane.id, _lane_outline(lane))
        for lane in road.lanes
        if lane.is_connector
    ]
    layers["arcline_path_3"] = {writer.lane_token(lane): arcs(lane.centre) for lane in road.lanes}
    layers["connectivity"] = writer.connectivity(road)
    width, height = road.extent_m
    return {
        "version": VERSION,
        "canvas_edge": [width, height],
        **layers,
        "polygon": writer.polygons,
        "line": writer.lines,
        "node": writer.nodes,
    }


def arcs(centre: FloatArray) -> list[Record]:
    """A line [P, 2] as arcline paths: circular arcs that start in the line's poses and end on it.

    Each piece is one arc (or straight) of the three that an arcline path may have; the others have
    length 0.
    """
    s = arc_lengths(centre)
    yaw = headings(centre)
    pieces = max(1, round(s[-1] / ARC_M))
    at = np.linspace(0.0, s[-1], pieces + 1)
    points = np.stack([np.interp(at, s, centre[:, i]) for i in (0, 1)], axis=-1)
    angle = np.interp(at, s, yaw)
    paths = []
    for start, end, heading in zip(points[:-1], points[1:], angle[:-1], strict=True):
        chord = end - start
        distance = float(np.linalg.norm(chord))
        bend = float(np.arctan2(chord[1], chord[0]) - heading)
        bend = (bend + np.pi) % (2 * np.pi) - np.pi
        curvature = 2 * np.sin(bend) / distance
        if abs(curvature) < STRAIGHT_CURVATURE:
            shape, radius, lengths = "LSL", 1e3, [0.0, distance, 0.0]
        else:
            shape, radius = ("LSL" if curvature > 0 else "RSR"), 1 / abs(curvature)
            lengths = [2 * abs(bend) * radius, 0.0, 0.0]
        paths.append(
            {
                "start_pose": [float(start[0]), float(start[1]), float(heading)],
                "end_pose": [float(end[0]), float(end[1]), float(heading + 2 * bend)],
                "shape": shape,
                "radius": float(radius),
                "segment_length": [float(length) for length in lengths],
            }
        )
    return paths


class _MapWriter:
    """Collects nodes, lines and polygons while records are written."""

    def __init__(self, location: str, seed: int) -> None:
        self.location = location
        self.seed = seed
        self.nodes: list[Record] = []
        self.lines: list[Record] = []
        self.polygons: list[Record] = []

    def token(self, *parts: str | int) -> str:
        return make_token(self.seed, self.location, *parts)

    def lane_token(self, lane: Lane) -> str:
        return self.token("lane_connector" if lane.is_connector else "lane", lane.id)

    def _nodes(self, points: Iterable[Sequence[float]]) -> list[str]:
        tokens = []
        for x, y in points:
            tokens.append(self.token("node", len(self.nodes)))
            self.nodes.append(
                {"token": tokens[-1], "x": round(float(x), 4), "y": round(float(y), 4)}
            )
        return tokens

    def polygon(self, outline: FloatArray, holes: Sequence[FloatArray] = ()) -> str:
        token = self.token("polygon", len(self.polygons))
        self.polygons.append(
            {
                "token": token,
                "exterior_node_tokens": self._nodes(outline),
                "holes": [{"node_tokens": self._nodes(hole)} for hole in holes],
            }
        )
        return token

    def line(self, points: FloatArray) -> str:
        token = self.token("line", len(self.lines))
        self.lines.append({"token": token, "node_tokens": self._nodes(points)})
        return token

    def polygon_record(self, layer: str, number: int, outline: FloatArray) -> Record:
        return {"token": self.token(layer, number), "polygon_token": self.polygon(outline)}

    def line_record(self, layer: str, number: int, points: FloatArray) -> Record:
        return {"token": self.token(layer, number), "line_token": self.line(points)}

    def drivable_area(self, road: RoadMap) -> Record:
        """The union of all segments, so that no edge runs across a road."""
        union = shapely.unary_union([shapely.Polygon(p).buffer(0.02) for p in road.drivable])
        parts = getattr(union, "geoms", [union])
        tokens = [
            self.polygon(
                np.array(part.exterior.coords)[:-1],
                [np.array(hole.coords)[:-1] for hole in part.interiors],
            )
            for part in parts
        ]
        return {"token": self.token("drivable_area", 0), "polygon_tokens": tokens}

    def lane(self, lane: Lane) -> Record:
        half = lane.width_m / 2
        ends = {
            edge: self.line(
                np.stack([shifted(lane.centre, half)[at], shifted(lane.centre, -half)[at]])
            )
            for edge, at in (("from", 0), ("to", -1))
        }
        segments = {
            side: [
                {"node_token": token, "segment_type": "SINGLE_SOLID_WHITE"}
                for token in self._nodes(shifted(lane.centre, offset)[::5])
            ]
            for side, offset in (("left", half), ("right", -half))
        }
        return {
            **self.polygon_record("lane", lane.id, _lane_outline(lane)),
            "lane_type": "CAR",
            "from_edge_line_token": ends["from"],
            "to_edge_line_token": ends["to"],
            "left_lane_divider_segments": segments["left"],
            "right_lane_divider_segments": segments["right"],
        }

    def lane_divider(self, number: int, points: FloatArray) -> Record:
        record = self.line_record("lane_divider", number, points)
        nodes = self.lines[-1]["node_tokens"]
        record["lane_divider_segments"] = [
            {"node_token": node, "segment_type": "DASHED_WHITE"} for node in nodes
        ]
        return record

    def stop_line(self, road: RoadMap, number: int) -> Record:
        line = road.stop_lines[number]
        lights = [] if line.light is None else [self.token("traffic_light", line.light)]
        return {
            **self.polygon_record("stop_line", number, line.polygon),
            "stop_line_type": line.cue,
            "ped_crossing_tokens": [],
            "traffic_light_tokens": lights,
            "road_block_token": "",
        }

    def traffic_light(self, road: RoadMap, number: int) -> Record:
        light = road.lights[number]
        x, y, z = (float(v) for v in light.position)
        edge = rectangle(light.position[:2], light.yaw, 0.6, 0.1)[:2]
        colours = ("RED", "YELLOW", "GREEN")
        return {
            **self.line_record("traffic_light", number, edge),
            "traffic_light_type": "VERTICAL",
            "from_road_block_token": "",
            "items": [
                {
                    "color": colour,
                    "shape": "CIRCLE",
                    "rel_pos": {"tx": 0.0, "ty": 0.0, "tz": 0.3 - 0.3 * k},
                    "to_road_block_tokens": [],
                }
                for k, colour in enumerate(colours)
            ],
            "pose": {"tx": x, "ty": y, "tz": z, "rx": 0.0, "ry": 0.0, "rz": float(light.yaw)},
        }

    def connectivity(self, road: RoadMap) -> dict[str, Record]:
        links: dict[str, Record] = {
            self.lane_token(lane): {"incoming": [], "outgoing": []} for lane in road.lanes
        }
        for lane in road.lanes:
            for successor in lane.successors:
                after = road.lanes[successor]
                links[self.lane_token(lane)]["outgoing"].append(self.lane_token(after))
                links[self.lane_token(after)]["incoming"].append(self.lane_token(lane))
        return links


def _lane_outline(lane: Lane) -> FloatArray:
    half = lane.width_m / 2
    return np.concatenate([shifted(lane.centre, -half), shifted(lane.centre, half)[::-1]])
