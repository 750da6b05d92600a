"""What the six cameras see: ground by homography, bodies back to front, no renderer needed."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.town.faces import Faces, actor_faces, block_faces, joined, light_faces
from datamodules.town.ground import CELL_M, paint_ground
from datamodules.town.log import TICK_S, Boxes, RoadMap, SceneLog
from datamodules.town.projection import NEAR_M, cut, to_camera, to_pixels
from datamodules.town.rig import FloatArray, Rig, ego_to_global
from datamodules.town.visibility import SEEN_M

Image = NDArray[np.uint8]
SUN = np.array([0.42, 0.3, 0.86])
AMBIENT = 0.5
SKY_TOP, SKY_LOW, HAZE = (112, 158, 214), (206, 220, 232), (190, 198, 204)
HAZE_M = 160.0  # distance over which colours fade into the haze
FAR_CELL = 4  # the distant ground is read from a raster this many times coarser, against aliasing
FAR_GROUND_M = 16.0
RIG_REACH_M = 5.0  # no camera is farther from the car's origin
BESIDE_M = 0.1  # faces that are farther beside the field of view are not drawn
SHADOW = (44, 45, 48)
FIXED_BITS = 4
SMOOTH_PIXELS = 4  # more than a smoothed edge reaches


class SceneRenderer:
    """Draws the scenes of one location at one image size.

    Args:
        road: the location.
        width: of the images, pixels.
        height: of the images, pixels.
    """

    def __init__(self, road: RoadMap, width: int, height: int) -> None:
        self.rig = Rig.for_size(width, height)
        self._centre_row = float(self.rig.intrinsics["CAM_FRONT"][1, 2])
        self._horizon = int(np.ceil(self._centre_row))
        self._extent_m = road.extent_m
        self._near = paint_ground(road)
        rows, columns = self._near.shape[:2]
        size = (columns // FAR_CELL, rows // FAR_CELL)
        self._far = cv2.resize(self._near, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
        self._blocks = joined([block_faces(block) for block in road.blocks])

    def render(self, log: SceneLog, tick: int) -> dict[str, Image]:
        """The six images at a tick, RGB [h, w, 3]."""
        ego = ego_to_global(log.ego.track.xy[tick], float(log.ego.track.yaw[tick]))
        moment = joined(
            [
                self._blocks.within(SEEN_M + RIG_REACH_M, ego[:3, 3]),
                *(light_faces(light, tick * TICK_S) for light in log.road.lights),
                *_near_actor_faces(log, tick),
            ]
        )
        faces = moment.within(SEEN_M + RIG_REACH_M, ego[:3, 3])
        shadows = _shadows(log, tick)
        sky = self._sky(log.daylight)
        return {
            name: self._draw(
                self.rig.intrinsics[name], global_to_camera, faces, shadows, sky, log.daylight
            )
            for name, global_to_camera in self.rig.global_to_cameras(ego).items()
        }

    def _draw(
        self,
        intrinsics: FloatArray,
        global_to_camera: FloatArray,
        faces: Faces,
        shadows: FloatArray,
        sky: Image,
        daylight: float,
    ) -> Image:
        centre = np.linalg.inv(global_to_camera)[:3, 3]
        ground = self._ground(intrinsics, global_to_camera, float(centre[2]), daylight)
        canvas = np.concatenate([sky, ground])
        dark = [SHADOW] * len(shadows)
        _fill(canvas, to_camera(shadows, global_to_camera), intrinsics, dark)
        half_width = 0.5 * self.rig.width / intrinsics[0, 0]  # of the view, a metre ahead
        # Whole bodies first: few are in one camera's view.
        near = np.linalg.norm(faces.body_centre - centre, axis=1) < SEEN_M
        faces = faces.of(near & _may_show(faces, global_to_camera, half_width))
        # A face shows when the camera is on its outer side.
        faces = faces.some(((centre - faces.quads[:, 0]) * faces.normals).sum(-1) > 0)
        quads = to_camera(faces.quads, global_to_camera)
        wide = quads[..., 2] * half_width + BESIDE_M
        beside = (quads[..., 0] > wide).all(1) | (quads[..., 0] < -wide).all(1)
        shown = np.flatnonzero((quads[..., 2].max(1) > NEAR_M) & ~beside)
        distance = np.linalg.norm(faces.body_centre - centre, axis=1)[faces.body]
        part = np.linalg.norm(faces.part_centre[shown] - centre, axis=1)
        # Back to front by body, then by part; decals come after their face because the sort is
        # stable.
        order = shown[np.lexsort((-part.round(3), faces.body[shown], -distance[shown].round(3)))]
        colours = _lit(faces, order, distance[order], daylight)
        _fill(canvas, quads[order], intrinsics, colours)
        return canvas

    def _sky(self, daylight: float) -> Image:
        """Rows above the horizon, the same in all cameras: they look level."""
        rows = np.arange(self._horizon) + 0.5
        up = np.clip((self._centre_row - rows) / max(1.0, self._centre_row), 0, 1)
        sky = np.outer(1 - up, SKY_LOW) + np.outer(up, SKY_TOP)
        colours = np.clip(sky * (0.35 + 0.65 * daylight), 0, 255).astype(np.uint8)
        return np.repeat(colours[:, None], self.rig.width, axis=1)

    def _ground(
        self,
        intrinsics: FloatArray,
        global_to_camera: FloatArray,
        above_road: float,
        daylight: float,
    ) -> Image:
        """Rows below the horizon: the ground, hazy far away."""
        rows = np.arange(self._horizon, self.rig.height) + 0.5
        distance = intrinsics[1, 1] * above_road / np.maximum(rows - intrinsics[1, 2], 0.05)
        near = self._horizon + int((distance > FAR_GROUND_M).sum())
        plane = intrinsics @ global_to_camera[:3][:, [0, 1, 3]]
        ground = np.concatenate(
            [
                self._warp(self._far, CELL_M * FAR_CELL, plane, range(self._horizon, near)),
                self._warp(self._near, CELL_M, plane, range(near, self.rig.height)),
            ]
        )
        # Rows of numbers, not pixels of three: numpy is slow along short axes.
        haze = np.tile(np.array(HAZE, np.float32) * daylight, self.rig.width)
        fade = 1 - np.exp(-distance / HAZE_M)[:, None]
        hazy = ground.reshape(len(ground), -1).astype(np.float32) * daylight * (1 - fade)
        hazy += haze * fade
        return hazy.clip(0, 255).astype(np.uint8).reshape(ground.shape)

    def _warp(self, ground: Image, cell_m: float, plane: FloatArray, rows: range) -> Image:
        """Rows of the view of a raster; `plane` maps ground (x, y, 1) to pixels."""
        to_metres = np.array(
            [[cell_m, 0, cell_m / 2], [0, -cell_m, self._extent_m[1] - cell_m / 2], [0, 0, 1]]
        )
        # Pixel centres lie at half-integers in our intrinsics and at integers in OpenCV.
        to_cv = np.array([[1, 0, -0.5], [0, 1, -0.5 - rows.start], [0, 0, 1.0]])
        warped = cv2.warpPerspective(
            ground,
            to_cv @ plane @ to_metres,
            (self.rig.width, len(rows)),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return warped.astype(np.uint8, copy=False)


def _near_actor_faces(log: SceneLog, tick: int) -> list[Faces]:
    ego = log.ego.track.xy[tick]
    near = set(log.actor_boxes(tick).within(SEEN_M, ego).id.tolist())
    return [actor_faces(actor, tick) for actor in log.actors if actor.id in near]


def _may_show(faces: Faces, global_to_camera: FloatArray, half_width: float) -> NDArray[np.bool_]:
    """Bodies [bodies] whose sphere is neither behind the camera nor beside its field of view."""
    x, _, z = to_camera(faces.body_centre, global_to_camera).T
    radius = faces.body_radius + 1e-6  # more than rounding can lose
    beside = np.abs(x) - z * half_width - BESIDE_M > radius * np.hypot(1, half_width)
    return (z + radius > NEAR_M) & ~beside


def _lit(faces: Faces, order: NDArray[np.int64], distance: FloatArray, daylight: float) -> list:
    """Colours under the sun, faded with distance: n RGB tuples."""
    sun = np.clip(faces.normals[order] @ (SUN / np.linalg.norm(SUN)), 0, 1)
    light = np.where(faces.bright[order], 1.0, (AMBIENT + (1 - AMBIENT) * sun) * daylight)
    fade = (1 - np.exp(-distance / HAZE_M))[:, None]
    colours = faces.colours[order] * light[:, None] * (1 - fade)
    return (colours + np.array(HAZE) * daylight * fade).clip(0, 255).astype(int).tolist()


def _shadows(log: SceneLog, tick: int) -> FloatArray:
    """Footprints moved away from the sun: [n, 4, 3]."""
    boxes = log.actor_boxes(tick)
    heights = boxes.size_wlh[:, 2]
    grown = Boxes(boxes.id, boxes.xy, boxes.yaw, boxes.size_wlh + np.array([0.3, 0.3, 0.0]))
    footprints = grown.corners()[:, :4]
    footprints[..., :2] -= (SUN[:2] * heights[:, None] * 0.25)[:, None]
    return footprints


def _fill(
    canvas: Image, quads: FloatArray, intrinsics: FloatArray, colours: Sequence[Sequence[int]]
) -> None:
    """Fill quads [n, 4, 3] given in camera coordinates, cut at the near plane, one by one."""
    depth = quads[..., 2]
    whole = depth.min(1) >= NEAR_M
    # All at once: a quad alone takes longer to project than to fill.
    points = np.zeros((len(quads), 4, 2), np.int32)
    points[whole] = _fixed_point(quads[whole], intrinsics)
    reach = SMOOTH_PIXELS << FIXED_BITS
    end = np.array(canvas.shape[1::-1]) << FIXED_BITS
    inside = (points.max(1) > -reach).all(1) & (points.min(1) < end + reach).all(1)
    shown = np.flatnonzero(np.where(whole, inside, depth.max(1) >= NEAR_M))
    for row, is_whole, corners in zip(
        shown.tolist(), whole[shown].tolist(), points[shown], strict=True
    ):
        if not is_whole:
            kept = cut(quads[row])
            if len(kept) < 3:
                continue
            corners = _fixed_point(kept, intrinsics)
        cv2.fillConvexPoly(canvas, corners, colours[row], cv2.LINE_AA, FIXED_BITS)


def _fixed_point(camera: FloatArray, intrinsics: FloatArray) -> NDArray[np.int32]:
    """Pixels as OpenCV takes fractions of them."""
    return np.round(to_pixels(camera, intrinsics) * 2**FIXED_BITS).astype(np.int32)
