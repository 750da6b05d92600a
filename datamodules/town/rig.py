"""The sensor rig: nuScenes' layout in round numbers.

Ego frame: x forward, y left, z up, origin on the ground under the rear axle. A camera looks along
its z axis, with x to the right and y down; LIDAR_TOP has x to the car's right and y forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyquaternion import Quaternion

FloatArray = NDArray[np.float64]
FULL_SIZE = (1600, 900)
LIDAR_TRANSLATION = (0.943713, 0.0, 1.84023)
# camera -> translation in the ego frame, yaw in degrees (left positive), focal length in pixels at
# 1600 x 900
MOUNTS = {
    "CAM_FRONT": ((1.70, 0.0, 1.51), 0.0, 1266.0),
    "CAM_FRONT_RIGHT": ((1.55, -0.49, 1.50), -56.0, 1266.0),
    "CAM_FRONT_LEFT": ((1.52, 0.49, 1.51), 55.0, 1266.0),
    "CAM_BACK": ((0.03, 0.0, 1.57), 180.0, 796.0),
    "CAM_BACK_LEFT": ((1.04, 0.48, 1.56), 108.0, 1266.0),
    "CAM_BACK_RIGHT": ((1.01, -0.48, 1.56), -110.0, 1266.0),
}


@dataclass(frozen=True)
class Mount:
    """A sensor on the car: where it is and how it is turned, sensor -> ego."""

    translation: FloatArray  # [3] metres
    rotation: FloatArray  # [3, 3]

    @property
    def quaternion(self) -> tuple[float, float, float, float]:
        """Rotation as w, x, y, z, as nuScenes' calibrated_sensor table gives it."""
        w, x, y, z = Quaternion(matrix=self.rotation).elements
        return float(w), float(x), float(y), float(z)

    @property
    def matrix(self) -> FloatArray:
        """Sensor -> ego as [4, 4]."""
        return rigid(self.rotation, self.translation)


@dataclass(frozen=True)
class Rig:
    """Six cameras with intrinsics for one image size, and the lidar."""

    width: int
    height: int
    cameras: dict[str, Mount]
    intrinsics: dict[str, FloatArray]  # [3, 3] pixels
    lidar: Mount

    @staticmethod
    def for_size(width: int, height: int) -> Rig:
        """The rig with intrinsics scaled from 1600 x 900 to (width, height)."""
        cameras, intrinsics = {}, {}
        sx, sy = width / FULL_SIZE[0], height / FULL_SIZE[1]
        for name, (translation, yaw_deg, focal) in MOUNTS.items():
            yaw = np.deg2rad(yaw_deg)
            forward = [np.cos(yaw), np.sin(yaw), 0.0]
            right = [np.sin(yaw), -np.cos(yaw), 0.0]
            rotation = np.array([right, [0.0, 0.0, -1.0], forward]).T
            cameras[name] = Mount(np.array(translation), rotation)
            intrinsics[name] = np.array(
                [
                    [focal * sx, 0.0, FULL_SIZE[0] * sx / 2],
                    [0.0, focal * sy, FULL_SIZE[1] * sy / 2],
                    [0.0, 0.0, 1.0],
                ]
            )
        turned = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        return Rig(width, height, cameras, intrinsics, Mount(np.array(LIDAR_TRANSLATION), turned))

    def global_to_cameras(self, ego: FloatArray) -> dict[str, FloatArray]:
        """[4, 4] from the global frame into each camera, for a car at `ego` [4, 4]."""
        mounts = np.stack([mount.matrix for mount in self.cameras.values()])
        return dict(zip(self.cameras, np.linalg.inv(ego @ mounts), strict=True))


def rigid(rotation: FloatArray, translation: FloatArray) -> FloatArray:
    """[4, 4] from a rotation [3, 3] and a translation [3]."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def ego_to_global(xy: FloatArray, yaw: float) -> FloatArray:
    """[4, 4] of a car on flat ground."""
    c, s = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    return rigid(rotation, np.array([xy[0], xy[1], 0.0]))
