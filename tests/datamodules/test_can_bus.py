"""Which CAN message a value is from, in made-up messages and in real ones."""

import json

import numpy as np
import pytest

from datamodules.can_bus import CanBusReader, nearest, pose_vectors
from odvla.errors import UserError


def _poses(times):
    return [
        {"utime": t, "pos": [t, 0, 0], "orientation": [1, 0, 0, 0], "accel": [t + 1, 2, 3],
         "rotation_rate": [4, 5, 6], "vel": [t + 7, 8, 9]}
        for t in times
    ]  # fmt: skip


def test_position_is_of_the_message_before_and_motion_of_the_one_after():
    vectors = pose_vectors(_poses((100, 200, 300)), np.array([50, 200, 299, 999]))
    assert vectors[:, 0].tolist() == [100, 200, 200, 300]
    assert vectors[:, 7].tolist() == [101, 301, 301, 301]
    assert vectors[:, 13].tolist() == [107, 307, 307, 307]
    expected = [100, 0, 0, 1, 0, 0, 0, 101, 2, 3, 4, 5, 6, 107, 8, 9, 0, 0]
    assert vectors[0].tolist() == expected
    assert not pose_vectors([], np.array([50])).any()


@pytest.mark.parametrize("times", [(100, 200, 300), (100,)])
def test_nearest_message(times):
    wanted = np.array([0, 50, 149, 150, 151, 260, 999])
    found = [times[k] for k in nearest(_poses(times), wanted)]
    expected = [min(times, key=lambda t: (abs(t - w), -t)) for w in wanted]
    assert found == expected


def _said(root, kind, content):
    path = root / "can_bus" / f"scene-0061_{kind}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        CanBusReader(root).messages("scene-0061", kind)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("kind", ["pose", "steeranglefeedback"])
def test_files_that_are_no_messages_are_named(tmp_path, kind):
    for content in ("3", "[3]", "{}", "null", "[[]]", '"x"'):
        assert _said(tmp_path, kind, content) == "CAN bus file FILE is not a list of messages"
    for content in ("", "[{", "nope"):
        assert _said(tmp_path, kind, content).startswith("CAN bus file FILE is not JSON: ")


def test_values_that_do_not_fit_are_named(tmp_path):
    for key, value, kind in (
        ("utime", float("nan"), "a whole number"),
        ("pos", [1, 2], "three finite numbers"),
        ("orientation", "x", "four finite numbers"),
        ("accel", [float("nan"), 0, 0], "three finite numbers"),
        ("rotation_rate", None, "three finite numbers"),
        ("vel", 3, "three finite numbers"),
    ):
        poses = _poses((100, 200))
        poses[1][key] = value
        expected = f"message 1 of CAN bus file FILE: {key} {value!r} is not {kind}"
        assert _said(tmp_path, "pose", poses) == expected
        del poses[1][key]
        assert _said(tmp_path, "pose", poses) == f"message 1 of CAN bus file FILE has no {key!r}"
    said = _said(tmp_path, "steeranglefeedback", [{"utime": 3, "value": [1.0]}])
    assert said == "message 0 of CAN bus file FILE: value [1.0] is not a finite number"


def test_values_of_a_real_key_frame(shared):
    """A public fork prints the ego state that GPT-Driver's cache holds for this key-frame.

    Can Bus (-0.74, 0.14), half of the speed 0.95, steering -0.02 (in Boston: not negated).
    """
    root = shared / "data" / "nuscenes-mini-tables"
    samples = json.loads((root / "v1.0-mini" / "sample.json").read_text())
    token = "0a0d6b8c2e884134a3b48df43d54c36a"
    time = next(sample["timestamp"] for sample in samples if sample["token"] == token)
    can = CanBusReader(root).at("scene-0103", np.array([time]))
    assert np.round(can.acceleration[0, :2], 2).tolist() == [-0.74, 0.14]
    assert round(can.speed[0] * 0.5, 2) == 0.95
    assert round(can.velocity[0, 0] * 0.5, 2) == 0.94  # of the message after it
    assert round(2 * can.steering[0] / 2.588, 2) == -0.02
    poses = CanBusReader(root).messages("scene-0103", "pose")
    before = [pose["accel"] for pose in poses if pose["utime"] <= time][-1]
    assert np.round(before[:2], 2).tolist() == [-0.83, 0.14]
