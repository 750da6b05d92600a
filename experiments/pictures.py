"""Pictures: the front camera with the plan drawn into it, and the scene from above.

Colours are the same everywhere: the model's plan is orange, the driven path green, predicted boxes
blue, annotated boxes grey. All coordinates are in LIDAR_TOP at t0 (x right, y forward, metres).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
Image = NDArray[np.uint8]  # [h, w, 3] RGB

PLAN = (255, 140, 0)
DRIVEN = (30, 170, 60)
PREDICTED = (30, 90, 220)
ANNOTATED = (150, 150, 150)
EGO = (20, 20, 20)
BACKGROUND = (250, 250, 248)
DRIVABLE = (226, 228, 232)
MAP_COLOURS = ((240, 180, 0), (120, 170, 240), (90, 90, 90))  # divider, ped_crossing, boundary

LIDAR_HEIGHT_M = 1.84  # the road lies this far below LIDAR_TOP on the nuScenes car
PATH_WIDTH_M = 1.0
PANEL_HEIGHT = 540
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg")
EGO_SIZE_M = (1.73, 4.08)
EGO_CENTRE_M = (0.0, 0.5)  # the middle of the car is half a metre ahead of LIDAR_TOP
NEAR_M = 0.5  # what is nearer to a camera than this is cut off


@dataclass(frozen=True)
class ScenePicture:
    """All that is drawn of one sample; parts that are None or empty are left out."""

    front: Image
    front_intrinsics: FloatArray  # [3, 3]
    lidar_to_front: FloatArray  # [4, 4]
    plan: FloatArray | None = None  # [6, 2]
    driven: FloatArray | None = None  # [n, 2]
    predicted_boxes: FloatArray | None = None  # [Q, 9]
    annotated_boxes: FloatArray | None = None  # [A, 9]
    drivable: NDArray[np.bool_] | None = None  # [H, W]
    map_masks: NDArray[np.bool_] | None = None  # [M, H, W]
    map_labels: Sequence[int] = ()
    extent_m: tuple[float, float, float, float] = (-32.0, 32.0, -32.0, 32.0)  # of the masks
    title: str = ""


def draw_scene(picture: ScenePicture) -> Image:
    """Front camera and bird's-eye view side by side, with a caption line: RGB [h, w, 3]."""
    camera = draw_front(picture)
    above = draw_above(picture)
    gap = np.full((PANEL_HEIGHT, 8, 3), 255, np.uint8)
    body = np.concatenate([camera, gap, above], axis=1)
    header = np.full((34, body.shape[1], 3), 255, np.uint8)
    put_text(header, picture.title, (10, 23), (40, 40, 40))
    x = body.shape[1] - 10
    for label, colour in (
        ("annotated", ANNOTATED),
        ("predicted", PREDICTED),
        ("driven", DRIVEN),
        ("plan", PLAN),
    ):
        (width, _), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        x -= width + 14
        put_text(header, label, (x, 23), colour)
    return np.ascontiguousarray(np.concatenate([header, body], axis=0))


