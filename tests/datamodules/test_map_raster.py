"""Rasters against shapely, cell by cell."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.index_file import load_index
from datamodules.map_raster import draw_lines, fill_rings, map_targets
from datamodules.nuscenes import NuScenesDataConfig
from odvla.errors import UserError
from odvla.types import MAP_CLASSES, BevGrid

GRID = BevGrid(-16.0, -10.0, 1.0, 20, 30)


def _centres(grid):
    """Cell centres [H, W, 2] in metres."""
    x = grid.x_min_m + (np.arange(grid.columns) + 0.5) * grid.cell_m
    y = grid.y_min_m + (np.arange(grid.rows) + 0.5) * grid.cell_m
    return np.stack(np.meshgrid(x, y), axis=-1)


def _segments(ring):
    return ring[:-1], ring[1:]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 35), st.floats(-5, 25)), min_size=3, max_size=7, unique=True)
)
def test_filling_agrees_with_shapely(points):
    polygon = shapely.convex_hull(shapely.MultiPoint(points))
    if polygon.geom_type != "Polygon":
        return
    filled = fill_rings(*_segments(np.array(polygon.exterior.coords)), GRID)
    column, row = np.meshgrid(np.arange(30), np.arange(20))
    inside = shapely.contains_xy(polygon, column, row)
    on_edge = shapely.distance(polygon.exterior, shapely.points(column, row)) < 1e-9
    np.testing.assert_array_equal(filled[~on_edge], inside[~on_edge])


def test_holes_stay_empty():
    outer = np.array([[2, 2], [20, 2], [20, 15], [2, 15], [2, 2]], float) + 0.25
    inner = np.array([[5, 5], [5, 9], [9, 9], [9, 5], [5, 5]], float) + 0.25  # clockwise
    start, end = (
        np.concatenate(pair) for pair in zip(_segments(outer), _segments(inner), strict=True)
    )
    filled = fill_rings(start, end, GRID)
    assert filled.sum() == 18 * 13 - 4 * 4
    assert not filled[6:10, 6:10].any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-40, 60), st.floats(-40, 60)), min_size=2, max_size=4, unique=True)
)
def test_lines_cover_the_cells_they_pass_through(points):
    line = np.array(points)
    drawn = draw_lines(*_segments(line), np.zeros(len(line) - 1, dtype=int), GRID, keep_empty=True)[
        0
    ]
    path = shapely.LineString(points)
    for row in range(GRID.rows):
        for column in range(GRID.columns):
            box = shapely.box(column - 0.5, row - 0.5, column + 0.5, row + 0.5)
            inside_m = path.intersection(box).length
            if drawn[row, column]:
                assert path.distance(box) < 1e-6
            else:
                assert inside_m < 0.25  # at most a corner is cut


@pytest.mark.parametrize("cell_m", [0.5, 2.0])
def test_elements_of_a_known_map(circle_root, circles, cell_m):
    index = load_index(circle_root, "v1.0-mini")
    cells = int(64 / cell_m)
    grid = BevGrid(-32.0, -32.0, cell_m, cells, cells)
    rings, lines = circles.map_layers()
    road = shapely.Polygon(rings["road"], [rings["hole"]])
    crossing = shapely.Polygon(rings["crossing"])
    for number in (0, 5, 15):
        frame = index.frames[number]
        scene = index.scenes[frame.scene].name
        x, y, yaw = circles.lidar_pose(scene, 0.5 * frame.position)
        cos, sin = np.cos(yaw), np.sin(yaw)
        centres = _centres(grid) @ np.array([[cos, sin], [-sin, cos]]) + [x, y]
        targets = map_targets(index, frame, grid)
        np.testing.assert_array_equal(
            targets.drivable[0].numpy(), shapely.contains_xy(road, *np.moveaxis(centres, -1, 0))
        )
        labels = targets.labels[0].tolist()
        masks = targets.masks[0].numpy()
        assert masks.any((1, 2)).all()
        points = shapely.points(centres)
        covered = shapely.convex_hull(shapely.MultiPoint(centres.reshape(-1, 2)))
        covered = covered.buffer(0.5 * cell_m, join_style="mitre")
        for name, shapes in {
            "divider": [shapely.LineString(line) for line in lines.values()],
            "boundary": [road.exterior, road.interiors[0]],
        }.items():
            own = [m for m, k in zip(masks, labels, strict=True) if MAP_CLASSES[k] == name]
            # Each line that has cells on the grid is one element, whichever the order.
            near = [shapely.distance(points, s) for s in shapes if s.intersects(covered)]
            assert len(own) == len(near)
            for distance in near:
                mask = min(own, key=lambda m, d=distance: d[m].mean())
                assert distance[mask].max() <= 0.71 * cell_m
                assert mask[distance < 0.4 * cell_m].all()
        inside = shapely.contains_xy(crossing, *np.moveaxis(centres, -1, 0))
        own = [m for m, k in zip(masks, labels, strict=True) if MAP_CLASSES[k] == "ped_crossing"]
        assert len(own) == inside.any()
        if own:
            np.testing.assert_array_equal(own[0], inside)


def test_missing_expansion_is_named_and_left_out_of_single_frames(circles, tmp_path):
    root = circles.write_root(tmp_path)
    (root / "maps" / "expansion" / "boston-seaport.json").unlink()
    config = NuScenesDataConfig(str(root), image_size=(32, 18), targets=("map",))
    data = config.build()
    scene = next(s for s in data.index.scenes if s.location == "boston-seaport")
    frame = data.index.frames[scene.first]
    with pytest.raises(UserError, match=r"boston-seaport\.json is missing"):
        map_targets(data.index, frame, config.grid)
    assert data.frame(frame.token).map is None
    assert data.frame(data.index.frames[0].token).map is not None
