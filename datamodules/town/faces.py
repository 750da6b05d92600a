"""What there is to draw: the painted faces of bodies, scenery and traffic lights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datamodules.town.log import Actor, LightColour, StaticBlock, TrafficLight
from datamodules.town.rig import FloatArray
from datamodules.town.shapes import BRAKE_LIGHT, RGB, mesh

LAMP = {"red": (255, 40, 30), "yellow": (255, 200, 30), "green": (40, 240, 110)}
POLE, BOARD = (70, 70, 72), (30, 30, 32)
KEPT = 512  # bodies; what stands still is drawn at every key-frame


@dataclass(frozen=True)
class Faces:
    """Everything to draw at one moment: n quads in the global frame.

    Attributes:
        quads: [n, 4, 3].
        normals: [n, 3].
        colours: [n, 3] RGB before light and haze.
        bright: [n] True for lamps, which shine by themselves.
        body: [n] number of the body, for the painter's order.
        part_centre: [n, 3] centre of the cuboid a quad belongs to.
        body_centre: [bodies, 3].
        body_radius: [bodies] metres from its centre to its farthest corner.
    """

    quads: FloatArray
    normals: FloatArray
    colours: FloatArray
    bright: NDArray[np.bool_]
    body: NDArray[np.int64]
    part_centre: FloatArray
    body_centre: FloatArray
    body_radius: FloatArray

    def some(self, rows: NDArray) -> Faces:
        """A part of the faces, by a mask [n] or by indices."""
        return replace(
            self,
            quads=self.quads[rows],
            normals=self.normals[rows],
            colours=self.colours[rows],
            bright=self.bright[rows],
            body=self.body[rows],
            part_centre=self.part_centre[rows],
        )

    def of(self, bodies: NDArray[np.bool_]) -> Faces:
        """The faces of some bodies, given as a mask [bodies], in the same order."""
        kept = self.some(np.flatnonzero(bodies[self.body]))
        return replace(
            kept,
            body=(np.cumsum(bodies) - 1)[kept.body],
            body_centre=self.body_centre[bodies],
            body_radius=self.body_radius[bodies],
        )

    def within(self, reach_m: float, of: FloatArray) -> Faces:
        """Those of bodies that are nearer to a point [3] than reach_m, in the same order."""
        return self.of(np.linalg.norm(self.body_centre - of, axis=1) < reach_m)


NO_FACES = Faces(
    quads=np.zeros((0, 4, 3)),
    normals=np.zeros((0, 3)),
    colours=np.zeros((0, 3)),
    bright=np.zeros(0, bool),
    body=np.zeros(0, np.int64),
    part_centre=np.zeros((0, 3)),
    body_centre=np.zeros((0, 3)),
    body_radius=np.zeros(0),
)


def joined(parts: Sequence[Faces]) -> Faces:
    """All faces of all parts, one after the other."""
    parts = parts or [NO_FACES]
    first_body = np.cumsum([0, *(len(part.body_centre) for part in parts)])
    bodies = [part.body + first for part, first in zip(parts, first_body, strict=False)]
    return Faces(
        quads=np.concatenate([p.quads for p in parts]),
        normals=np.concatenate([p.normals for p in parts]),
        colours=np.concatenate([p.colours for p in parts]),
        bright=np.concatenate([p.bright for p in parts]),
        body=np.concatenate(bodies),
        part_centre=np.concatenate([p.part_centre for p in parts]),
        body_centre=np.concatenate([p.body_centre for p in parts]),
        body_radius=np.concatenate([p.body_radius for p in parts]),
    )


def actor_faces(actor: Actor, tick: int) -> Faces:
    """An actor as it is at a tick, brake lights and all."""
    return _kept_body_faces(
        actor.category,
        tuple(actor.track.xy[tick].tolist()),
        float(actor.track.yaw[tick]),
        tuple(actor.size_wlh.tolist()),
        actor.colour,
        BRAKE_LIGHT if actor.braking[tick] else None,
    )


def block_faces(block: StaticBlock) -> Faces:
    """A house or a tree."""
    size_wlh = block.size[[1, 0, 2]]
    return _body_faces(block.kind, block.position, block.yaw, size_wlh, block.colour, None)


def light_faces(light: TrafficLight, t_s: float) -> Faces:
    """A traffic light at a time of the scene."""
    x, y, z = light.position.tolist()
    return _light_faces((x, y, z), light.yaw, light.colour(t_s))


def _body_faces(
    kind: str,
    xy: Sequence[float] | FloatArray,
    yaw: float,
    size_wlh: Sequence[float] | FloatArray,
    colour: RGB,
    brake: RGB | None,
) -> Faces:
    """The mesh of a body in the global frame."""
    shape = mesh(kind)
    scale = np.array([size_wlh[1], size_wlh[0], size_wlh[2]])
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    place = np.array([xy[0], xy[1], 0.0])
    colours = np.where(shape.own[:, None], np.array(colour, float), shape.colour)
    if brake is not None:
        colours[shape.brake] = brake
    quads = (shape.quads * scale) @ turn.T + place
    part_centres = (shape.part_centre * scale) @ turn.T + place
    centre = place + np.array([0, 0, size_wlh[2] / 2])
    return Faces(
        quads=quads,
        normals=shape.normals @ turn.T,
        colours=colours,
        bright=shape.brake & (brake is not None),
        body=np.zeros(len(colours), dtype=np.int64),
        part_centre=part_centres[shape.part],
        body_centre=centre[None],
        body_radius=_radius(quads, centre),
    )


_kept_body_faces = lru_cache(KEPT)(_body_faces)


@lru_cache(KEPT)
def _light_faces(position: tuple[float, float, float], yaw: float, colour: LightColour) -> Faces:
    """A pole and a lamp box, larger than life so that small images show them."""
    x, y, z = position
    forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    left = np.array([-forward[1], forward[0], 0.0])
    up = np.array([0.0, 0.0, 1.0])
    centre = np.array([x, y, z])
    board = [centre + 0.75 * (a * left + b * up) for a, b in ((1, -1), (-1, -1), (-1, 1), (1, 1))]
    lamp = [
        centre + 0.02 * forward + 0.55 * (a * left + b * up)
        for a, b in ((1, -1), (-1, -1), (-1, 1), (1, 1))
    ]
    pole = [
        np.array([x, y, 0]) + a * 0.1 * left + b * up
        for a, b in ((1, 0), (-1, 0), (-1, z - 0.75), (1, z - 0.75))
    ]
    quads = np.array([pole, pole[::-1], board[::-1], board, lamp])
    return Faces(
        quads=quads,
        normals=np.array([forward, -forward, -forward, forward, forward]),
        colours=np.array([POLE, POLE, BOARD, BOARD, LAMP[colour]], float),
        bright=np.array([False, False, False, False, True]),
        body=np.zeros(5, dtype=np.int64),
        part_centre=np.repeat(centre[None], 5, axis=0),
        body_centre=centre[None],
        body_radius=_radius(quads, centre),
    )


def _radius(quads: FloatArray, centre: FloatArray) -> FloatArray:
    return np.linalg.norm(quads - centre, axis=-1).max()[None]
