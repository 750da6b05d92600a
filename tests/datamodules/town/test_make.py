"""The written town against the unmodified nuscenes-devkit, and against its own log."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points
from nuscenes.utils.splits import create_splits_scenes

from datamodules.town.log import KEYFRAMES_PER_SCENE, TICKS_PER_KEYFRAME
from datamodules.town.make import TownConfig, _run, make_town
from datamodules.town.map_expansion import arcs
from datamodules.town.roads import LOCATIONS, build_road_map
from datamodules.town.scenario import simulate_scene
from datamodules.town.scene_job import SceneJob
from datamodules.town.scenes import scene_names
from datamodules.town.tokens import TokenIndex
from odvla.errors import UserError

VERSION = "v1.0-trainval"


@pytest.fixture(scope="module")
def devkit(town_root):
    return NuScenes(VERSION, str(town_root), verbose=False)


@pytest.fixture(scope="module")
def log():
    name, location = scene_names(3)[0]
    return simulate_scene(build_road_map(location, 0), name, 0, 0)


def test_devkit_finds_every_record(devkit):
    assert len(devkit.scene) == 3
    assert len(devkit.sample) == 3 * KEYFRAMES_PER_SCENE
    assert len(devkit.category) == 23
    for sample in devkit.sample:
        assert set(sample["data"]) == {s["channel"] for s in devkit.sensor}
    val = set(create_splits_scenes()["val"])
    assert [scene["name"] in val for scene in devkit.scene] == [False, False, True]
    for sample_data in devkit.sample_data:
        assert devkit.get("ego_pose", sample_data["ego_pose_token"])
        assert (sample_data["next"] == "") or devkit.get("sample_data", sample_data["next"])


def test_boxes_and_velocities_are_the_simulated_ones(devkit, log):
    tokens = TokenIndex(0, {})
    checked = 0
    for annotation in devkit.sample_annotation:
        for keyframe in (5, 20):
            if annotation["sample_token"] != tokens.sample(log.name, keyframe):
                continue
            tick = keyframe * TICKS_PER_KEYFRAME
            by_token = {tokens.annotation(log.name, keyframe, a.id): a for a in log.actors}
            actor = by_token[annotation["token"]]
            np.testing.assert_allclose(
                annotation["translation"][:2], actor.track.xy[tick], atol=1e-4
            )
            # Out of sight in between, a body has no annotation there, and its velocity no meaning.
            neighbours = [
                devkit.get("sample_annotation", annotation[side])["sample_token"]
                for side in ("prev", "next")
                if annotation[side]
            ]
            if neighbours == [tokens.sample(log.name, keyframe + step) for step in (-1, 1)]:
                before, after = tick - TICKS_PER_KEYFRAME, tick + TICKS_PER_KEYFRAME
                moved = actor.track.xy[after] - actor.track.xy[before]
                velocity = devkit.box_velocity(annotation["token"])[:2]
                np.testing.assert_allclose(velocity, moved / 1.0, atol=1e-3)
                checked += 1
    assert checked > 5


def test_points_counted_in_a_box_lie_in_it(devkit):
    """num_lidar_pts is what the devkit's own boxes hold, but for the noise at their faces."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    sample = devkit.sample[10]
    path, boxes, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
    points = LidarPointCloud.from_file(path).points[:3]
    counted, written = 0, 0
    for box in boxes:
        counted += int(points_in_box(box, points, wlh_factor=1.05).sum())
        written += devkit.get("sample_annotation", box.token)["num_lidar_pts"]
    assert written > 20
    # Grazing ground points lie in the enlarged boxes too.
    assert 0.9 * written <= counted <= 1.3 * written + 20


def test_a_box_sits_on_its_object_in_the_image(devkit):
    """Where a well visible box projects to, the image differs from the one drawn without it."""
    import cv2

    from datamodules.town.cameras import SceneRenderer

    name, location = scene_names(3)[0]
    road = build_road_map(location, 0)
    scene = simulate_scene(road, name, 0, 0)
    renderer = SceneRenderer(road, 320, 180)
    tokens = TokenIndex(0, {})
    found = 0
    for keyframe in range(0, KEYFRAMES_PER_SCENE, 6):
        sample = devkit.get("sample", tokens.sample(name, keyframe))
        with_all = renderer.render(scene, keyframe * TICKS_PER_KEYFRAME)["CAM_FRONT"]
        _, boxes, intrinsic = devkit.get_sample_data(sample["data"]["CAM_FRONT"])
        scaled = np.diag([320 / 96, 180 / 54, 1.0]) @ intrinsic
        for box in boxes:
            corners = box.corners()
            if corners[2].min() < 1 or corners[2].max() > 30:
                continue
            number = next(
                a.id for a in scene.actors if tokens.annotation(name, keyframe, a.id) == box.token
            )
            others = tuple(a for a in scene.actors if a.id != number)
            without = renderer.render(
                dataclasses.replace(scene, actors=others), keyframe * TICKS_PER_KEYFRAME
            )["CAM_FRONT"]
            changed = (with_all.astype(int) - without).any(-1)
            hull = np.zeros(changed.shape, np.uint8)
            pixels = view_points(corners, scaled, normalize=True)[:2].T
            cv2.fillConvexPoly(hull, cv2.convexHull(pixels.round().astype(np.int32)), 1)
            grown = cv2.dilate(hull, np.ones((3, 3), np.uint8)) > 0
            rows = np.arange(changed.shape[0])[:, None]
            above_wheels = changed & (rows < pixels[:, 1].max() - 2)  # its shadow is on the ground
            if above_wheels.sum() > 30:
                assert (above_wheels & grown).sum() > 0.8 * above_wheels.sum()
                found += 1
    assert found > 2


