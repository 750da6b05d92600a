"""A hand-made nuScenes root whose every pose and box is known in closed form.

The car of each scene drives a circle; boxes move in straight lines. Cameras are exposed 20 ms
before the lidar and have their own ego pose, as in the real data. It knows nothing of the readers.
"""

import hashlib
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

CAMERA_YAWS = {
    "CAM_FRONT": 0.0,
    "CAM_FRONT_RIGHT": -56.0,
    "CAM_FRONT_LEFT": 55.0,
    "CAM_BACK": 180.0,
    "CAM_BACK_LEFT": 108.0,
    "CAM_BACK_RIGHT": -110.0,
}
# name: location, key-frames, speed m/s, yaw rate rad/s
SCENES = {
    "scene-0061": ("singapore-onenorth", 9, 6.0, 0.2),
    "scene-0553": ("boston-seaport", 4, 5.0, 0.05),
    "scene-0103": ("boston-seaport", 8, 8.0, -0.3),
    "scene-0916": ("singapore-onenorth", 5, 4.0, 0.1),
}
# name: category, start relative to the car's start, velocity, key-frames annotated, points
AGENTS = {
    "car": ("vehicle.car", (12.0, 4.0), (3.0, 1.0), range(99), 9),
    "walker": ("human.pedestrian.adult", (8.0, -5.0), (-0.5, 1.0), (1, 2, 3, 6), 3),
    "hidden": ("vehicle.truck", (15.0, 0.0), (0.0, 0.0), range(99), 0),
    "dog": ("animal", (6.0, 2.0), (0.0, 0.0), range(99), 5),
    "far": ("vehicle.bus.rigid", (90.0, 90.0), (0.0, 0.0), range(99), 5),
}
IMAGE_SIZE = (64, 36)
START_US = 1_500_000_000_000_000
CAMERA_LEAD_S = 0.02
LIDAR_AT = (0.943713, 0.0, 1.84023)


def token(*parts):
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def yaw_quaternion(yaw):
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def ego_pose(scene, t_s):
    """x, y, yaw of the car in global axes at a time of the scene."""
    _, _, speed, rate = SCENES[scene]
    yaw0 = 0.3
    yaw = yaw0 + rate * t_s
    x = 200 + speed / rate * (math.sin(yaw) - math.sin(yaw0))
    y = 300 - speed / rate * (math.cos(yaw) - math.cos(yaw0))
    return x, y, yaw


def lidar_pose(scene, t_s):
    """x, y, yaw of LIDAR_TOP's x axis (the car's right) in global axes."""
    x, y, yaw = ego_pose(scene, t_s)
    return x + LIDAR_AT[0] * math.cos(yaw), y + LIDAR_AT[0] * math.sin(yaw), yaw - math.pi / 2


def agent_xy(scene, name, t_s):
    _, start, velocity, _, _ = AGENTS[name]
    x, y, _ = ego_pose(scene, 0.0)
    return x + start[0] + velocity[0] * t_s, y + start[1] + velocity[1] * t_s


def agent_yaw(name):
    velocity = AGENTS[name][2]
    return math.atan2(velocity[1], velocity[0])


def _sensors(tables):
    for name in ("LIDAR_TOP", *CAMERA_YAWS):
        modality = "lidar" if name == "LIDAR_TOP" else "camera"
        tables["sensor"].append({"token": token(name), "channel": name, "modality": modality})
        rotation, intrinsic, at = yaw_quaternion(-math.pi / 2), [], LIDAR_AT
        if modality == "camera":
            # Camera axes: x right, y down, z forward.
            yaw = math.radians(CAMERA_YAWS[name])
            rotation = _product(yaw_quaternion(yaw), [0.5, -0.5, 0.5, -0.5])
            intrinsic = [[50.0, 0.0, 32.0], [0.0, 50.0, 18.0], [0.0, 0.0, 1.0]]
            at = (1.0 + math.cos(yaw), math.sin(yaw), 1.5)
        tables["calibrated_sensor"].append(
            {
                "token": token("calibration", name),
                "sensor_token": token(name),
                "translation": list(at),
                "rotation": rotation,
                "camera_intrinsic": intrinsic,
            }
        )


