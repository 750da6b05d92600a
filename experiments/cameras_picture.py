"""The picture of a sample as the sensors give it: six cameras with boxes, and the scene from above.

Nothing of a model is in it: it shows whether images, calibration, boxes, lidar and map fit one
another. All coordinates are in LIDAR_TOP at t0 (x right, y forward, metres).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.agents import boxes_in_lidar, rows_of
from datamodules.lidar import read_sweep
from datamodules.nuscenes import NuScenesDataModule
from datamodules.records import Index
from experiments.pictures import (
    BACKGROUND,
    DRIVABLE,
    DRIVEN,
    EGO,
    EGO_CENTRE_M,
    EGO_SIZE_M,
    LIDAR_HEIGHT_M,
    MAP_COLOURS,
    NEAR_M,
    FloatArray,
    Image,
    box_corners,
    project,
    put_text,
)
from odvla.types import BevGrid

# Left to right as one sees them; the lower row looks back, so the car's right is on the left.
PLACES = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT"),
)
GROUPS = (  # start of the category's name, colour
    ("human", (230, 60, 60)),
    ("vehicle.bicycle", (230, 60, 200)),
    ("vehicle.motorcycle", (230, 60, 200)),
    ("vehicle", (255, 150, 0)),
    ("movable_object", (60, 170, 230)),
)
OTHER = (150, 150, 150)
TILE = (640, 360)
ABOVE = 2 * TILE[1]
REACH_M = 40.0
MAP_CELL_M = 0.2
POINT_REACH_M = 60.0


@dataclass(frozen=True)
class SampleView:
    """All that is drawn."""

    images: dict[str, Image]
    intrinsics: dict[str, FloatArray]
    lidar_to_cam: dict[str, FloatArray]
    boxes: FloatArray  # [A, 9] all annotated ones
    categories: tuple[str, ...]
    points: FloatArray | None  # [n, 3] of the lidar; None: there is no file
    driven: FloatArray  # [k, 2] what is known of the next 3 s
    drivable: NDArray[np.bool_] | None
    elements: Sequence[tuple[int, FloatArray]]  # class of MAP_CLASSES, line [k, 2] in metres
    notes: tuple[str, ...]


def sample_view(data: NuScenesDataModule, sample_token: str) -> SampleView:
    """Read one sample of a root in full size; what is missing is said in the notes.

    Raises:
        UserError: no such sample, or a broken image.
    """
    from datamodules.map_raster import drivable_area, map_lines

    index = data.index
    frame = index.frame(sample_token)
    batch = data.frame(sample_token)
    frames = batch.clip[-1]
    names = [camera.name for camera in frame.cameras]
    rows = rows_of(index, frame)
    notes = []
    points = lidar_points(index, frame.lidar_file)
    if points is None:
        notes.append("no lidar file")
    drivable, elements = None, []
    if index.location(frame) in index.maps:
        cells = round(2 * REACH_M / MAP_CELL_M)
        grid = BevGrid(-REACH_M, -REACH_M, MAP_CELL_M, cells, cells)
        drivable, elements = drivable_area(index, frame, grid), map_lines(index, frame, REACH_M)
    else:
        notes.append("no map expansion")
    assert batch.plan is not None
    known = batch.plan.mask[0].numpy()
    if not known.all():
        notes.append(f"{int(known.sum())} of {len(known)} steps of the future known")
    if not index.can_bus.available[frame.number]:
        notes.append("no CAN bus")
    categories = index.annotations.categories
    return SampleView(
        images={n: frames.images[0, k].permute(1, 2, 0).numpy() for k, n in enumerate(names)},
        intrinsics={n: frames.cameras.intrinsics[0, k].numpy() for k, n in enumerate(names)},
        lidar_to_cam={n: frames.cameras.lidar_to_cam[0, k].numpy() for k, n in enumerate(names)},
        boxes=boxes_in_lidar(index, rows, frame),
        categories=tuple(categories[k] for k in index.annotations.category[rows]),
        points=points,
        driven=batch.plan.waypoints[0].numpy()[known],
        drivable=drivable,
        elements=elements,
        notes=tuple(notes),
    )


def lidar_points(index: Index, file: str) -> FloatArray | None:
    """Points [n, 3] of a sweep, metres; None where the file is not there.

    Raises:
        UserError: the file is not a whole number of points.
    """
    path = Path(index.root / file)
    return read_sweep(path)[:, :3] if path.is_file() else None


def draw_sample(view: SampleView, title: str) -> Image:
    """Six cameras and the bird's-eye view side by side: RGB [h, w, 3]."""
    rows = [np.concatenate([draw_camera(view, name) for name in row], axis=1) for row in PLACES]
    body = np.concatenate([np.concatenate(rows, axis=0), draw_above(view)], axis=1)
    header = np.full((34, body.shape[1], 3), 255, np.uint8)
    put_text(header, "; ".join((title, *view.notes)), (10, 23), (40, 40, 40))
    x = body.shape[1] - 10
    for label, colour in (("driven", DRIVEN), ("other", OTHER), *_legend()):
        (width, _), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        x -= width + 14
        put_text(header, label, (x, 23), colour)
    return np.ascontiguousarray(np.concatenate([header, body], axis=0))


def _legend() -> list[tuple[str, tuple[int, int, int]]]:
    words = {"human": "people", "vehicle.motorcycle": "cycles", "movable_object": "objects"}
    return [(words.get(s, "vehicles"), c) for s, c in GROUPS if s != "vehicle.bicycle"][::-1]


