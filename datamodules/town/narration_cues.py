"""What the ego car is doing and why, in words, at every tick."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.town.geometry import FloatArray
from datamodules.town.paths import RAMP_M, Path

BEND_RAD = 0.16  # heading change over the next seconds that is called a bend
LOOK_S = 2.5
TURN_LEAD_M = 3.0  # a turn is spoken of this far before it


def narrate(
    path: Path,
    s: FloatArray,
    speed: FloatArray,
    acceleration: FloatArray,
    yaw: FloatArray,
    reasons: Sequence[tuple[str, str]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Narration and reason for each of K ticks.

    Args:
        path: of the ego car.
        s: [K] metres along the path.
        speed: [K] m/s.
        acceleration: [K] m/s^2.
        yaw: [K] rad.
        reasons: K pairs of what was strictest for the driver, and which kind of vehicle it was.
    """
    narration, because = [], []
    for tick, at in enumerate(s):
        reach = at + max(4.0, speed[tick] * LOOK_S)
        bend = float(path.heading(reach) - yaw[tick])
        swing, name = _swing(path, float(at))
        turn = next((side for a, b, side in path.turns if a - TURN_LEAD_M <= at < b), None)
        does = _does(float(speed[tick]), float(acceleration[tick]), bend, turn, swing)
        narration.append(f"the car is {does}")
        because.append("because " + _why(does, reasons[tick], bend, name))
    return tuple(narration), tuple(because)


def _swing(path: Path, at_m: float) -> tuple[str | None, str]:
    """The part of a swing around an obstacle that a place lies in, and the obstacle's name."""
    for near, far, name in path.swings:
        if near - RAMP_M <= at_m < near:
            return "moving to the left", name
        if near <= at_m < far:
            return "passing on the left", name
        if far <= at_m < far + 0.7 * RAMP_M:
            return "moving back to the right", name
    return None, ""


def _does(
    speed: float, acceleration: float, bend: float, turn: str | None, swing: str | None
) -> str:
    if speed < 0.25:
        return "starting to move" if acceleration > 0.3 else "standing still"
    if acceleration < -2.0:
        return "braking hard"
    if acceleration < -0.7:
        return "slowing down"
    if turn is not None:
        return f"turning {turn}"
    if swing is not None:
        return swing
    if abs(bend) > BEND_RAD:
        return f"following the bend to the {'left' if bend > 0 else 'right'}"
    return "speeding up" if acceleration > 0.6 else "driving straight ahead"


def _why(does: str, reason: tuple[str, str], bend: float, obstacle: str) -> str:
    kind, vehicle = reason
    if does.startswith("turning"):
        return f"the route goes {does.split()[-1]} at the junction"
    if does.startswith("following"):
        return "the road leads there"
    if does == "moving back to the right":
        return f"{obstacle} is behind it"
    if does in ("moving to the left", "passing on the left"):
        return f"{obstacle} is in the way"
    if does in ("speeding up", "starting to move"):
        # It may still be held back, but what it does now has another cause.
        return f"the {vehicle} in front is driving on" if vehicle else "the road ahead is clear"
    side = "left" if bend > 0 else "right"
    texts = {
        "bend": f"there is a bend to the {side} ahead" if abs(bend) > 0.05 else "the road bends",
        "leader": f"of the {vehicle} in front",
        "leader braking": f"the {vehicle} in front is braking",
        "leader standing": f"the {vehicle} in front is not moving",
        "red light": "the light ahead is red",
        "yellow light": "the light ahead is yellow",
        "pedestrian": "a pedestrian is crossing the street",
    }
    return texts.get(kind, "the road ahead is clear")
