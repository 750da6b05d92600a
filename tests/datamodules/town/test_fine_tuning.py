"""GPT-Driver's lines of the town say what its tables and its cache say, and join."""

import json
from collections import Counter

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion

from datamodules.array_pickles import load_arrays
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.gpt_driver_lines import read_lines
from datamodules.gpt_driver_thoughts import BY_ORDER, SEVERAL
from odvla.language.decisions import meta_action_of
from odvla.language.prompts import Dialect

VERSION = "v1.0-trainval"


@pytest.fixture(scope="module")
def folder(town_root):
    return town_root / "language" / "gpt_driver"


@pytest.fixture(scope="module")
def told(folder):
    """Sample token -> line."""
    tokens = json.loads((folder / "split.json").read_text())["train"]
    return dict(zip(tokens, read_lines(folder / "train.json"), strict=True))


@pytest.fixture(scope="module")
def devkit(town_root):
    return NuScenes(VERSION, str(town_root), verbose=False)


def annotated_path(devkit, annotation, to_lidar):
    """Where an annotation's object is at t0 and at its next annotations, 7 at most, [n, 2]."""
    found = []
    while annotation is not None and len(found) < 7:
        found.append((to_lidar @ [*annotation["translation"], 1])[:2])
        after = annotation["next"]
        annotation = devkit.get("sample_annotation", after) if after else None
    return np.array(found)


def test_objects_are_the_annotated_ones_near_the_car(devkit, told):
    """A slow way over the devkit's tables."""
    seen, unknown = Counter(), 0
    for token, line in told.items():
        sample = devkit.get("sample", token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        pose, mount = (
            transform_matrix(record["translation"], Quaternion(record["rotation"]), inverse=True)
            for record in (
                devkit.get("ego_pose", lidar["ego_pose_token"]),
                devkit.get("calibrated_sensor", lidar["calibrated_sensor_token"]),
            )
        )
        expected = []
        for annotation in (devkit.get("sample_annotation", t) for t in sample["anns"]):
            path = annotated_path(devkit, annotation, mount @ pose)
            if (path[:, 1] <= 0).all() or (np.abs(path) > 20).any():
                continue
            name = annotation["category_name"].split(".")[-1]
            expected.append((name, path[0], path[6] if len(path) == 7 else None))
        assert len(line.objects) == len(expected)
        for name, at, goes_to in expected:
            # (Cones that stand side by side have the same name.)
            nearest = min(line.objects, key=lambda o: np.linalg.norm(np.subtract(o.at, at)))
            assert nearest.name == name
            np.testing.assert_allclose(nearest.at, at, atol=0.006)
            assert (nearest.goes_to is None) == (goes_to is None)
            if goes_to is not None:
                np.testing.assert_allclose(nearest.goes_to, goes_to, atol=0.01)
            unknown += goes_to is None
            seen[name] += 1
    assert len(seen) > 1
    assert 0 < unknown < seen.total()


def test_thoughts_are_of_what_comes_close(folder, told):
    """Slowly, object by object and step by step, from the cache."""
    cache = load_arrays(folder / "cached_nuscenes_info.pkl")
    times = Counter()
    for token, line in told.items():
        info = cache[token]
        lcf, diffs = info["gt_ego_lcf_feat"], info["gt_ego_his_diff"]
        expected = []
        for row, name in enumerate(info["gt_names"]):
            x, y = info["gt_boxes"][row, :2]
            width, length = info["gt_boxes"][row, 3:5]
            path = [(x, y)]
            for dx, dy in info["gt_agent_fut_trajs"][row].reshape(6, 2):
                path.append((path[-1][0] + dx, path[-1][1] + dy))
            if all(b <= 0 for _, b in path) or any(max(abs(a), abs(b)) > 20 for a, b in path):
                continue
            car_x, car_y = 0.0, 0.0
            for step, (a, b) in enumerate(path):
                if step:
                    car_x += lcf[0] / 2 + (step - 1) * (diffs[3, 0] - diffs[2, 0])
                    car_y += lcf[1] / 2 + (step - 1) * (diffs[3, 1] - diffs[2, 1])
                    if not info["gt_agent_fut_masks"][row, step - 1]:
                        continue
                beside = abs(a - car_x) < 0.925 + width / 2 + 1
                if beside and 0 < b - car_y < 2.04 + length / 2 + 3:
                    expected.append((name.split(".")[-1], f"{x:.2f}", f"{y:.2f}", step / 2))
                    times[step] += 1
                    break
        found = [
            (n.name, *(f"{v:.2f}" for v in n.at), float(n.effect.split("-second")[0].split()[-1]))
            for n in line.notable
        ]
        assert [(n, float(x), float(y), t) for n, x, y, t in found] == [
            (n, float(x), float(y), t) for n, x, y, t in expected
        ]
    assert len(times) > 1
    assert 0 < sum(not line.notable for line in told.values()) < len(told)


def test_decisions_are_those_of_the_plans(folder, told):
    cache = load_arrays(folder / "cached_nuscenes_info.pkl")
    for token, line in told.items():
        plan, last = cache[token]["gt_ego_fut_trajs"][1:], cache[token]["gt_ego_his_diff"][-1]
        assert line.decision == meta_action_of(plan, last)
    assert len({line.decision for line in told.values()}) > 5


def test_lines_join_in_order_and_by_their_numbers(town_root, folder, told, tmp_path):
    settings = {"image_size": (16, 9), "conversations_file": "gpt_driver/train.json"}
    dialect = Dialect("reasoning")
    data = GPTDriverConfig(str(town_root), VERSION, **settings).build(None, dialect)
    in_order = {c.sample_token: c for c in data.conversations("train")}
    report = data.join_reports("train")[-1]
    assert (report.joined, report.records, report.how) == (len(told), len(told), BY_ORDER)
    assert list(in_order) == list(told)
    (tmp_path / "gpt_driver").mkdir()
    for name in ("cached_nuscenes_info.pkl", "split.json"):
        (tmp_path / "gpt_driver" / name).symlink_to(folder / name)
    lines = (folder / "train.json").read_text().split("\n")
    (tmp_path / "gpt_driver" / "train.json").write_text("\n".join(lines[::-1]))
    other = GPTDriverConfig(str(town_root), VERSION, language_root=str(tmp_path), **settings)
    data = other.build(None, dialect)
    by_numbers = {c.sample_token: c for c in data.conversations("train")}
    report = data.join_reports("train")[-1]
    assert {part.reason for part in report.left_out} <= {SEVERAL}
    assert report.joined == len(by_numbers) > 0.8 * len(told)
    assert all(in_order[token] == made for token, made in by_numbers.items())
