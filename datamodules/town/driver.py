"""How everyone on wheels drives, the ego car included: speed along a path.

Longitudinal control is the Intelligent Driver Model (Treiber, Hennecke and Helbing, 2000) towards
the strictest of: the speed limit, the curves ahead, the vehicle in front, a light, people on a
crossing. What was strictest is kept, because it is the reason that the captions give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from datamodules.town.geometry import FloatArray
from datamodules.town.paths import STEP_M, Path

COMFORT_BRAKE = 2.6  # m/s^2
HARDEST_BRAKE = 6.0
BEND_BRAKE = 2.2
LATERAL_ACCEL = 3.6  # m/s^2 that people accept in a bend
LOOK_AHEAD_M = 48.0
STANDSTILL_GAP_M = 2.2
HEADWAY_S = 1.2


@dataclass(frozen=True)
class Hold:
    """A reason to stop: the distance from the front bumper to the place, and what it is."""

    gap_m: float
    reason: str


@dataclass(frozen=True)
class Leader:
    """Who is in front: bumper-to-bumper gap and speed along our path."""

    gap_m: float
    speed: float
    braking: bool
    name: str


@dataclass
class Driver:
    """One vehicle on its path; `s` is where its reference point is, `front_m` ahead the bumper."""

    path: Path
    s: float
    speed: float
    front_m: float
    keenness: float = 1.0  # factor on the speed limit
    accel_limit: float = 2.5
    limit_mps: float = 12.5
    # (from, to, speed): moods in which it drives slower than it could
    moods: tuple[tuple[float, float, float], ...] = ()
    acceleration: float = 0.0
    reason: str = "free"
    subject: str = ""
    _allowed: FloatArray | None = field(default=None, repr=False)

    def bend_speed(self) -> float:
        """Speed that still allows to slow down in time for every bend ahead."""
        if self._allowed is None:
            # Backward pass once: from each point, braking gently, the bends ahead can be taken.
            allowed = np.sqrt(LATERAL_ACCEL / np.maximum(np.abs(self.path.curvature), 1e-4))
            ahead = float("inf")
            for i in range(len(allowed) - 1, -1, -1):
                ahead = min(float(allowed[i]), (ahead**2 + 2 * BEND_BRAKE * STEP_M) ** 0.5)
                allowed[i] = ahead
            self._allowed = allowed
        return float(np.interp(self.s + 0.3 * self.speed, self.path.s, self._allowed))

    def mood_speed(self, t_s: float) -> float:
        """Speed wished for at a time, whatever the road allows."""
        for start, end, speed in self.moods:
            if start <= t_s < end:
                return speed
        return float("inf")

    def decide(self, t_s: float, leader: Leader | None, holds: list[Hold]) -> None:
        """Set `acceleration`, and what was strictest."""
        cruise = self.limit_mps * self.keenness
        bend, mood = self.bend_speed(), self.mood_speed(t_s)
        wished = max(0.1, min(cruise, bend, mood))
        best = self.accel_limit * (1 - (self.speed / wished) ** 4)
        reason = "free" if cruise <= min(bend, mood) else "bend" if bend <= mood else "mood"
        best, subject = max(best, -COMFORT_BRAKE if reason != "mood" else -3.2), ""
        if leader is not None:
            towards = self._idm(leader.gap_m, leader.speed)
            if towards < best:
                best, reason, subject = towards, "leader", leader.name
                if leader.braking and leader.gap_m < 25:
                    reason = "leader braking"
                elif leader.speed < 0.3:
                    reason = "leader standing"
        for hold in holds:
            towards = self._idm(hold.gap_m, 0.0)
            if towards < best:
                best, reason, subject = towards, hold.reason, ""
        self.acceleration = min(max(best, -HARDEST_BRAKE), self.accel_limit)
        self.reason, self.subject = reason, subject

    def advance(self, dt_s: float) -> None:
        """Move on by one step; never backwards."""
        before = self.speed
        self.speed = max(0.0, before + self.acceleration * dt_s)
        if self.speed == 0.0:
            self.acceleration = (self.speed - before) / dt_s
        self.s += 0.5 * (before + self.speed) * dt_s

    def _idm(self, gap_m: float, leader_speed: float) -> float:
        """IDM acceleration towards something `gap_m` ahead that moves at `leader_speed`."""
        gap = max(gap_m, 0.1)
        closing = self.speed * (self.speed - leader_speed)
        wanted = STANDSTILL_GAP_M + max(
            0.0,
            self.speed * HEADWAY_S + closing / (2 * math.sqrt(self.accel_limit * COMFORT_BRAKE)),
        )
        cruise = max(0.1, self.limit_mps * self.keenness)
        free = 1 - (self.speed / cruise) ** 4
        return float(self.accel_limit * (free - (wanted / gap) ** 2))
