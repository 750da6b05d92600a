"""What crosses package borders checks its shapes."""

import pytest
import torch
from jaxtyping import TypeCheckError

from odvla.types import EgoState

SHAPES = {
    "velocity": (2,),
    "yaw_rate": (),
    "acceleration": (2,),
    "can_accel": (2,),
    "heading_speed": (),
    "steering": (),
    "history": (4, 2),
}


def values(rows=3):
    found = {name: torch.zeros(rows, *shape) for name, shape in SHAPES.items()}
    return {**found, "command": torch.zeros(rows, dtype=torch.int64)}


def test_what_fits_is_made():
    assert EgoState(**values()).history.shape == (3, 4, 2)
    EgoState(*values().values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("velocity", torch.zeros(3, 3)),
        ("history", torch.zeros(3, 4)),
        ("yaw_rate", torch.zeros(2)),  # as long as no other
        ("steering", torch.zeros(3, dtype=torch.int64)),
        ("command", torch.zeros(3)),
        ("can_accel", [[0.0, 0.0]] * 3),
    ],
)
def test_what_does_not_fit_is_named(name, value):
    with pytest.raises(TypeCheckError, match=name):
        EgoState(**values() | {name: value})