def _product(a, b):
    w, x, y, z = a
    p, q, r, s = b
    return [
        w * p - x * q - y * r - z * s,
        w * q + x * p + y * s - z * r,
        w * r - x * s + y * p + z * q,
        w * s + x * r - y * q + z * p,
    ]


def _keyframe(root, tables, scene, k):
    frames = SCENES[scene][1]
    sample, t_us = token(scene, k), START_US + k * 500_000
    tables["sample"].append(
        {
            "token": sample,
            "timestamp": t_us,
            "prev": token(scene, k - 1) if k else "",
            "next": token(scene, k + 1) if k + 1 < frames else "",
            "scene_token": token(scene),
        }
    )
    for name in ("LIDAR_TOP", *CAMERA_YAWS):
        camera = name != "LIDAR_TOP"
        x, y, yaw = ego_pose(scene, 0.5 * k - camera * CAMERA_LEAD_S)
        own = token(scene, k, name)
        file = f"samples/{name}/{scene}_{k}.{'jpg' if camera else 'pcd.bin'}"
        if camera:
            image = np.full((*IMAGE_SIZE[::-1], 3), (10 * k, 100, 200), np.uint8)  # BGR
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / file), image)
        tables["ego_pose"].append(
            {
                "token": own,
                "timestamp": t_us - camera * 20_000,
                "rotation": yaw_quaternion(yaw),
                "translation": [x, y, 0.0],
            }
        )
        tables["sample_data"].append(
            {
                "token": own,
                "sample_token": sample,
                "ego_pose_token": own,
                "calibrated_sensor_token": token("calibration", name),
                "timestamp": t_us - camera * 20_000,
                "fileformat": "jpg" if camera else "pcd",
                "is_key_frame": True,
                "width": IMAGE_SIZE[0] if camera else 0,
                "height": IMAGE_SIZE[1] if camera else 0,
                "filename": file,
                "prev": "",
                "next": "",
            }
        )


