"""Pictures of the town against the devkit's geometry, a pinhole and the painted ground."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion
from shapely.geometry import Point, Polygon

from datamodules.town.cameras import HAZE, HAZE_M, SceneRenderer
from datamodules.town.ground import CELL_M, drivable_mask, paint_ground
from datamodules.town.log import TICK_S, StaticBlock
from datamodules.town.rig import Rig, ego_to_global
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenario import simulate_scene
from datamodules.town.shapes import SHAPES, mesh

SIZE = (160, 90)


@pytest.fixture(scope="module")
def log():
    road = build_road_map(LOCATIONS[0], 0)
    scene = simulate_scene(road, "scene-0061", 0, 0)
    far = StaticBlock("tree", np.array([-900.0, -900.0]), np.ones(3), 0.0, (0, 90, 0))
    return replace(scene, road=replace(road, blocks=(far,)), daylight=1.0)


@pytest.fixture(scope="module")
def renderer(log):
    return SceneRenderer(log.road, *SIZE)


def placed(log, actor, ahead_m, left_m, turn):
    """The scene at tick 0 with one actor, put somewhere relative to the ego car."""
    yaw = float(log.ego.track.yaw[0])
    along = np.array([np.cos(yaw), np.sin(yaw)])
    xy = log.ego.track.xy[0] + ahead_m * along + left_m * np.array([-along[1], along[0]])
    ticks = len(actor.present)
    track = replace(actor.track, xy=np.tile(xy, (ticks, 1)), yaw=np.full(ticks, yaw + turn))
    moved = replace(actor, track=track, present=np.ones(ticks, bool))
    return replace(log, actors=(moved,))


def devkit_pixels(log, actor, name):
    """Corners of the actor's box in a camera: pixels [8, 2] and depth [8], by the devkit alone."""
    rig = Rig.for_size(*SIZE)
    box = Box(
        [*actor.track.xy[0], actor.size_wlh[2] / 2],
        actor.size_wlh,
        Quaternion(axis=[0, 0, 1], angle=float(actor.track.yaw[0])),
    )
    box.translate(-np.array([*log.ego.track.xy[0], 0.0]))
    box.rotate(Quaternion(axis=[0, 0, 1], angle=float(log.ego.track.yaw[0])).inverse)
    mount = rig.cameras[name]
    box.translate(-mount.translation)
    box.rotate(Quaternion(mount.quaternion).inverse)
    corners = box.corners()
    return view_points(corners, rig.intrinsics[name], normalize=True)[:2].T, corners[2]


@pytest.mark.parametrize(
    ("name", "ahead_m", "left_m"),
    [
        ("CAM_FRONT", 14.0, 1.0),
        ("CAM_FRONT_RIGHT", 8.0, -10.0),
        ("CAM_FRONT_LEFT", 8.0, 9.0),
        ("CAM_BACK", -12.0, -2.0),
        ("CAM_BACK_LEFT", -3.0, 11.0),
        ("CAM_BACK_RIGHT", -3.0, -11.0),
    ],
)
def test_a_body_fills_its_projected_box_and_nothing_else(log, renderer, name, ahead_m, left_m):
    car = next(a for a in log.actors if a.category == "vehicle.car")
    scene = placed(log, car, ahead_m, left_m, 0.5)
    # Pixels that depend on the paint of the body belong to it; its shadow does not.
    images = []
    for colour in ((250, 20, 20), (20, 20, 250)):
        painted = replace(scene, actors=(replace(scene.actors[0], colour=colour),))
        images.append(renderer.render(painted, 0)[name].astype(int))
    body = np.abs(images[0] - images[1]).max(-1) > 12
    pixels, depth = devkit_pixels(scene, scene.actors[0], name)
    assert depth.min() > 1
    hull = cv2.convexHull((pixels - 0.5).astype(np.float32))[:, 0]
    rows, columns = np.nonzero(body)
    assert len(rows) > 60
    outside = [
        -cv2.pointPolygonTest(hull, (float(c), float(r)), True)
        for r, c in zip(rows, columns, strict=True)
    ]
    assert max(outside) < 1.5  # OpenCV smooths an edge over three pixels
    # Tight: the paint reaches the sides of the box that it can be seen on.
    drawn = np.array([columns.min(), columns.max(), rows.max()])
    boxed = np.array([hull[:, 0].min(), hull[:, 0].max(), hull[:, 1].max()])
    assert np.abs(drawn - boxed).max() < 2.5


@pytest.mark.parametrize(
    ("name", "degrees", "field_of_view"),
    [
        ("CAM_FRONT", 0.0, 64.6),
        ("CAM_FRONT_RIGHT", -56.0, 64.6),
        ("CAM_FRONT_LEFT", 55.0, 64.6),
        ("CAM_BACK", 180.0, 90.3),
        ("CAM_BACK_LEFT", 108.0, 64.6),
        ("CAM_BACK_RIGHT", -110.0, 64.6),
    ],
)
def test_cameras_look_where_those_of_nuscenes_do(name, degrees, field_of_view):
    """Directions and horizontal fields of view of nuScenes' rig, in round numbers."""
    rig = Rig.for_size(*SIZE)
    turn = Quaternion(rig.cameras[name].quaternion)
    ahead = turn.rotate([0.0, 0.0, 1.0])
    angle = np.rad2deg(np.arctan2(ahead[1], ahead[0]))
    assert abs((angle - degrees + 180) % 360 - 180) < 0.5
    np.testing.assert_allclose(turn.rotate([0.0, 1.0, 0.0]), [0, 0, -1], atol=1e-9)
    spread = 2 * np.rad2deg(np.arctan(SIZE[0] / 2 / rig.intrinsics[name][0, 0]))
    assert spread == pytest.approx(field_of_view, abs=0.1)