def colour_of(category: str) -> tuple[int, int, int]:
    """Colour of a category's boxes."""
    return next((colour for start, colour in GROUPS if category.startswith(start)), OTHER)


def draw_camera(view: SampleView, name: str) -> Image:
    """One image with lidar points by distance, boxes and the driven path on the road."""
    image = view.images[name]
    scale = np.array(TILE) / np.array(image.shape[1::-1])
    method = cv2.INTER_AREA if scale[0] < 1 else cv2.INTER_LINEAR
    canvas: Image = cv2.resize(image, TILE, interpolation=method).astype(np.uint8)
    intrinsics = np.diag([scale[0], scale[1], 1.0]) @ view.intrinsics[name]
    pose = view.lidar_to_cam[name]
    if view.points is not None:
        _draw_points(canvas, project(view.points, intrinsics, pose))
    # Far boxes first, so that near ones lie on top.
    order = np.argsort(-np.hypot(view.boxes[:, 0], view.boxes[:, 1]))
    for number in order:
        corners = project(box_corners(view.boxes[number]), intrinsics, pose)
        _draw_edges(canvas, corners, colour_of(view.categories[number]))
    if len(view.driven):
        road = np.c_[view.driven, np.full(len(view.driven), -LIDAR_HEIGHT_M)]
        for column, row, depth in project(road, intrinsics, pose):
            if depth > NEAR_M:
                cv2.circle(canvas, (round(column), round(row)), 4, DRIVEN, -1, cv2.LINE_AA)
    cv2.rectangle(canvas, (0, 0), (12 + 9 * len(name), 26), (30, 30, 30), -1)
    put_text(canvas, name, (8, 18), (255, 255, 255))
    return canvas


def _draw_points(canvas: Image, points: FloatArray) -> None:
    """Near points are warm, far ones cold."""
    height, width = canvas.shape[:2]
    points = points[points[:, 2] > NEAR_M]
    inside = (points[:, 0] >= 0) & (points[:, 0] < width)
    inside &= (points[:, 1] >= 0) & (points[:, 1] < height)
    points = points[inside]
    share = np.clip(points[:, 2] / POINT_REACH_M, 0, 1)
    colours = np.stack([255 * (1 - share), 200 * (1 - np.abs(2 * share - 1)), 255 * share], axis=-1)
    column, row = points[:, :2].astype(int).T
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # two pixels wide
        at = np.minimum(row + down, height - 1), np.minimum(column + right, width - 1)
        canvas[at] = colours.astype(np.uint8)


def _draw_edges(canvas: Image, corners: FloatArray, colour: tuple[int, int, int]) -> None:
    """Edges of a box that lie in front of the camera; a box that touches the picture only."""
    height, width = canvas.shape[:2]
    seen = corners[corners[:, 2] > NEAR_M]
    inside = (seen[:, 0] > 0) & (seen[:, 0] < width) & (seen[:, 1] > 0) & (seen[:, 1] < height)
    if not inside.any():
        return
    for a in range(4):
        b = (a + 1) % 4
        for start, end in ((a, b), (a + 4, b + 4), (a, a + 4)):
            if corners[start, 2] <= NEAR_M or corners[end, 2] <= NEAR_M:
                continue
            ends = np.clip(corners[[start, end], :2], -9999, 9999).round().astype(int)
            cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), colour, 1, cv2.LINE_AA)


def draw_above(view: SampleView) -> Image:
    """The scene from above, forward is up: map, lidar points, boxes with their noses, the car."""
    canvas = np.full((ABOVE, ABOVE, 3), BACKGROUND, np.uint8)
    scale = ABOVE / (2 * REACH_M)

    def to_pixels(points: FloatArray) -> NDArray[np.int32]:
        flipped = np.stack([points[:, 0] + REACH_M, REACH_M - points[:, 1]], axis=-1)
        return (np.clip(flipped * scale, -9999, 9999)).round().astype(np.int32)

    if view.drivable is not None:
        cells = cv2.resize(view.drivable[::-1].astype(np.uint8), (ABOVE, ABOVE))
        canvas[cells.astype(bool)] = DRIVABLE
    for label, line in view.elements:
        cv2.polylines(canvas, [to_pixels(line)], False, MAP_COLOURS[label], 1, cv2.LINE_AA)
    if view.points is not None:
        column, row = to_pixels(view.points).T
        inside = (column >= 0) & (column < ABOVE) & (row >= 0) & (row < ABOVE)
        canvas[row[inside], column[inside]] = (120, 130, 150)
    for box, category in zip(view.boxes, view.categories, strict=True):
        colour, corners = colour_of(category), box_corners(box)
        cv2.polylines(canvas, [to_pixels(corners[:4, :2])], True, colour, 2, cv2.LINE_AA)
        nose = to_pixels(np.stack([box[:2], corners[:2, :2].mean(0)]))
        cv2.line(canvas, nose[0].tolist(), nose[1].tolist(), colour, 2, cv2.LINE_AA)
    ego = np.array([*EGO_CENTRE_M, 0, *EGO_SIZE_M, 1.5, np.pi / 2, 0, 0])
    cv2.fillPoly(canvas, [to_pixels(box_corners(ego)[:4, :2])], EGO, cv2.LINE_AA)
    for point in to_pixels(view.driven) if len(view.driven) else ():
        cv2.circle(canvas, point.tolist(), 4, DRIVEN, -1, cv2.LINE_AA)
    return canvas
