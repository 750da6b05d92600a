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
    "trailer": ("vehicle.trailer", (2.4, 8.6, 3.4), 0.05, TRUCK_COLOURS, "trailer"),
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
# category, height, width, colour, colour's name
_PEOPLE = (
    ("adult", 1.78, 0.66, (52, 58, 120), "blue"),
    ("adult", 1.7, 0.66, (150, 44, 44), "red"),
    ("adult", 1.82, 0.7, (40, 40, 44), "black"),
    ("adult", 1.66, 0.62, (196, 186, 160), "white"),
    ("adult", 1.74, 0.66, (58, 110, 66), "green"),
    ("child", 1.28, 0.5, (222, 182, 40), "yellow"),
    ("police_officer", 1.84, 0.7, (24, 34, 84), "blue"),
)
PEDESTRIANS = tuple(
    Body(f"human.pedestrian.{kind}", (width, width, height), colour, colour_name, "pedestrian")
    for kind, height, width, colour, colour_name in _PEOPLE
)
PEOPLE_SHARES = (0.2, 0.18, 0.18, 0.17, 0.17, 0.08, 0.02)
WORKER = Body(
    "human.pedestrian.construction_worker",
    (0.7, 0.7, 1.78),
    (232, 132, 24),
    "orange",
    "construction worker",
)


def pick_person(rng: np.random.Generator) -> Body:
    """Somebody on foot, most often an adult."""
    return PEDESTRIANS[int(rng.choice(len(PEDESTRIANS), p=PEOPLE_SHARES))]


def pick_body(kind: str, rng: np.random.Generator) -> Body:
    """A body of a kind in BODIES with its own size and colour."""
    category, size, spread, colours, name = BODIES[kind]
    scale = 1 + spread * rng.uniform(-1, 1, 3)
    colour_name = str(rng.choice(sorted(colours)))
    width, length, height = (round(float(v * f), 3) for v, f in zip(size, scale, strict=True))
    return Body(category, (width, length, height), colours[colour_name], colour_name, name)