def test_every_shape_reaches_the_faces_of_its_box():
    for kind in SHAPES:
        corners = mesh(kind).quads.reshape(-1, 3)
        assert corners.min() >= -0.5
        assert corners[:, 2].min() >= 0
        assert np.abs(corners[:, 1]).max() == pytest.approx(0.5)
        assert corners[:, 2].max() == pytest.approx(1.0)


def test_ground_pixels_show_the_point_that_a_pinhole_sees(log, renderer):
    ground = paint_ground(log.road)
    rig, name = renderer.rig, "CAM_FRONT"
    image = renderer.render(replace(log, actors=()), 0)[name].astype(float)
    pose = ego_to_global(log.ego.track.xy[0], float(log.ego.track.yaw[0]))
    camera = pose @ rig.cameras[name].matrix
    intrinsics = rig.intrinsics[name]
    errors = []
    for row in range(62, 88, 2):
        for column in range(4, 156, 8):
            u = (column + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
            v = (row + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
            ray = camera[:3, :3] @ np.array([u, v, 1.0])
            depth = -camera[2, 3] / ray[2]  # along the optical axis, which is level
            x, y, _ = camera[:3, 3] + depth * ray
            across, down = x / CELL_M, (log.road.extent_m[1] - y) / CELL_M
            i, j = int(down), int(across)
            # Warping samples between cells; a neighbourhood allows for it and for the grain.
            patch = ground[i - 1 : i + 2, j - 1 : j + 2].reshape(-1, 3).astype(float)
            fade = 1 - np.exp(-depth / HAZE_M)
            low, high = (
                p * (1 - fade) + np.array(HAZE) * fade for p in (patch.min(0), patch.max(0))
            )
            errors.append(np.maximum(low - image[row, column], image[row, column] - high).max())
    assert len(errors) == 13 * 19
    assert max(errors) < 3


def test_the_lamp_colour_shows_at_thirty_metres(log, renderer):
    light = log.road.lights[0]
    colours = {light.colour(tick * TICK_S): tick for tick in range(len(log.ego.track.yaw))}
    ahead = np.array([np.cos(light.yaw), np.sin(light.yaw)])
    ticks = len(log.ego.track.yaw)
    track = replace(
        log.ego.track,
        xy=np.tile(light.position[:2] + 31.7 * ahead, (ticks, 1)),
        yaw=np.full(ticks, light.yaw + np.pi),
    )
    scene = replace(log, ego=replace(log.ego, track=track), actors=())
    assert len(colours) > 1
    shown = {}
    for colour, tick in colours.items():
        image = renderer.render(scene, tick)["CAM_FRONT"].astype(int)
        middle = image[: SIZE[1] // 2 + 2, 70:90]
        red, green = middle[..., 0], middle[..., 1]
        shown[colour] = (int((red - green > 90).sum()), int((green - red > 60).sum()))
    assert "red" not in shown or (shown["red"][0] >= 9 and shown["red"][1] == 0)
    assert "green" not in shown or (shown["green"][1] >= 9 and shown["green"][0] == 0)


def test_brake_lights_show(log, renderer):
    car = next(a for a in log.actors if a.category == "vehicle.car")
    scene = placed(log, car, 14.0, 0.0, 0.0)
    reds = []
    for braking in (False, True):
        lit = np.full(len(car.braking), braking)
        image = renderer.render(
            replace(scene, actors=(replace(scene.actors[0], braking=lit, colour=(230, 230, 230)),)),
            0,
        )["CAM_FRONT"].astype(int)
        reds.append(int((image[..., 0] - image[..., 1] > 120).sum()))
    assert reds[0] == 0
    assert reds[1] >= 8


def test_equal_scenes_give_equal_bytes(log, renderer):
    again = SceneRenderer(log.road, *SIZE).render(log, 100)
    for name, image in renderer.render(log, 100).items():
        assert image.shape == (SIZE[1], SIZE[0], 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, again[name])


def test_the_base_map_is_white_where_one_can_drive(log):
    mask = drivable_mask(log.road, 0.1)
    polygons = [Polygon(p) for p in log.road.drivable]
    rng = np.random.default_rng(3)
    checked = {True: 0, False: 0}
    for x, y in rng.uniform(5, min(log.road.extent_m) - 5, (400, 2)):
        point = Point(x, y)
        if min(p.exterior.distance(point) for p in polygons) < 0.3:
            continue
        inside = any(p.contains(point) for p in polygons)
        value = mask[int((log.road.extent_m[1] - y) / 0.1), int(x / 0.1)]
        assert value == (255 if inside else 0)
        checked[inside] += 1
    assert min(checked.values()) > 20
