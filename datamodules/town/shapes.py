"""What bodies look like: a few cuboids each, with painted-on windows, lights and stripes.

A shape is given in the unit box of its body: x from -0.5 (rear) to 0.5 (front), y from -0.5 (right)
to 0.5 (left), z from 0 (ground) to 1 (top), so that it fills the annotated box exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
RGB = tuple[int, int, int]

GLASS, TYRE, HEADLIGHT, TAIL_LIGHT = (42, 52, 64), (22, 22, 24), (250, 246, 214), (120, 16, 18)
BRAKE_LIGHT = (255, 36, 30)
SKIN, TROUSERS, WHITE, RED, DARK = (
    (206, 160, 128),
    (46, 46, 58),
    (236, 236, 232),
    (206, 44, 34),
    (40, 40, 42),
)
CARGO = (206, 206, 202)
TRUNK = (92, 68, 46)
# Faces of a cuboid as corners (x, y, z in 0/1), seen from outside counter-clockwise, with their
# normals.
FACES: dict[str, tuple[tuple[tuple[int, int, int], ...], tuple[int, int, int]]] = {
    "front": (((1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)), (1, 0, 0)),
    "back": (((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)), (-1, 0, 0)),
    "left": (((0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)), (0, 1, 0)),
    "right": (((1, 0, 0), (0, 0, 0), (0, 0, 1), (1, 0, 1)), (0, -1, 0)),
    "top": (((0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 0, 1)), (0, 0, 1)),
}


@dataclass(frozen=True)
class Decal:
    """A painted rectangle on a face: u runs along it, v up, both 0 to 1; no colour: brake light."""

    face: str
    u: tuple[float, float]
    v: tuple[float, float]
    colour: RGB | None


@dataclass(frozen=True)
class Part:
    """A cuboid in the unit box; colour None takes the body's own."""

    x: tuple[float, float]
    y: tuple[float, float]
    z: tuple[float, float]
    colour: RGB | None = None
    decals: tuple[Decal, ...] = ()


def _sides(
    *spans: tuple[tuple[float, float], tuple[float, float], RGB | None],
) -> tuple[Decal, ...]:
    """The same decals on the left and on the right."""
    return tuple(Decal(face, u, v, c) for face in ("left", "right") for u, v, c in spans)


_WHEELS = _sides(((0.1, 0.27), (0.0, 0.5), TYRE), ((0.73, 0.9), (0.0, 0.5), TYRE))
_LIGHTS = (
    Decal("front", (0.03, 0.25), (0.5, 0.85), HEADLIGHT),
    Decal("front", (0.75, 0.97), (0.5, 0.85), HEADLIGHT),
    Decal("back", (0.02, 0.3), (0.5, 0.95), None),
    Decal("back", (0.7, 0.98), (0.5, 0.95), None),
)
_TRAILER_WHEELS = _sides(((0.1, 0.2), (0.0, 0.14), TYRE), ((0.22, 0.32), (0.0, 0.14), TYRE))
_TRAILER_LIGHTS = (
    Decal("back", (0.03, 0.2), (0.02, 0.12), None),
    Decal("back", (0.8, 0.97), (0.02, 0.12), None),
)
FULL = (-0.5, 0.5)
SHAPES: dict[str, tuple[Part, ...]] = {
    "vehicle.car": (
        Part(FULL, FULL, (0.0, 0.56), None, (*_WHEELS, *_LIGHTS)),
        Part((-0.42, 0.22), (-0.43, 0.43), (0.56, 0.94), GLASS),
        Part((-0.38, 0.16), (-0.4, 0.4), (0.94, 1.0), None),
    ),
    "vehicle.truck": (
        Part(
            (0.26, 0.5),
            FULL,
            (0.0, 0.82),
            None,
            (*_LIGHTS[:2], Decal("front", (0.06, 0.94), (0.52, 0.9), GLASS)),
        ),
        Part(
            (-0.5, 0.24),
            FULL,
            (0.12, 1.0),
            CARGO,
            (
                *_sides(((0.1, 0.22), (0.0, 0.2), TYRE), ((0.7, 0.82), (0.0, 0.2), TYRE)),
                Decal("back", (0.03, 0.2), (0.02, 0.12), None),
                Decal("back", (0.8, 0.97), (0.02, 0.12), None),
                Decal("back", (0.08, 0.92), (0.18, 0.94), (176, 178, 182)),
            ),
        ),
    ),
    "vehicle.bus.rigid": (
        Part(
            FULL,
            FULL,
            (0.0, 1.0),
            None,
            (
                *_sides(
                    ((0.03, 0.97), (0.45, 0.82), GLASS),
                    ((0.12, 0.22), (0.0, 0.2), TYRE),
                    ((0.76, 0.86), (0.0, 0.2), TYRE),
                ),
                Decal("front", (0.05, 0.95), (0.4, 0.88), GLASS),
                Decal("front", (0.04, 0.2), (0.08, 0.2), HEADLIGHT),
                Decal("front", (0.8, 0.96), (0.08, 0.2), HEADLIGHT),
                Decal("back", (0.1, 0.9), (0.55, 0.88), GLASS),
                Decal("back", (0.03, 0.22), (0.08, 0.24), None),
                Decal("back", (0.78, 0.97), (0.08, 0.24), None),
            ),
        ),
    ),
    "vehicle.construction": (
        Part((-0.5, 0.1), FULL, (0.0, 0.5), TYRE),
        Part(
            (-0.5, 0.05),
            (-0.45, 0.45),
            (0.5, 1.0),
            None,
            (*_sides(((0.2, 0.9), (0.3, 0.9), GLASS)),),
        ),
        Part((0.1, 0.5), (-0.2, 0.2), (0.2, 0.7), None),
    ),
    "vehicle.motorcycle": (
        Part(FULL, (-0.2, 0.2), (0.0, 0.55), DARK, (Decal("back", (0.1, 0.9), (0.6, 0.95), None),)),
        Part((-0.2, 0.12), (-0.5, 0.5), (0.5, 0.86), None),
        Part((-0.12, 0.06), (-0.25, 0.25), (0.86, 1.0), WHITE),
    ),
    "vehicle.bicycle": (
        Part(FULL, (-0.12, 0.12), (0.0, 0.5), DARK),
        Part((-0.2, 0.1), (-0.5, 0.5), (0.5, 0.84), None),
        Part((-0.1, 0.06), (-0.24, 0.24), (0.84, 1.0), SKIN),
    ),
    "human.pedestrian.adult": (
        Part((-0.25, 0.25), (-0.32, 0.32), (0.0, 0.46), TROUSERS),
        Part((-0.34, 0.34), FULL, (0.46, 0.84), None),
        Part((-0.2, 0.2), (-0.2, 0.2), (0.84, 1.0), SKIN),
    ),
    "movable_object.trafficcone": (
        Part(FULL, FULL, (0.0, 0.12), None),
        Part((-0.34, 0.34), (-0.34, 0.34), (0.12, 0.55), None),
        Part((-0.26, 0.26), (-0.26, 0.26), (0.45, 0.68), WHITE),
        Part((-0.16, 0.16), (-0.16, 0.16), (0.68, 1.0), None),
    ),
    "movable_object.barrier": (
        Part(
            FULL,
            FULL,
            (0.0, 1.0),
            WHITE,
            tuple(
                Decal(face, (k / 6, (k + 1) / 6), (0.3, 0.95), RED)
                for face in ("front", "back")
                for k in (0, 2, 4)
            ),
        ),
    ),
    "vehicle.trailer": (
        Part(FULL, FULL, (0.16, 1.0), None, (*_TRAILER_WHEELS, *_TRAILER_LIGHTS)),
        Part((-0.5, 0.5), (-0.3, 0.3), (0.06, 0.16), DARK),
    ),
    "building": (
        Part(
            FULL,
            FULL,
            (0.0, 1.0),
            None,
            tuple(
                Decal(
                    face,
                    (0.08 + 0.3 * k, 0.26 + 0.3 * k),
                    (0.1 + 0.23 * row, 0.24 + 0.23 * row),
                    GLASS,
                )
                for face in ("front", "back", "left", "right")
                for k in range(3)
                for row in range(4)
            ),
        ),
    ),
    "tree": (
        Part((-0.08, 0.08), (-0.08, 0.08), (0.0, 0.4), TRUNK),
        Part(FULL, FULL, (0.35, 0.8), None),
        Part((-0.32, 0.32), (-0.32, 0.32), (0.8, 1.0), None),
    ),
}


