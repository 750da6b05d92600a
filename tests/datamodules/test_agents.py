"""Boxes, futures and occupancy against the devkit and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes

from datamodules.agents import (
    agent_targets,
    boxes_in_lidar,
    futures,
    learnable_rows,
    rows_of,
)
from datamodules.index_file import load_index
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
