"""LIDAR_TOP by ray casting: ground plane, actors and houses as boxes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from datamodules.town.log import SCENERY, SceneLog
from datamodules.town.rig import FloatArray, Rig, ego_to_global

BEAMS = 32
AZIMUTHS = 270
ELEVATION_DEG = (-30.0, 10.0)
RANGE_M = 70.0
NOISE_M = 0.02
GROUND_INTENSITY, BODY_INTENSITY, HOUSE_INTENSITY = 12.0, 60.0, 30.0


@dataclass(frozen=True)
class LidarScan:
    """One sweep.

    `points` [P, 5] are x, y, z in the LIDAR_TOP frame, intensity, ring: nuScenes' .pcd.bin.
    `hits` counts the points on each actor by id: nuScenes' num_lidar_pts.
    """

    points: NDArray[np.float32]
    hits: dict[int, int]


def scan(log: SceneLog, tick: int, rig: Rig) -> LidarScan:
    """Cast BEAMS x AZIMUTHS rays at a tick; the same scene and tick give the same points."""
    rng = np.random.default_rng([log.seed, log.index, tick, 7])
    pose = ego_to_global(log.ego.track.xy[tick], float(log.ego.track.yaw[tick])) @ rig.lidar.matrix
    origin = pose[:3, 3]
    directions, ring = _rays()
    rays = (directions @ pose[:3, :3].T).astype(np.float32)
    distance = np.where(rays[:, 2] < -1e-6, -origin[2] / np.minimum(rays[:, 2], -1e-6), np.inf)
    owner = np.full(len(rays), -1)
    intensity = np.full(len(rays), GROUND_INTENSITY, np.float32)
    boxes = log.actor_boxes(tick).and_then(log.road.houses).within(RANGE_M, origin[:2])
    centres = np.column_stack([boxes.xy, boxes.size_wlh[:, 2] / 2])
    radii = np.linalg.norm(boxes.size_wlh, axis=1) / 2
    for box, rows in enumerate(_towards(rays, centres - origin, radii)):
        if not len(rows):
            continue
        hit = ray_box_distance(
            origin, rays[rows], centres[box], float(boxes.yaw[box]), boxes.size_wlh[box]
        )
        nearer = hit < distance[rows]
        distance[rows[nearer]] = hit[nearer]
        owner[rows[nearer]] = boxes.id[box]
        is_house = boxes.id[box] == SCENERY
        intensity[rows[nearer]] = HOUSE_INTENSITY if is_house else BODY_INTENSITY
    kept = distance < RANGE_M
    noisy = distance[kept] + rng.normal(0, NOISE_M, int(kept.sum()))
    xyz = directions[kept] * noisy[:, None]
    points = np.column_stack([xyz, intensity[kept], ring[kept]]).astype(np.float32)
    actors, counts = np.unique(owner[kept & (owner >= 0)], return_counts=True)
    return LidarScan(points, dict(zip(actors.tolist(), counts.tolist(), strict=True)))


def ray_box_distance(
    origin: FloatArray, rays: NDArray, centre: FloatArray, yaw: float, size_wlh: FloatArray
) -> FloatArray:
    """Distance [R] along unit rays [R, 3] from `origin` to an upright box; inf where they miss.

    The slab method: a ray is inside the box between the last entry and the first exit of three
    slabs.
    """
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    start = turn @ (origin - centre)
    local = np.ascontiguousarray((rays @ turn.T).T)
    half = np.array([size_wlh[1], size_wlh[0], size_wlh[2]]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (-half - start)[:, None] / local
        second = (half - start)[:, None] / local
    enter = np.minimum(first, second).max(0)
    leave = np.maximum(first, second).min(0)
    return np.where((leave >= enter) & (enter > 0), enter, np.inf)


@cache
def _rays() -> tuple[FloatArray, NDArray[np.float32]]:
    """Unit directions [R, 3] in the LIDAR_TOP frame and the ring of each."""
    elevation = np.deg2rad(np.linspace(*ELEVATION_DEG, BEAMS))
    azimuth = np.linspace(0, 2 * np.pi, AZIMUTHS, endpoint=False)
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    directions = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1)
    rings = np.repeat(np.arange(BEAMS, dtype=np.float32), AZIMUTHS)
    return directions.reshape(-1, 3), rings


def _towards(rays: NDArray, centres: FloatArray, radii_m: FloatArray) -> list[NDArray[np.int64]]:
    """For each sphere around a box the rays that point at it: only these can hit the box."""
    distance = np.linalg.norm(centres, axis=1)
    inside = distance <= radii_m
    ratio = np.divide(radii_m, distance, out=np.ones(len(radii_m)), where=~inside)
    narrowest = np.where(inside, -np.inf, np.sqrt(1 - ratio**2))
    cosines = (centres / distance[:, None]) @ rays.T
    return [np.flatnonzero(row) for row in cosines > narrowest[:, None]]
