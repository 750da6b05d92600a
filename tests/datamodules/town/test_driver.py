"""The driver model against closed forms: equilibrium gap, bend speed, stopping places."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.town.driver import (
    COMFORT_BRAKE,
    HARDEST_BRAKE,
    HEADWAY_S,
    LATERAL_ACCEL,
    STANDSTILL_GAP_M,
    Driver,
    Hold,
    Leader,
)
from datamodules.town.geometry import FloatArray
from datamodules.town.paths import Path

DT_S = 0.1


def _path(points: FloatArray) -> Path:
    return Path(points, (0,), np.zeros(1), (), (), ())


def _straight(length_m: float) -> Path:
    x = np.arange(0.0, length_m, 0.5)
    return _path(np.stack([x, np.zeros_like(x)], axis=-1))


def _arc(straight_m: float, radius_m: float) -> Path:
    """A straight along x, then three quarters of a circle to the left."""
    x = np.arange(0.0, straight_m, 0.5)
    turn = np.arange(0.0, 1.5 * np.pi, 0.5 / radius_m)
    circle = np.stack([straight_m + radius_m * np.sin(turn), radius_m * (1 - np.cos(turn))], -1)
    return _path(np.concatenate([np.stack([x, np.zeros_like(x)], -1), circle]))


def test_follows_at_the_equilibrium_gap_of_the_intelligent_driver_model() -> None:
    driver = Driver(_straight(4000), 0.0, 3.0, front_m=3.5)
    leader_s, leader_speed = 60.0, 6.0
    for step in range(3000):
        gap = leader_s - driver.s - driver.front_m
        driver.decide(step * DT_S, Leader(gap, leader_speed, False, "car"), [])
        driver.advance(DT_S)
        leader_s += leader_speed * DT_S
    wanted = STANDSTILL_GAP_M + leader_speed * HEADWAY_S
    expected = wanted / np.sqrt(1 - (leader_speed / driver.limit_mps) ** 4)
    assert driver.speed == pytest.approx(leader_speed, abs=0.02)
    assert leader_s - driver.s - driver.front_m == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("speed", [4.0, 8.0, 11.0])
def test_stops_before_a_hold_without_emergency_braking(speed: float) -> None:
    driver = Driver(_straight(400), 0.0, speed, front_m=3.5)
    hardest = 0.0
    for step in range(400):
        driver.decide(step * DT_S, None, [Hold(48.0 - driver.s - driver.front_m, "red light")])
        hardest = min(hardest, driver.acceleration)
        driver.advance(DT_S)
    assert driver.speed < 0.05
    assert 0 < 48.0 - driver.s - driver.front_m < STANDSTILL_GAP_M + 1.0
    assert hardest > -COMFORT_BRAKE - 1.0
    assert driver.reason == "red light"


@pytest.mark.parametrize("radius_m", [9.0, 15.0, 25.0])
def test_takes_a_bend_at_the_accepted_lateral_acceleration(radius_m: float) -> None:
    driver = Driver(_arc(80.0, radius_m), 0.0, 10.0, front_m=3.5)
    lateral, reasons = [], set()
    while driver.s < driver.path.length_m - 10:
        driver.decide(0.0, None, [])
        driver.advance(DT_S)
        reasons.add(driver.reason)
        if driver.s > 82:
            lateral.append(driver.speed**2 / radius_m)
    assert max(lateral) < 1.3 * LATERAL_ACCEL  # it brakes a moment late, as people do
    assert max(lateral) > 0.75 * LATERAL_ACCEL
    assert "bend" in reasons


def test_acceleration_is_bounded_and_nobody_rolls_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        driver = Driver(_straight(200), 20.0, float(rng.uniform(0, 12)), front_m=3.5)
        leader = Leader(float(rng.uniform(-1, 30)), float(rng.uniform(0, 12)), True, "car")
        before = driver.s
        driver.decide(0.0, leader, [])
        assert -HARDEST_BRAKE <= driver.acceleration <= driver.accel_limit
        driver.advance(DT_S)
        assert driver.s >= before
        assert driver.speed >= 0


def test_reason_names_what_is_strictest() -> None:
    driver = Driver(_straight(400), 0.0, 8.0, front_m=3.5)
    driver.decide(0.0, None, [])
    assert (driver.reason, driver.subject) == ("free", "")
    driver.decide(0.0, Leader(12.0, 0.0, False, "bus"), [Hold(40.0, "red light")])
    assert (driver.reason, driver.subject) == ("leader standing", "bus")
    driver.decide(0.0, Leader(12.0, 2.0, True, "bus"), [Hold(6.0, "red light")])
    assert (driver.reason, driver.subject) == ("red light", "")