def _agents(tables, scene):
    frames = SCENES[scene][1]
    for name, (category, _, _, when, points) in AGENTS.items():
        seen = [k for k in range(frames) if k in when]
        tokens = [token(scene, name, k) for k in seen]
        tables["instance"].append(
            {
                "token": token(scene, name),
                "category_token": token(category),
                "nbr_annotations": len(seen),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
        for i, k in enumerate(seen):
            tables["sample_annotation"].append(
                {
                    "token": tokens[i],
                    "sample_token": token(scene, k),
                    "instance_token": token(scene, name),
                    "visibility_token": "4",
                    "attribute_tokens": [],
                    "translation": [*agent_xy(scene, name, 0.5 * k), 0.8],
                    "size": [1.8, 4.2, 1.6],
                    "rotation": yaw_quaternion(agent_yaw(name)),
                    "prev": tokens[i - 1] if i else "",
                    "next": tokens[i + 1] if i + 1 < len(tokens) else "",
                    "num_lidar_pts": points,
                    "num_radar_pts": 0,
                }
            )


def map_layers():
    """Location map: drivable square with a hole, one divider of each kind, one crossing."""
    rings = {
        "road": [(150, 250), (260, 250), (260, 360), (150, 360)],
        "hole": [(205, 305), (211, 305), (211, 311), (205, 311)],
        "crossing": [(215, 290), (221, 290), (221, 300), (215, 300)],
    }
    lines = {"road_divider": [(180, 260), (230, 350)], "lane_divider": [(190, 330), (240, 330)]}
    return rings, lines


def _write_map(path):
    rings, lines = map_layers()
    nodes, layers = [], {}

    def add(name, points):
        for i, (x, y) in enumerate(points):
            nodes.append({"token": f"{name}{i}", "x": float(x), "y": float(y)})
        return [f"{name}{i}" for i in range(len(points))]

    hole = [{"node_tokens": add("hole", rings["hole"])}]
    layers["polygon"] = [
        {"token": "p_road", "exterior_node_tokens": add("road", rings["road"]), "holes": hole},
        {
            "token": "p_crossing",
            "exterior_node_tokens": add("crossing", rings["crossing"]),
            "holes": [],
        },
    ]
    layers["line"] = [{"token": f"l_{n}", "node_tokens": add(n, line)} for n, line in lines.items()]
    layers["drivable_area"] = [{"token": "area", "polygon_tokens": ["p_road"]}]
    layers["ped_crossing"] = [{"token": "crossing", "polygon_token": "p_crossing"}]
    for name in lines:
        layers[name] = [{"token": name, "line_token": f"l_{name}"}]
    empty = (
        "road_segment road_block lane walkway stop_line carpark_area traffic_light lane_connector"
    )
    content = {
        "version": "1.3",
        "canvas_edge": [400.0, 400.0],
        "node": nodes,
        "arcline_path_3": {},
        "connectivity": {},
        **{name: [] for name in empty.split()},
        **layers,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_can_bus(root, scene):
    _, frames, speed, rate = SCENES[scene]
    poses, steers = [], []
    for i in range(int(0.5 * (frames - 1) * 50) + 1):
        t_s = i / 50
        x, y, yaw = ego_pose(scene, t_s)
        utime = START_US + round(t_s * 1e6)
        poses.append(
            {
                "utime": utime,
                "pos": [x, y, 0.0],
                "orientation": yaw_quaternion(yaw),
                "accel": [0.1, speed * rate, 9.8],
                "rotation_rate": [0.0, 0.0, rate],
                "vel": [speed, 0.0, 0.0],
            }
        )
        steers.append({"utime": utime, "value": 0.25 + t_s})
    (root / "can_bus").mkdir(exist_ok=True)
    (root / "can_bus" / f"{scene}_pose.json").write_text(json.dumps(poses))
    (root / "can_bus" / f"{scene}_steeranglefeedback.json").write_text(json.dumps(steers))


def write_root(root: Path) -> Path:
    names = "category attribute visibility instance sensor calibrated_sensor ego_pose log scene"
    tables = {n: [] for n in f"{names} sample sample_data sample_annotation map".split()}
    tables["visibility"] = [{"token": str(k), "level": "v"} for k in range(1, 5)]
    for category in {agent[0] for agent in AGENTS.values()}:
        tables["category"].append({"token": token(category), "name": category, "description": ""})
    _sensors(tables)
    for scene, (location, frames, _, _) in SCENES.items():
        tables["log"].append({"token": token("log", scene), "location": location, "logfile": scene})
        tables["scene"].append(
            {
                "token": token(scene),
                "log_token": token("log", scene),
                "nbr_samples": frames,
                "first_sample_token": token(scene, 0),
                "last_sample_token": token(scene, frames - 1),
                "name": scene,
                "description": "a circle",
            }
        )
        for k in range(frames):
            _keyframe(root, tables, scene, k)
        _agents(tables, scene)
        if scene != "scene-0553":  # this one has no CAN bus
            _write_can_bus(root, scene)
        _write_map(root / "maps" / "expansion" / f"{location}.json")
    cv2.imwrite(str(root / "maps" / "base.png"), np.zeros((4, 4), np.uint8))
    tables["map"].append(
        {
            "token": token("map"),
            "category": "semantic_prior",
            "filename": "maps/base.png",
            "log_tokens": [log["token"] for log in tables["log"]],
        }
    )
    (root / "v1.0-mini").mkdir()
    for name, records in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="session")
def circle_root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("circles"))


@pytest.fixture(scope="session")
def circles():
    """The closed forms themselves, for tests that cannot import a conftest."""
    import types

    names = ("token", "ego_pose", "lidar_pose", "agent_xy", "agent_yaw", "map_layers", "write_root")
    return types.SimpleNamespace(
        SCENES=SCENES,
        AGENTS=AGENTS,
        CAMERA_LEAD_S=CAMERA_LEAD_S,
        **{n: globals()[n] for n in names},
    )