@dataclass(frozen=True)
class Mesh:
    """All faces of a shape: quads [n, 4, 3] and normals [n, 3] in the unit box.

    `part` [n] is the cuboid a face belongs to, `colour` [n, 3] its RGB; `own` marks faces in the
    body's colour and `brake` those that light up when it brakes.
    """

    quads: FloatArray
    normals: FloatArray
    part: NDArray[np.int64]
    part_centre: FloatArray  # [parts, 3]
    colour: FloatArray
    own: NDArray[np.bool_]
    brake: NDArray[np.bool_]


@cache
def mesh(kind: str) -> Mesh:
    """The mesh of a shape in SHAPES; decals follow the face they are painted on.

    People of every kind look alike but for their size and colour.
    """
    shape = "human.pedestrian.adult" if kind.startswith("human.") else kind
    quads, normals, part, colours, own, brake, centres = [], [], [], [], [], [], []
    for number, piece in enumerate(SHAPES[shape]):
        low = np.array([piece.x[0], piece.y[0], piece.z[0]])
        size = np.array([piece.x[1], piece.y[1], piece.z[1]]) - low
        centres.append(low + size / 2)
        for face, (corners, normal) in FACES.items():
            quad = low + np.array(corners) * size
            layers: list[tuple[FloatArray, RGB | None, bool]] = [(quad, piece.colour, False)]
            layers += [
                (_on_face(quad, decal), decal.colour or TAIL_LIGHT, decal.colour is None)
                for decal in piece.decals
                if decal.face == face
            ]
            for points, colour, is_brake in layers:
                quads.append(points)
                normals.append(normal)
                part.append(number)
                colours.append(colour or (0, 0, 0))
                own.append(colour is None)
                brake.append(is_brake)
    return Mesh(
        np.array(quads),
        np.array(normals, float),
        np.array(part),
        np.array(centres),
        np.array(colours, float),
        np.array(own),
        np.array(brake),
    )


def _on_face(quad: FloatArray, decal: Decal) -> FloatArray:
    """Corners of a decal on a face whose corners run right along u first, then up."""
    origin, along, up = quad[0], quad[1] - quad[0], quad[3] - quad[0]
    (u0, u1), (v0, v1) = decal.u, decal.v
    return np.array(
        [origin + u * along + v * up for u, v in ((u0, v0), (u1, v0), (u1, v1), (u0, v1))]
    )
