"""Boxes, futures and occupancy against the devkit and closed forms."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes

from datamodules.agents import (
    agent_targets,
    boxes_in_lidar,
    ego_box,
    futures,
    learnable_rows,
    pasts,
    rows_of,
)
from datamodules.index_file import load_index
from datamodules.poses import rotation_matrices
from datamodules.records import without_derived
from odvla.types import DETECTION_CLASSES

NEAR = (-50.0, 50.0, -50.0, 50.0)


def _check_boxes(root, frames):
    devkit = NuScenes("v1.0-mini", str(root), verbose=False)
    index = load_index(root, "v1.0-mini")
    for frame in index.frames[:frames]:
        sample = devkit.get("sample", frame.token)
        _, expected, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        boxes = boxes_in_lidar(index, rows_of(index, frame), frame)
        assert len(boxes) == len(expected)
        for box, other in zip(boxes, expected, strict=True):
            np.testing.assert_allclose(box[:3], other.center, atol=1e-4)
            np.testing.assert_allclose(box[3:6], other.wlh, atol=1e-6)
            forward = other.rotation_matrix[:, 0]
            yaw = math.atan2(forward[1], forward[0])
            assert math.remainder(box[6] - yaw, math.tau) == pytest.approx(0, abs=1e-5)
            velocity = devkit.box_velocity(other.token)
            if np.isfinite(velocity).all():
                expected_velocity = np.linalg.inv(frame.lidar_to_global)[:3, :3] @ velocity
                np.testing.assert_allclose(box[7:9], expected_velocity[:2], atol=1e-4)


def test_boxes_agree_with_the_devkit(circle_root):
    _check_boxes(circle_root, 26)


def test_boxes_agree_with_the_devkit_on_a_real_sample(shared):
    _check_boxes(shared / "data" / "nuscenes-one-sample", 1)


def test_learnable_agents_have_points_a_class_and_are_near(circle_root, circles):
    index = load_index(circle_root, "v1.0-mini")
    targets = agent_targets(index, index.frames[1], NEAR)
    names = [DETECTION_CLASSES[label] for label in targets.labels[0]]
    assert names == ["car", "pedestrian"]  # not the hidden truck, the animal or the far bus
    later = agent_targets(index, index.frames[2], NEAR)
    assert later.track_ids.tolist() == targets.track_ids.tolist()
    other_scene = agent_targets(index, index.frames[10], NEAR)
    assert not set(other_scene.track_ids[0].tolist()) & set(targets.track_ids[0].tolist())


def test_futures_in_the_agents_own_frame(circle_root, circles):
    index = load_index(circle_root, "v1.0-mini")
    frame = index.frames[1]
    positions, mask = futures(index, learnable_rows(index, frame, NEAR))
    # The car drives straight ahead: right 0, forward speed times time.
    speed = math.hypot(3.0, 1.0)
    assert mask[0].all()
    np.testing.assert_allclose(positions[0, :, 0], 0, atol=1e-5)
    np.testing.assert_allclose(positions[0, :, 1], speed * 0.5 * np.arange(1, 7), atol=1e-4)
    # The walker is annotated in key-frames 1, 2, 3 and 6 of the scene.
    assert mask[1].tolist() == [True, True, False, False, True, False]
    yaw = circles.agent_yaw("walker")
    for step in (0, 1, 4):
        x0, y0 = circles.agent_xy("scene-0061", "walker", 0.5)
        x, y = circles.agent_xy("scene-0061", "walker", 0.5 + 0.5 * (step + 1))
        right = (x - x0) * math.sin(yaw) - (y - y0) * math.cos(yaw)
        forward = (x - x0) * math.cos(yaw) + (y - y0) * math.sin(yaw)
        np.testing.assert_allclose(positions[1, step], [right, forward], atol=1e-4)
    assert not positions[1, [2, 3, 5]].any()


def test_pasts_are_what_lies_behind_latest_first(circle_root, circles):
    index = load_index(circle_root, "v1.0-mini")
    frame = index.frames[3]
    rows = learnable_rows(index, frame, NEAR)
    positions, mask = pasts(index, rows)
    speed = math.hypot(3.0, 1.0)
    # The scene begins three key-frames earlier.
    assert mask[0].tolist() == [True, True, True, False]
    np.testing.assert_allclose(positions[0, :3, 1], -speed * 0.5 * np.arange(1, 4), atol=1e-4)
    np.testing.assert_allclose(positions[0, :, 0], 0, atol=1e-5)
    # The walker is annotated from key-frame 1 on.
    assert mask[1].tolist() == [True, True, False, False]
    yaw = circles.agent_yaw("walker")
    x0, y0 = circles.agent_xy("scene-0061", "walker", 1.5)
    x, y = circles.agent_xy("scene-0061", "walker", 0.5)
    right = (x - x0) * math.sin(yaw) - (y - y0) * math.cos(yaw)
    forward = (x - x0) * math.cos(yaw) + (y - y0) * math.sin(yaw)
    np.testing.assert_allclose(positions[1, 1], [right, forward], atol=1e-4)
    assert not positions[~mask].any()
    first = index.frames[0]
    _, nothing = pasts(index, learnable_rows(index, first, NEAR))
    assert not nothing.any()


def test_the_cars_own_box_moves_as_the_car(circle_root, circles):
    index = load_index(circle_root, "v1.0-mini")
    for number, last in ((1, False), (8, True)):
        frame = index.frames[number]
        box = ego_box(index, frame)
        np.testing.assert_allclose(box[:7], [0, 0, 0, 1.73, 4.08, 1.56, math.pi / 2], rtol=1e-6)
        start, end = (index.frames[number + k - last] for k in (0, 1))
        seconds = (end.timestamp_us - start.timestamp_us) * 1e-6
        step = end.ego_to_global[:3, 3] - start.ego_to_global[:3, 3]
        velocity = np.linalg.inv(start.lidar_to_global)[:3, :3] @ step / seconds
        np.testing.assert_allclose(box[7:9], velocity[:2], atol=1e-4)
        assert box[8] > 1  # it drives ahead


def test_the_cars_velocity_is_that_of_the_reference(shared):
    recorded = json.loads((shared / "golden" / "m_sdc_labels.json").read_text())["cases"]
    for case in recorded:
        frames = [_pose_record(number, case) for number in range(len(case["poses"]))]
        box = ego_box(SimpleNamespace(frames=frames), frames[case["index"]])
        np.testing.assert_allclose(box[7:9], case["sdc_velocity_lidar"], atol=1e-3)


def _pose_record(number, case):
    """The part of a FrameRecord that the car's own box needs."""
    pose = case["poses"][number]
    ego_to_global = _transform(pose)
    return SimpleNamespace(
        prev=number - 1,
        next=number + 1 if number + 1 < len(case["poses"]) else -1,
        timestamp_us=pose["timestamp_us"],
        ego_to_global=ego_to_global,
        lidar_to_global=ego_to_global @ _transform(case["lidar2ego"]),
    )


def _transform(record):
    made = np.eye(4)
    made[:3, :3] = rotation_matrices(np.array([record["rotation"]]))[0]
    made[:3, 3] = record["translation"]
    return made


def test_future_turns_right_means_positive_x(circle_root):
    """An agent heading along +y of the world whose next position lies to the east moved right."""
    index = load_index(circle_root, "v1.0-mini")
    data = index.annotations
    row = int(np.flatnonzero(data.next >= 0)[0])
    turned = data.rotation.copy()
    turned[row] = [math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)]
    changed = replace(without_derived(index), annotations=replace(data, rotation=turned))
    move = data.centre[data.next[row]] - data.centre[row]
    positions, _ = futures(changed, np.array([row]))
    np.testing.assert_allclose(positions[0, 0], [move[0], move[1]], atol=1e-5)
