"""What there is in the town: nuScenes categories with sizes, colours and names."""

from __future__ import annotations

import numpy as np

from datamodules.town.traffic import Body

CAR_COLOURS = {
    "red": (176, 32, 36),
    "white": (232, 232, 230),
    "black": (34, 34, 38),
    "silver": (164, 168, 174),
    "blue": (38, 72, 156),
    "green": (36, 104, 62),
    "yellow": (222, 182, 40),
}
TRUCK_COLOURS = {
    "white": (228, 228, 226),
    "blue": (44, 82, 150),
    "orange": (222, 120, 32),
    "grey": (128, 130, 134),
}
# kind -> (category, (width, length, height), spread of the size, colours, spoken name)
BODIES = {
    "car": ("vehicle.car", (1.88, 4.5, 1.6), 0.06, CAR_COLOURS, "car"),
    "truck": ("vehicle.truck", (2.45, 7.2, 3.1), 0.06, TRUCK_COLOURS, "truck"),
    "bus": ("vehicle.bus.rigid", (2.7, 10.8, 3.3), 0.03, TRUCK_COLOURS, "bus"),
    "motorcycle": ("vehicle.motorcycle", (0.78, 2.1, 1.5), 0.05, CAR_COLOURS, "motorcycle"),
    "bicycle": ("vehicle.bicycle", (0.6, 1.75, 1.6), 0.04, CAR_COLOURS, "bicycle"),
    "construction": (
        "vehicle.construction",
        (2.5, 6.4, 3.0),
        0.05,
        {"yellow": (228, 180, 32)},
        "construction vehicle",
    ),
}
CONE = Body("movable_object.trafficcone", (0.42, 0.42, 0.95), (236, 110, 24), "orange", "cone")
BARRIER = Body("movable_object.barrier", (2.3, 0.55, 1.05), (226, 80, 52), "red", "barrier")
PEDESTRIANS = tuple(
    Body("human.pedestrian.adult", (0.66, 0.7, height), colour, colour_name, "pedestrian")
    for height, colour, colour_name in (
        (1.78, (52, 58, 120), "blue"),
        (1.7, (150, 44, 44), "red"),
        (1.82, (40, 40, 44), "black"),
        (1.66, (196, 186, 160), "white"),
        (1.74, (58, 110, 66), "green"),
    )
)


def pick_body(kind: str, rng: np.random.Generator) -> Body:
    """A body of a kind in BODIES with its own size and colour."""
    category, size, spread, colours, name = BODIES[kind]
    scale = 1 + spread * rng.uniform(-1, 1, 3)
    colour_name = str(rng.choice(sorted(colours)))
    width, length, height = (round(float(v * f), 3) for v, f in zip(size, scale, strict=True))
    return Body(category, (width, length, height), colours[colour_name], colour_name, name)
