"""The ground of a location from above, painted once: asphalt, markings, pavements, grass."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.town.geometry import FloatArray, resample, shifted
from datamodules.town.log import RoadMap

CELL_M = 0.125
GRASS, PAVEMENT, KERB = (84, 116, 62), (168, 164, 158), (196, 194, 190)
ASPHALT, JUNCTION = (88, 89, 92), (84, 85, 88)
WHITE, YELLOW = (232, 232, 228), (228, 186, 44)
LINE_M = 0.22
BAND_ROWS = 16
SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


class GroundPainter:
    """Paints polygons and lines given in metres into a raster whose row 0 is the north edge."""

    def __init__(self, extent_m: tuple[float, float], cell_m: float, channels: int) -> None:
        self.cell_m = cell_m
        self.height_m = extent_m[1]
        shape = (round(extent_m[1] / cell_m), round(extent_m[0] / cell_m))
        self.image: NDArray[np.uint8] = np.zeros((*shape, channels), np.uint8).squeeze()

    def pixels(self, points: FloatArray) -> NDArray[np.int32]:
        """Metres [P, 2] -> fixed-point pixel coordinates for OpenCV."""
        column = points[:, 0] / self.cell_m - 0.5
        row = (self.height_m - points[:, 1]) / self.cell_m - 0.5
        return np.round(np.stack([column, row], axis=-1) * 2**SHIFT).astype(np.int32)

    def fill(self, polygon: FloatArray, colour: Sequence[float]) -> None:
        """Fill a simple polygon."""
        cv2.fillPoly(self.image, [self.pixels(polygon)], colour, cv2.LINE_AA, SHIFT)

    def line(self, points: FloatArray, colour: Sequence[float], width_m: float) -> None:
        """Draw a line of a width in metres."""
        thickness = max(1, round(width_m / self.cell_m))
        pixels = [self.pixels(points)]
        cv2.polylines(self.image, pixels, False, colour, thickness, cv2.LINE_AA, SHIFT)


def paint_ground(road: RoadMap) -> NDArray[np.uint8]:
    """The location from above, RGB [rows, columns, 3] at CELL_M, row 0 in the north."""
    painter = GroundPainter(road.extent_m, CELL_M, 3)
    painter.image[0] = GRASS
    painter.image[1:] = painter.image[0]  # whole rows: far quicker than pixel by pixel
    for polygon in road.walkways:
        painter.fill(polygon, PAVEMENT)
        painter.line(polygon, KERB, 0.25)
    for polygon, junction in road.road_segments:
        painter.fill(polygon, JUNCTION if junction else ASPHALT)
    for lane in road.lanes:
        if lane.right_neighbour is None and not lane.is_connector:
            painter.line(shifted(lane.centre, -lane.width_m / 2), WHITE, LINE_M)
    for divider in road.lane_dividers:
        for dash in _dashes(divider, 3.0, 4.5):
            painter.line(dash, WHITE, LINE_M)
    for divider in road.road_dividers:
        for side in (-0.22, 0.22):
            painter.line(shifted(divider, side), YELLOW, LINE_M)
    for polygon in road.ped_crossings:
        painter.fill(polygon, ASPHALT)
        _zebra(painter, polygon)
    for line in road.stop_lines:
        painter.fill(line.polygon, WHITE)
    return _textured(painter.image, zlib.crc32(road.location.encode()))


def drivable_mask(road: RoadMap, cell_m: float) -> NDArray[np.uint8]:
    """255 where one can drive, [rows, columns], row 0 in the north: nuScenes' semantic prior."""
    painter = GroundPainter(road.extent_m, cell_m, 1)
    for polygon in road.drivable:
        painter.fill(polygon, (255,))
    return painter.image


def _dashes(points: FloatArray, dash_m: float, gap_m: float) -> list[FloatArray]:
    line = resample(points, 0.5)
    length, period = round(dash_m / 0.5), round((dash_m + gap_m) / 0.5)
    return [line[i : i + length + 1] for i in range(0, len(line) - length, period)]


def _zebra(painter: GroundPainter, polygon: FloatArray) -> None:
    """White stripes along the street, side by side over its width."""
    sides = polygon[1] - polygon[0], polygon[2] - polygon[1]
    over = int(np.argmax([np.linalg.norm(side) for side in sides]))
    across, along = sides[over], sides[1 - over]
    corner = polygon[0] if over == 0 else polygon[1]
    if over == 1:
        along = polygon[0] - polygon[1]
    count = int(np.linalg.norm(across) / 1.1)
    for stripe in range(count):
        a = corner + across * (stripe + 0.25) / count
        b = corner + across * (stripe + 0.75) / count
        painter.fill(np.array([a, b, b + along, a + along]), WHITE)


def _textured(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Patches and grain, so that nothing is a flat colour."""
    rng = np.random.default_rng(seed)
    rows, columns = image.shape[:2]
    patches = rng.normal(0, 1, (rows // 24 + 1, columns // 24 + 1)).astype(np.float32)
    patches = cv2.resize(patches, (columns, rows), interpolation=cv2.INTER_LINEAR) * 5
    grain = rng.integers(-7, 8, (512, 512), dtype=np.int8).astype(np.float32)
    tiled = np.tile(grain, (rows // 512 + 1, columns // 512 + 1))[:rows, :columns]
    # In bands that fit the processor's cache.
    for band in (slice(row, row + BAND_ROWS) for row in range(0, rows, BAND_ROWS)):
        noise = (patches[band] + tiled[band])[..., None]
        image[band] = np.clip(image[band] + noise, 0, 255)
    return image
