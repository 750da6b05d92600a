"""How much of each actor the cameras see: nuScenes' visibility, counted in small id images."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.town.log import SCENERY, SceneLog
from datamodules.town.projection import NEAR_M, cut, to_camera, to_pixels
from datamodules.town.rig import FloatArray, Rig, ego_to_global

SEEN_M = 95.0  # bodies beyond are not drawn
ID_SIZE = (192, 108)
NOBODY = -2
# Sides, bottom and top of a box as rows of its corners.
BOX_FACES = np.array(
    [[0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
)


def visibility(log: SceneLog, tick: int, rig: Rig) -> dict[int, float]:
    """Share of each actor that some camera sees, by actor id; 0 for those out of all views.

    Boxes are drawn as filled outlines into small id images, back to front; houses hide what is
    behind them.
    """
    ego = ego_to_global(log.ego.track.xy[tick], float(log.ego.track.yaw[tick]))
    actors = log.actor_boxes(tick).within(SEEN_M, ego[:2, 3])
    boxes = actors.and_then(log.road.houses.within(SEEN_M, ego[:2, 3]))
    corners = boxes.corners()
    scale = np.diag([ID_SIZE[0] / rig.width, ID_SIZE[1] / rig.height, 1.0])
    best = dict.fromkeys(actors.id.tolist(), 0.0)
    ids = np.empty(ID_SIZE[::-1], np.int32)
    alone = np.empty(ID_SIZE[::-1], np.uint8)
    for name, global_to_camera in rig.global_to_cameras(ego).items():
        ids[:] = NOBODY
        areas = {}
        outlines = _outlines(to_camera(corners, global_to_camera), scale @ rig.intrinsics[name])
        for row, outline in outlines:
            number = int(boxes.id[row])
            cv2.fillConvexPoly(ids, outline, (number,))
            if number != SCENERY:
                alone[:] = 0
                cv2.fillConvexPoly(alone, outline, (1,))
                areas[number] = cv2.countNonZero(alone)
        counts = np.bincount(ids[ids >= 0], minlength=max(best, default=0) + 1)
        for number, area in areas.items():
            if area:
                best[number] = max(best[number], float(counts[number]) / area)
    return best


def _outlines(camera: FloatArray, intrinsics: FloatArray) -> list[tuple[int, NDArray[np.int32]]]:
    """Boxes [n, 8, 3] that reach into the view: (row, outline in pixels), back to front."""
    depth = camera[..., 2]
    pixels = np.zeros((len(camera), 8, 2))
    whole = depth.min(1) >= NEAR_M
    pixels[whole] = to_pixels(camera[whole], intrinsics)
    left, right = pixels[..., 0].min(1), pixels[..., 0].max(1)
    shown = whole & (right >= -0.5) & (left <= ID_SIZE[0] - 0.5)
    # A body alongside reaches behind the camera; the rest of it still hides others.
    shown |= ~whole & (depth.max(1) >= NEAR_M)
    outlines = []
    back_to_front = np.argsort(-np.linalg.norm(camera.mean(1), axis=1), kind="stable")
    for row in back_to_front[shown[back_to_front]].tolist():
        corners = pixels[row]
        if not whole[row]:
            corners = to_pixels(
                np.concatenate([cut(s) for s in camera[row][BOX_FACES]]), intrinsics
            )
            if corners[:, 0].max() < -0.5 or corners[:, 0].min() > ID_SIZE[0] - 0.5:
                continue
        outlines.append((row, cv2.convexHull(corners.round().astype(np.int32))))
    return outlines
