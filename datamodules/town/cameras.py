"""What the six cameras see: ground by homography, bodies back to front, no renderer needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.town.ground import CELL_M, paint_ground
from datamodules.town.log import TICK_S, RoadMap, SceneLog
from datamodules.town.rig import FloatArray, Rig, ego_to_global
from datamodules.town.shapes import BRAKE_LIGHT, mesh

Image = NDArray[np.uint8]
SUN = np.array([0.42, 0.3, 0.86])
AMBIENT = 0.5
SKY_TOP, SKY_LOW, HAZE = (112, 158, 214), (206, 220, 232), (190, 198, 204)
HAZE_M = 160.0  # distance over which colours fade into the haze
FAR_CELL = 4  # the distant ground is read from a raster this many times coarser, against aliasing
FAR_GROUND_M = 16.0
SEEN_M = 95.0  # bodies beyond are not drawn
RIG_REACH_M = 5.0  # no camera is farther from the car's origin
NEAR_M = 0.25
LAMP = {"red": (255, 40, 30), "yellow": (255, 200, 30), "green": (40, 240, 110)}
SHADOW = (44, 45, 48)
FIXED_BITS = 4
# Fixed-point coordinates must fit in 32 bits; a tighter bound bends the edges of what is close.
FARTHEST_PIXEL = 1e6
ID_SIZE = (192, 108)  # of the id images that visibility is counted in
# Sides, bottom and top of a box as rows of _corners.
BOX_FACES = np.array(
    [[0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
)


@dataclass(frozen=True)
class Faces:
    """Everything to draw at one moment: n quads in the global frame.

    Attributes:
        quads: [n, 4, 3].
        normals: [n, 3].
        colours: [n, 3] RGB before light and haze.
        bright: [n] True for lamps, which shine by themselves.
        body: [n] number of the body, for the painter's order.
        part_centre: [n, 3] centre of the cuboid a quad belongs to.
        body_centre: [bodies, 3].
    """

    quads: FloatArray
    normals: FloatArray
    colours: FloatArray
    bright: NDArray[np.bool_]
    body: NDArray[np.int64]
    part_centre: FloatArray
    body_centre: FloatArray

    def within(self, reach_m: float, of: FloatArray) -> Faces:
        """Those of bodies that are nearer to a point [3] than reach_m, in the same order."""
        near = (np.linalg.norm(self.body_centre - of, axis=1) < reach_m)[self.body]
        return replace(
            self,
            quads=self.quads[near],
            normals=self.normals[near],
            colours=self.colours[near],
            bright=self.bright[near],
            body=self.body[near],
            part_centre=self.part_centre[near],
        )


NO_FACES = Faces(
    quads=np.zeros((0, 4, 3)),
    normals=np.zeros((0, 3)),
    colours=np.zeros((0, 3)),
    bright=np.zeros(0, bool),
    body=np.zeros(0, np.int64),
    part_centre=np.zeros((0, 3)),
    body_centre=np.zeros((0, 3)),
)


class SceneRenderer:
    """Draws the scenes of one location at one image size.

    Args:
        road: the location.
        width: of the images, pixels.
        height: of the images, pixels.
    """

    def __init__(self, road: RoadMap, width: int, height: int) -> None:
        self.rig = Rig.for_size(width, height)
        self._extent_m = road.extent_m
        self._near, self._far = _ground_levels(road)
        self._blocks = _block_faces(road)

    def render(self, log: SceneLog, tick: int) -> dict[str, Image]:
        """The six images at a tick, RGB [h, w, 3]."""
        ego = ego_to_global(log.ego.track.xy[tick], float(log.ego.track.yaw[tick]))
        faces = _joined([self._blocks, *_light_faces(log, tick), *_actor_faces(log, tick)])
        faces = faces.within(SEEN_M + RIG_REACH_M, ego[:3, 3])
        shadows = _shadows(log, tick)
        images = {}
        for name, mount in self.rig.cameras.items():
            global_to_camera = np.linalg.inv(ego @ mount.matrix)
            images[name] = self._draw(
                self.rig.intrinsics[name], global_to_camera, faces, shadows, log.daylight
            )
        return images

    def _draw(
        self,
        intrinsics: FloatArray,
        global_to_camera: FloatArray,
        faces: Faces,
        shadows: FloatArray,
        daylight: float,
    ) -> Image:
        canvas = self._background(intrinsics, global_to_camera, daylight)
        dark = [SHADOW] * len(shadows)
        _fill(canvas, _to_camera(shadows, global_to_camera), intrinsics, dark)
        centre = np.linalg.inv(global_to_camera)[:3, 3]
        quads = _to_camera(faces.quads, global_to_camera)
        depth = quads[..., 2].max(1)
        distance = np.linalg.norm(faces.body_centre - centre, axis=1)[faces.body]
        # A face shows when the camera is on its outer side.
        outward = ((centre - faces.quads[:, 0]) * faces.normals).sum(-1) > 0
        wide = quads[..., 2] * (0.5 * self.rig.width / intrinsics[0, 0]) + 0.1
        beside = (quads[..., 0] > wide).all(1) | (quads[..., 0] < -wide).all(1)
        shown = np.flatnonzero(outward & (depth > NEAR_M) & (distance < SEEN_M) & ~beside)
        part = np.linalg.norm(faces.part_centre[shown] - centre, axis=1)
        # Back to front by body, then by part; decals come after their face because the sort is
        # stable.
        order = shown[np.lexsort((-part.round(3), faces.body[shown], -distance[shown].round(3)))]
        colours = _lit(faces, order, distance[order], daylight)
        _fill(canvas, quads[order], intrinsics, colours)
        return canvas

    def _background(
        self, intrinsics: FloatArray, global_to_camera: FloatArray, daylight: float
    ) -> Image:
        """Sky above the horizon, hazy ground below it."""
        height = self.rig.height
        horizon = int(np.ceil(intrinsics[1, 2]))  # the cameras look level
        plane = intrinsics @ global_to_camera[:3][:, [0, 1, 3]]
        near = self._warp(self._near, CELL_M, plane)
        far = self._warp(self._far, CELL_M * FAR_CELL, plane)
        rows = np.arange(height) + 0.5
        above_road = np.linalg.inv(global_to_camera)[2, 3]
        distance = intrinsics[1, 1] * above_road / np.maximum(rows - intrinsics[1, 2], 0.05)
        canvas = np.where((distance > FAR_GROUND_M)[:, None, None], far, near).astype(np.float32)
        fade = 1 - np.exp(-distance / HAZE_M)[:, None, None]
        canvas = canvas * daylight * (1 - fade) + np.array(HAZE, np.float32) * daylight * fade
        up = np.clip((intrinsics[1, 2] - rows[:horizon]) / max(1.0, intrinsics[1, 2]), 0, 1)
        sky = np.outer(1 - up, SKY_LOW) + np.outer(up, SKY_TOP)
        canvas[:horizon] = (sky * (0.35 + 0.65 * daylight))[:, None]
        return np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8))

    def _warp(self, ground: Image, cell_m: float, plane: FloatArray) -> Image:
        """The raster seen through the camera; `plane` maps ground (x, y, 1) to pixels."""
        to_metres = np.array(
            [[cell_m, 0, cell_m / 2], [0, -cell_m, self._extent_m[1] - cell_m / 2], [0, 0, 1]]
        )
        # Pixel centres lie at half-integers in our intrinsics and at integers in OpenCV.
        to_cv = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
        size = (self.rig.width, self.rig.height)
        warped = cv2.warpPerspective(
            ground,
            to_cv @ plane @ to_metres,
            size,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return warped.astype(np.uint8)


def visibility(log: SceneLog, tick: int, rig: Rig) -> dict[int, float]:
    """Share of each actor that some camera sees, by actor id; 0 for those out of all views.

    Boxes are drawn as filled outlines into small id images, back to front; houses hide what is
    behind them.
    """
    ego = ego_to_global(log.ego.track.xy[tick], float(log.ego.track.yaw[tick]))
    near = [
        (actor.id, _corners(actor.track.xy[tick], float(actor.track.yaw[tick]), actor.size_wlh))
        for actor in log.actors
        if actor.present[tick] and np.linalg.norm(actor.track.xy[tick] - ego[:2, 3]) < SEEN_M
    ]
    blocks = [
        (-1, _corners(block.position, block.yaw, block.size[[1, 0, 2]]))
        for block in log.road.blocks
        if block.kind == "building" and np.linalg.norm(block.position - ego[:2, 3]) < SEEN_M
    ]
    best = dict.fromkeys((number for number, _ in near), 0.0)
    for name, mount in rig.cameras.items():
        global_to_camera = np.linalg.inv(ego @ mount.matrix)
        scale = np.diag([ID_SIZE[0] / rig.width, ID_SIZE[1] / rig.height, 1.0])
        intrinsics = scale @ rig.intrinsics[name]
        ids = np.full(ID_SIZE[::-1], -2, np.int32)
        alone = {}
        outlines = []
        for number, corners in near + blocks:
            camera = _to_camera(corners, global_to_camera)
            if camera[:, 2].max() < NEAR_M:
                continue
            middle = camera.mean(0)
            if camera[:, 2].min() < NEAR_M:
                # A body alongside reaches behind the camera; the rest of it still hides others.
                sides = [_cut(side) for side in camera[BOX_FACES]]
                camera = np.concatenate([side for side in sides if len(side)])
            pixels = np.clip(_project(camera, intrinsics) - 0.5, -FARTHEST_PIXEL, FARTHEST_PIXEL)
            if pixels[:, 0].max() < -0.5 or pixels[:, 0].min() > ID_SIZE[0] - 0.5:
                continue
            outlines.append(
                (
                    float(np.linalg.norm(middle)),
                    number,
                    cv2.convexHull(pixels.round().astype(np.int32)),
                )
            )
        for _, number, hull in sorted(outlines, key=lambda item: -item[0]):
            cv2.fillConvexPoly(ids, hull, (number,))
            if number >= 0:
                blank = np.zeros(ID_SIZE[::-1], np.uint8)
                cv2.fillConvexPoly(blank, hull, (1,))
                alone[number] = int(blank.sum())
        counts = np.bincount(ids[ids >= 0], minlength=max(best, default=0) + 1)
        for number, area in alone.items():
            if area:
                best[number] = max(best[number], float(counts[number]) / area)
    return best


_GROUNDS: dict[str, tuple[RoadMap, Image, Image]] = {}


def _ground_levels(road: RoadMap) -> tuple[Image, Image]:
    """The painted ground, fine and coarse; kept for the process, as painting takes a second."""
    known = _GROUNDS.get(road.location)
    if known is None or known[0].lanes is not road.lanes:
        ground = paint_ground(road)
        rows, columns = ground.shape[:2]
        size = (columns // FAR_CELL, rows // FAR_CELL)
        coarse = cv2.resize(ground, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
        known = _GROUNDS[road.location] = (road, ground, coarse)
    return known[1], known[2]


def _actor_faces(log: SceneLog, tick: int) -> list[Faces]:
    ego = log.ego.track.xy[tick]
    found = []
    for actor in log.actors:
        xy = actor.track.xy[tick]
        if actor.present[tick] and np.linalg.norm(xy - ego) < SEEN_M:
            colours = (actor.colour, BRAKE_LIGHT if actor.braking[tick] else None)
            found.append(
                _body_faces(
                    actor.category, xy, float(actor.track.yaw[tick]), actor.size_wlh, *colours
                )
            )
    return found


def _block_faces(road: RoadMap) -> Faces:
    return _joined(
        [
            NO_FACES,  # a map may have no scenery
            *(
                _body_faces(
                    block.kind, block.position, block.yaw, block.size[[1, 0, 2]], block.colour, None
                )
                for block in road.blocks
            ),
        ]
    )


def _body_faces(
    kind: str,
    xy: FloatArray,
    yaw: float,
    size_wlh: FloatArray,
    colour: tuple[int, int, int],
    brake: tuple[int, int, int] | None,
) -> Faces:
    """The mesh of a body in the global frame."""
    shape = mesh(kind)
    scale = np.array([size_wlh[1], size_wlh[0], size_wlh[2]])
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    place = np.array([xy[0], xy[1], 0.0])
    colours = np.where(shape.own[:, None], np.array(colour, float), shape.colour)
    if brake is not None:
        colours[shape.brake] = brake
    centres = (shape.part_centre * scale) @ turn.T + place
    return Faces(
        quads=(shape.quads * scale) @ turn.T + place,
        normals=shape.normals @ turn.T,
        colours=colours,
        bright=shape.brake & (brake is not None),
        body=np.zeros(len(colours), dtype=np.int64),
        part_centre=centres[shape.part],
        body_centre=(place + np.array([0, 0, size_wlh[2] / 2]))[None],
    )


def _light_faces(log: SceneLog, tick: int) -> list[Faces]:
    """Traffic lights: a pole and a lamp box, larger than life so that small images show them."""
    found = []
    for light in log.road.lights:
        x, y, z = light.position
        forward = np.array([np.cos(light.yaw), np.sin(light.yaw), 0.0])
        left = np.array([-forward[1], forward[0], 0.0])
        up = np.array([0.0, 0.0, 1.0])
        centre = np.array([x, y, z])
        board = [
            centre + 0.75 * (a * left + b * up) for a, b in ((1, -1), (-1, -1), (-1, 1), (1, 1))
        ]
        lamp = [
            centre + 0.02 * forward + 0.55 * (a * left + b * up)
            for a, b in ((1, -1), (-1, -1), (-1, 1), (1, 1))
        ]
        pole = [
            np.array([x, y, 0]) + a * 0.1 * left + b * up
            for a, b in ((1, 0), (-1, 0), (-1, z - 0.75), (1, z - 0.75))
        ]
        colour = LAMP[light.colour(tick * TICK_S)]
        quads = np.array([pole, pole[::-1], board[::-1], board, lamp])
        normals = np.array([forward, -forward, -forward, forward, forward])
        colours = np.array([(70, 70, 72), (70, 70, 72), (30, 30, 32), (30, 30, 32), colour], float)
        found.append(
            Faces(
                quads=quads,
                normals=normals,
                colours=colours,
                bright=np.array([False, False, False, False, True]),
                body=np.zeros(5, dtype=np.int64),
                part_centre=np.repeat(centre[None], 5, axis=0),
                body_centre=centre[None],
            )
        )
    return found


def _joined(parts: list[Faces]) -> Faces:
    offset, bodies = 0, []
    for part in parts:
        bodies.append(part.body + offset)
        offset += len(part.body_centre)
    return Faces(
        quads=np.concatenate([p.quads for p in parts]),
        normals=np.concatenate([p.normals for p in parts]),
        colours=np.concatenate([p.colours for p in parts]),
        bright=np.concatenate([p.bright for p in parts]),
        body=np.concatenate(bodies),
        part_centre=np.concatenate([p.part_centre for p in parts]),
        body_centre=np.concatenate([p.body_centre for p in parts]),
    )


def _lit(faces: Faces, order: NDArray[np.int64], distance: FloatArray, daylight: float) -> list:
    """Colours under the sun, faded with distance: n RGB tuples."""
    sun = np.clip(faces.normals[order] @ (SUN / np.linalg.norm(SUN)), 0, 1)
    light = np.where(faces.bright[order], 1.0, (AMBIENT + (1 - AMBIENT) * sun) * daylight)
    fade = (1 - np.exp(-distance / HAZE_M))[:, None]
    colours = faces.colours[order] * light[:, None] * (1 - fade)
    return (colours + np.array(HAZE) * daylight * fade).clip(0, 255).astype(int).tolist()


def _shadows(log: SceneLog, tick: int) -> FloatArray:
    """Footprints moved away from the sun: [n, 4, 3]."""
    found = []
    for actor in log.actors:
        if actor.present[tick]:
            size = actor.size_wlh + np.array([0.3, 0.3, 0.0])
            base = _corners(actor.track.xy[tick], float(actor.track.yaw[tick]), size)[:4]
            base[:, :2] -= SUN[:2] * actor.size_wlh[2] * 0.25
            found.append(base)
    return np.array(found).reshape(-1, 4, 3)


def _corners(xy: FloatArray, yaw: float, size_wlh: FloatArray) -> FloatArray:
    """Corners of a box on the ground: four at the bottom, four at the top."""
    width, length, height = size_wlh
    c, s = np.cos(yaw), np.sin(yaw)
    local = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2 * [length, width]
    ground = local @ np.array([[c, s], [-s, c]]) + xy
    return np.concatenate([np.c_[ground, np.zeros(4)], np.c_[ground, np.full(4, height)]])


def _to_camera(points: FloatArray, global_to_camera: FloatArray) -> FloatArray:
    return points @ global_to_camera[:3, :3].T + global_to_camera[:3, 3]


def _project(camera: FloatArray, intrinsics: FloatArray) -> FloatArray:
    return camera[..., :2] / camera[..., 2:] * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2]


def _fill(
    canvas: Image, quads: FloatArray, intrinsics: FloatArray, colours: Sequence[tuple[int, ...]]
) -> None:
    """Fill quads [n, 4, 3] given in camera coordinates, cut at the near plane, one by one."""
    whole = quads[..., 2].min(1) >= NEAR_M if len(quads) else np.zeros(0, bool)
    # All at once: a quad alone takes longer to project than to fill.
    points = np.zeros((len(quads), 4, 2), np.int32)
    points[whole] = _fixed_point(quads[whole], intrinsics)
    for quad, corners, is_whole, colour in zip(quads, points, whole, colours, strict=True):
        if not is_whole:
            kept = _cut(quad)
            if len(kept) < 3:
                continue
            corners = _fixed_point(kept, intrinsics)
        cv2.fillConvexPoly(canvas, corners, colour, cv2.LINE_AA, FIXED_BITS)


def _fixed_point(camera: FloatArray, intrinsics: FloatArray) -> NDArray[np.int32]:
    """Pixels as OpenCV takes fractions of them."""
    pixels = np.clip(_project(camera, intrinsics) - 0.5, -FARTHEST_PIXEL, FARTHEST_PIXEL)
    return np.round(pixels * 2**FIXED_BITS).astype(np.int32)


def _cut(polygon: FloatArray) -> FloatArray:
    """The part of a polygon in front of the near plane (Sutherland and Hodgman's clipping)."""
    kept = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        inside_a, inside_b = a[2] >= NEAR_M, b[2] >= NEAR_M
        if inside_a:
            kept.append(a)
        if inside_a != inside_b:
            kept.append(a + (b - a) * (NEAR_M - a[2]) / (b[2] - a[2]))
    return np.array(kept)
