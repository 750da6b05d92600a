"""CAN bus messages of a scene, in the files that the devkit's NuScenesCanBus reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.town.log import TICK_S, SceneLog
from datamodules.town.rig import FloatArray
from datamodules.town.tables import interpolated, yaw_quaternion

GRAVITY = 9.80665
STEERING_RATIO = 15.0  # steering wheel to road wheels
WHEEL_RPM_PER_MPS = 31.7  # a real message: 265.7 rpm at 30.19 km/h
POSE_HZ, STEERING_HZ, MONITOR_HZ, ZOE_HZ = 50, 100, 2, 20


def can_bus_messages(log: SceneLog) -> dict[str, list[dict[str, Any]]]:
    """Messages of a scene by kind, with nuScenes' field names and units.

    pose: m, m/s, m/s^2 and rad/s, velocity and acceleration in the car's own axes.
    steeranglefeedback: rad at the steering wheel, left positive. vehicle_monitor: km/h, degrees.
        zoe_veh_info: km/h, rpm.
    """
    return {
        "pose": _pose(log),
        "steeranglefeedback": [
            {"utime": utime, "value": round(float(value), 6)}
            for utime, value in zip(
                _utimes(log, STEERING_HZ),
                STEERING_RATIO * interpolated(log.ego.steering, _times(log, STEERING_HZ)),
                strict=True,
            )
        ],
        "vehicle_monitor": _vehicle_monitor(log),
        "zoe_veh_info": _zoe(log),
    }


def write_can_bus(folder: Path, log: SceneLog) -> None:
    """Write one file a kind of message into `folder`."""
    for kind, messages in can_bus_messages(log).items():
        path = folder / f"{log.name}_{kind}.json"
        path.write_text(json.dumps(messages, separators=(",", ":")))


def _times(log: SceneLog, hertz: int) -> FloatArray:
    return np.arange(0, len(log.ego.track.xy) * TICK_S, 1 / hertz)


def _utimes(log: SceneLog, hertz: int) -> list[int]:
    return [round((log.start_time_s + t) * 1e6) for t in _times(log, hertz)]


def _pose(log: SceneLog) -> list[dict[str, Any]]:
    times = _times(log, POSE_HZ)
    track = log.ego.track
    xy, yaw, speed = (interpolated(v, times) for v in (track.xy, track.yaw, track.speed))
    accel, turn = interpolated(log.ego.acceleration, times), interpolated(log.ego.yaw_rate, times)
    return [
        {
            "utime": utime,
            "pos": [round(float(xy[i, 0]), 4), round(float(xy[i, 1]), 4), 0.0],
            "orientation": [round(v, 6) for v in yaw_quaternion(float(yaw[i]))],
            "vel": [round(float(speed[i]), 4), 0.0, 0.0],
            "accel": [round(float(accel[i]), 4), round(float(speed[i] * turn[i]), 4), GRAVITY],
            "rotation_rate": [0.0, 0.0, round(float(turn[i]), 5)],
        }
        for i, utime in enumerate(_utimes(log, POSE_HZ))
    ]


def _motion(
    log: SceneLog, times: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Speed, acceleration, steering wheel angle (rad) and yaw rate at any times."""
    ego = log.ego
    signals = (ego.track.speed, ego.acceleration, STEERING_RATIO * ego.steering, ego.yaw_rate)
    speed, accel, steering, turn = (interpolated(signal, times) for signal in signals)
    return speed, accel, steering, turn


def _vehicle_monitor(log: SceneLog) -> list[dict[str, Any]]:
    times = _times(log, MONITOR_HZ)
    speed, accel, steering, turn = _motion(log, times)
    return [
        {
            "utime": utime,
            "available_distance": 100,
            "battery_level": 80,
            "brake": round(max(0.0, -float(accel[i])), 3),
            "brake_switch": 2 if accel[i] < -0.3 else 1,
            "gear_position": 7,
            "left_signal": int(turn[i] > 0.2),
            "right_signal": int(turn[i] < -0.2),
            "rear_left_rpm": round(WHEEL_RPM_PER_MPS * float(speed[i]), 3),
            "rear_right_rpm": round(WHEEL_RPM_PER_MPS * float(speed[i]), 3),
            "steering": round(float(np.rad2deg(steering[i])), 3),
            "steering_speed": 0.0,
            "throttle": round(max(0.0, float(accel[i])) * 80, 1),
            "vehicle_speed": round(3.6 * float(speed[i]), 3),
            "yaw_rate": round(float(np.rad2deg(turn[i])), 3),
        }
        for i, utime in enumerate(_utimes(log, MONITOR_HZ))
    ]


def _zoe(log: SceneLog) -> list[dict[str, Any]]:
    times = _times(log, ZOE_HZ)
    speed, accel, steering, turn = _motion(log, times)
    wheels = ("FL_wheel_speed", "FR_wheel_speed", "RL_wheel_speed", "RR_wheel_speed")
    return [
        {
            "utime": utime,
            **dict.fromkeys(wheels, round(WHEEL_RPM_PER_MPS * float(speed[i]), 3)),
            "longitudinal_accel": round(float(accel[i]), 3),
            "transversal_accel": round(float(speed[i] * turn[i]), 3),
            "odom": 0,
            "odom_speed": round(3.6 * float(speed[i]), 2),
            "pedal_cc": 0.0,
            "regen": 0.0,
            "meanEffTorque": 0.0,
            "requestedTorqueAfterProc": 0.0,
            "left_solar": 0,
            "right_solar": 0,
            "steer_raw": round(float(np.rad2deg(steering[i])), 3),
            "steer_offset_can": 0.0,
            "steer_corrected": round(float(np.rad2deg(steering[i])), 3),
        }
        for i, utime in enumerate(_utimes(log, ZOE_HZ))
    ]
