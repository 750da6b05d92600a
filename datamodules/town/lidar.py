"""LIDAR_TOP by ray casting: ground plane, actors and houses as boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.town.log import SceneLog
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
    for number, centre, yaw, size_wlh in _boxes(log, tick, origin):
        rows = _towards(rays, centre - origin, float(np.linalg.norm(size_wlh)) / 2)
        if not len(rows):
            continue
        hit = ray_box_distance(origin, rays[rows], centre, yaw, size_wlh)
        nearer = hit < distance[rows]
        distance[rows[nearer]] = hit[nearer]
        owner[rows[nearer]] = number
        intensity[rows[nearer]] = BODY_INTENSITY if number >= 0 else HOUSE_INTENSITY
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
    local = rays @ turn.T
    half = np.array([size_wlh[1], size_wlh[0], size_wlh[2]]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (-half - start) / local
        second = (half - start) / local
    enter = np.minimum(first, second).max(1)
    leave = np.maximum(first, second).min(1)
    return np.where((leave >= enter) & (enter > 0), enter, np.inf)


def _rays() -> tuple[FloatArray, NDArray[np.float32]]:
    """Unit directions [R, 3] in the LIDAR_TOP frame and the ring of each."""
    elevation = np.deg2rad(np.linspace(*ELEVATION_DEG, BEAMS))
    azimuth = np.linspace(0, 2 * np.pi, AZIMUTHS, endpoint=False)
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    directions = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1)
    rings = np.repeat(np.arange(BEAMS, dtype=np.float32), AZIMUTHS)
    return directions.reshape(-1, 3), rings


def _boxes(
    log: SceneLog, tick: int, origin: FloatArray
) -> list[tuple[int, FloatArray, float, FloatArray]]:
    """Everything a ray can hit in range: id (-1 for scenery), centre, yaw, width-length-height."""
    found = []
    for actor in log.actors:
        xy = actor.track.xy[tick]
        if actor.present[tick] and np.linalg.norm(xy - origin[:2]) < RANGE_M:
            centre = np.array([xy[0], xy[1], actor.size_wlh[2] / 2])
            found.append((actor.id, centre, float(actor.track.yaw[tick]), actor.size_wlh))
    for block in log.road.blocks:
        if block.kind == "building" and np.linalg.norm(block.position - origin[:2]) < RANGE_M:
            centre = np.array([*block.position, block.size[2] / 2])
            found.append((-1, centre, block.yaw, block.size[[1, 0, 2]]))
    return found


def _towards(rays: NDArray, centre: FloatArray, radius_m: float) -> NDArray[np.int64]:
    """Rays that point at a sphere around a box: only these can hit it."""
    distance = float(np.linalg.norm(centre))
    if distance <= radius_m:
        return np.arange(len(rays))
    return np.flatnonzero(rays @ (centre / distance) > np.sqrt(1 - (radius_m / distance) ** 2))