def test_can_bus_agrees_with_the_ego_poses(devkit, town_root):
    can_bus = NuScenesCanBus(dataroot=str(town_root))
    scene = devkit.scene[0]
    poses = can_bus.get_messages(scene["name"], "pose")
    times = np.array([message["utime"] for message in poses])
    sample = devkit.get("sample", scene["first_sample_token"])
    while sample["next"]:
        sample = devkit.get("sample", sample["next"])
        pose = devkit.get("ego_pose", sample["data"]["LIDAR_TOP"])
        message = poses[int(np.abs(times - pose["timestamp"]).argmin())]
        np.testing.assert_allclose(message["pos"][:2], pose["translation"][:2], atol=2e-3)
        np.testing.assert_allclose(message["orientation"], pose["rotation"], atol=1e-5)
    for kind in ("steeranglefeedback", "vehicle_monitor", "zoe_veh_info"):
        assert can_bus.get_messages(scene["name"], kind)


def test_map_is_read_and_lanes_follow_their_centres(town_root):
    location = scene_names(3)[0][1]
    road = build_road_map(location, 0)
    nusc_map = NuScenesMap(str(town_root), location)
    assert len(nusc_map.lane) + len(nusc_map.lane_connector) == len(road.lanes)
    for layer in ("road_segment", "ped_crossing", "walkway", "stop_line", "traffic_light"):
        assert getattr(nusc_map, layer), layer
    x, y = road.lanes[0].centre[len(road.lanes[0].centre) // 2]
    assert nusc_map.layers_on_point(x, y)["drivable_area"]
    token = nusc_map.get_closest_lane(x, y, radius=2)
    for pose in nusc_map.discretize_lanes([token], 0.5)[token]:
        nearest = min(np.linalg.norm(lane.centre - pose[:2], axis=1).min() for lane in road.lanes)
        assert nearest < 0.6
    assert nusc_map.get_outgoing_lane_ids(token)


@pytest.mark.parametrize("location", LOCATIONS[:2])
def test_arcs_follow_every_lane(location):
    from nuscenes.map_expansion.arcline_path_utils import discretize

    for lane in build_road_map(location, 0).lanes[::7]:
        for path in arcs(lane.centre):
            for x, y, _ in discretize(path, 0.5):
                distance = np.linalg.norm(lane.centre - [x, y], axis=1).min()
                assert distance < 0.55  # centres are sampled every metre


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    def digest(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        parts = [(str(p.relative_to(folder)), p.read_bytes()) for p in files]
        return hashlib.sha256(repr(parts).encode()).hexdigest(), len(files)

    towns = [
        make_town(TownConfig(str(tmp_path / f"t{k}"), 2, (64, 36), seed=3, workers=workers))
        for k, workers in enumerate((1, 2))
    ]
    assert digest(towns[0]) == digest(towns[1])
    other = make_town(TownConfig(str(tmp_path / "other"), 1, (64, 36), seed=4, workers=1))
    assert digest(other)[0] != digest(towns[0])[0]


def test_scenes_of_one_place_share_no_objects(tmp_path):
    """As where processes made them: else a pickle of both would have other bytes."""
    (tmp_path / "root").mkdir()
    jobs = [
        SceneJob(tmp_path / "root", name, LOCATIONS[0], number, 0, (64, 36), 90)
        for number, name in enumerate(("scene-0061", "scene-0103"))
    ]
    first, second = (log for _, (log, _) in _run(jobs, None))
    whole = pickle.dumps((first, second))
    assert whole == pickle.dumps(tuple(pickle.loads(pickle.dumps(log)) for log in (first, second)))


def test_a_full_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not empty"):
        make_town(TownConfig(str(tmp_path), 1, (64, 36)))
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenes": 0}, "1 to 850 scenes, not 0"),
        ({"image_size": (20, 10)}, "20x10 are too small"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_impossible_towns_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        TownConfig("nowhere", **settings)