def draw_front(picture: ScenePicture) -> Image:
    """The front image, enlarged, with predicted boxes, the driven path and the plan on the road."""
    height, width = picture.front.shape[:2]
    scale = PANEL_HEIGHT / height
    size = (round(width * scale), PANEL_HEIGHT)
    canvas: Image = cv2.resize(picture.front, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    intrinsics = np.diag([scale, scale, 1.0]) @ picture.front_intrinsics
    if picture.predicted_boxes is not None:
        for box in picture.predicted_boxes:
            _draw_box(canvas, box, intrinsics, picture.lidar_to_front)
    for path, colour in ((picture.driven, DRIVEN), (picture.plan, PLAN)):
        if path is not None and len(path):
            _draw_ribbon(canvas, path, colour, intrinsics, picture.lidar_to_front)
    return canvas


def draw_above(picture: ScenePicture) -> Image:
    """The scene from above, forward is up: map, boxes, the car, the driven path and the plan."""
    x_min, x_max, y_min, y_max = picture.extent_m
    size = (round(PANEL_HEIGHT * (x_max - x_min) / (y_max - y_min)), PANEL_HEIGHT)
    canvas = np.full((size[1], size[0], 3), BACKGROUND, np.uint8)
    if picture.drivable is not None:
        canvas[_enlarge(picture.drivable, size)] = DRIVABLE
    if picture.map_masks is not None:
        for mask, label in zip(picture.map_masks, picture.map_labels, strict=True):
            canvas[_enlarge(mask, size)] = MAP_COLOURS[label]

    def to_pixels(points: FloatArray) -> NDArray[np.int32]:
        column = (points[:, 0] - x_min) / (x_max - x_min) * size[0]
        row = (y_max - points[:, 1]) / (y_max - y_min) * size[1]
        return np.stack([column, row], axis=-1).round().astype(np.int32)

    for boxes, colour in (
        (picture.annotated_boxes, ANNOTATED),
        (picture.predicted_boxes, PREDICTED),
    ):
        for box in boxes if boxes is not None else ():
            outline = to_pixels(box_corners(box)[:4, :2])
            cv2.polylines(canvas, [outline], True, colour, 2, cv2.LINE_AA)
            nose = to_pixels(np.stack([box[:2], box_corners(box)[:2, :2].mean(0)]))
            cv2.line(canvas, nose[0].tolist(), nose[1].tolist(), colour, 2, cv2.LINE_AA)
    ego = np.array([*EGO_CENTRE_M, 0, *EGO_SIZE_M, 1.5, np.pi / 2, 0, 0])
    cv2.fillPoly(canvas, [to_pixels(box_corners(ego)[:4, :2])], EGO, cv2.LINE_AA)
    for path, colour in ((picture.driven, DRIVEN), (picture.plan, PLAN)):
        if path is not None and len(path):
            line = to_pixels(np.concatenate([np.zeros((1, 2)), path]))
            cv2.polylines(canvas, [line], False, colour, 2, cv2.LINE_AA)
            for point in line[1:]:
                cv2.circle(canvas, point.tolist(), 4, colour, -1, cv2.LINE_AA)
    return canvas


def save_picture(image: Image, path: Path) -> None:
    """Write an RGB image; the ending of the name decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"could not write the picture {path}")


def box_corners(box: FloatArray) -> FloatArray:
    """Corners [8, 3] of a box: the bottom four from front left clockwise, then the top four."""
    x, y, z, width, length, height, yaw = box[:7]
    forward = np.array([np.cos(yaw), np.sin(yaw)]) * length / 2
    left = np.array([-np.sin(yaw), np.cos(yaw)]) * width / 2
    ground = np.array([forward + left, forward - left, -forward - left, -forward + left])
    ground = ground + np.array([x, y])
    bottom = np.c_[ground, np.full(4, z - height / 2)]
    return np.concatenate([bottom, bottom + np.array([0, 0, height])])


def _enlarge(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A BEV mask (row 0 = rearmost) at picture size (row 0 = foremost)."""
    flipped = np.ascontiguousarray(mask[::-1]).astype(np.uint8)
    return cv2.resize(flipped, size, interpolation=cv2.INTER_NEAREST).astype(bool)


def _draw_ribbon(
    canvas: Image,
    path: FloatArray,
    colour: tuple[int, int, int],
    intrinsics: FloatArray,
    lidar_to_cam: FloatArray,
) -> None:
    """A translucent strip on the road along a path, starting in front of the car."""
    points = np.concatenate([np.zeros((1, 2)), path])
    # Densely sampled, so that a strip that starts behind the image plane is cut where it enters the
    # view.
    at = np.linspace(0, len(points) - 1, 12 * (len(points) - 1) + 1)
    dense = np.stack([np.interp(at, np.arange(len(points)), points[:, i]) for i in (0, 1)], axis=-1)
    along = np.gradient(dense, axis=0)
    norm = np.linalg.norm(along, axis=-1, keepdims=True)
    if float(np.linalg.norm(dense[-1])) < 0.3:  # standing still: nothing to draw on the road
        return
    side = (
        np.stack([-along[:, 1], along[:, 0]], axis=-1) / np.maximum(norm, 1e-6) * PATH_WIDTH_M / 2
    )
    overlay = canvas.copy()
    edges = [
        project(
            np.c_[dense + s * side, np.full(len(dense), -LIDAR_HEIGHT_M)], intrinsics, lidar_to_cam
        )
        for s in (-1, 1)
    ]
    for i in range(len(dense) - 1):
        corners = np.array([edges[0][i], edges[0][i + 1], edges[1][i + 1], edges[1][i]])
        if (corners[:, 2] > NEAR_M).all():
            cv2.fillConvexPoly(
                overlay, corners[:, :2].round().astype(np.int32), colour, cv2.LINE_AA
            )
    cv2.addWeighted(overlay, 0.55, canvas, 0.45, 0, dst=canvas)


def _draw_box(
    canvas: Image, box: FloatArray, intrinsics: FloatArray, lidar_to_cam: FloatArray
) -> None:
    """The twelve edges of a box, if all of it is in front of the camera."""
    corners = project(box_corners(box), intrinsics, lidar_to_cam)
    if (corners[:, 2] <= NEAR_M).any():
        return
    pixels = corners[:, :2].round().astype(int)
    for a in range(4):
        b = (a + 1) % 4
        for start, end in ((a, b), (a + 4, b + 4), (a, a + 4)):
            cv2.line(
                canvas, pixels[start].tolist(), pixels[end].tolist(), PREDICTED, 1, cv2.LINE_AA
            )


def project(points: FloatArray, intrinsics: FloatArray, lidar_to_cam: FloatArray) -> FloatArray:
    """Lidar points [n, 3] -> [n, 3] of pixel column, pixel row, depth in metres."""
    camera = points @ lidar_to_cam[:3, :3].T + lidar_to_cam[:3, 3]
    depth = camera[:, 2:]
    image = camera @ intrinsics.T
    return np.c_[image[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth), depth]


def put_text(
    canvas: Image, text: str, origin: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Small text; origin is its lower left corner."""
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
