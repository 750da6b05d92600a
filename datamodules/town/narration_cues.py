"""What the ego car is doing and why, in words, at every tick."""

from __future__ import annotations

from collections.abc import Sequence


from datamodules.town.geometry import FloatArray
from datamodules.town.paths import Path

TURN_RAD = 0.42  # heading change over the next seconds that is called a turn
BEND_RAD = 0.16
LOOK_S = 2.5


def narrate(
    path: Path,
    s: FloatArray,
    speed: FloatArray,
    acceleration: FloatArray,
    yaw: FloatArray,
    reasons: Sequence[tuple[str, str]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Narration and reason for each of K ticks; `reasons` are what was strictest for the driver."""
    narration, because = [], []
    for tick in range(len(s)):
        reach = s[tick] + max(4.0, speed[tick] * LOOK_S)
        turned = float(path.heading(reach) - yaw[tick])
        swing = next((name for a, b, name in path.swings if a <= s[tick] < b), None)
        does = _does(float(speed[tick]), float(acceleration[tick]), turned, swing)
        narration.append(does)
        because.append(_why(does, reasons[tick], turned, swing))
    return tuple(narration), tuple(because)


def _does(speed: float, acceleration: float, turned: float, swing: str | None) -> str:
    if speed < 0.25:
        return "the car is starting to move" if acceleration > 0.3 else "the car is standing still"
    if acceleration < -2.0:
        return "the car is braking hard"
    if acceleration < -0.7:
        return "the car is slowing down"
    if turned > TURN_RAD:
        return "the car is turning left"
    if turned < -TURN_RAD:
        return "the car is turning right"
    if swing is not None:
        return "the car is moving to the left"
    if turned > BEND_RAD:
        return "the car is following the bend to the left"
    if turned < -BEND_RAD:
        return "the car is following the bend to the right"
    if acceleration > 0.6:
        return "the car is speeding up"
    return "the car is driving straight ahead"


def _why(does: str, reason: tuple[str, str], turned: float, swing: str | None) -> str:
    kind, subject = reason
    if "turning" in does or "bend" in does:
        return "because the road leads there"
    if does == "the car is moving to the left" and swing is not None:
        return f"because {swing} is in the way"
    texts = {
        "bend": f"because there is a bend to the {'left' if turned > 0 else 'right'} ahead",
        "leader": f"because of the {subject} in front",
        "leader braking": f"because the {subject} in front is braking",
        "leader standing": f"because the {subject} in front is not moving",
        "red light": "because the light ahead is red",
        "yellow light": "because the light ahead is yellow",
        "pedestrian": "because a pedestrian is crossing the street",
        "free": "because the road ahead is clear",
        "mood": "because the road ahead is clear",
    }
    return texts[kind]
