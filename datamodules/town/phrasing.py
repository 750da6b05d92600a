"""Words for things, places and movements, several for each fact, chosen at random.

A text may hold `{with colour|without}`: nuCaption has every answer twice, the second time in words
that a lidar could have found. `in_colour` and `colourless` choose one side of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from datamodules.town.scene_facts import FrameFacts, Thing

_T = TypeVar("_T")
SLOW_MPS, FAST_MPS = 3.0, 8.0
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WHERE = {
    "front": ("in front of us", "ahead of us", "to our front", "straight ahead"),
    "front left": ("to our front left", "ahead on our left", "in front on the left",
                   "on our front left"),
    "front right": ("to our front right", "ahead on our right", "in front on the right",
                    "on our front right"),
    "back": ("behind us", "to our back", "at our back", "in the rear"),
    "back left": ("to our back left", "behind on our left", "in the back on the left",
                  "on our back left"),
    "back right": ("to our back right", "behind on our right", "in the back on the right",
                   "on our back right"),
}  # fmt: skip
AWAY = ("about {} m away", "{} m away", "some {} m from us", "at {} m")
ALIGNED_RAD = 0.6

_CHOICE = re.compile(r"\{([^|{}]*)\|([^|{}]*)\}")
_SENTENCE_START = re.compile(r"(^|[.?] )([a-z])")


class Dice:
    """Random choices from one generator, drawn in blocks: single draws are slow."""

    BLOCK = 4096

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drawn: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._drawn:
            self._drawn = self._rng.random(self.BLOCK).tolist()
        return self._drawn.pop()

    def choose(self, options: Sequence[_T]) -> _T:
        """One of several."""
        return options[int(self.uniform() * len(options))]


def pick(dice: Dice, options: Sequence[str]) -> str:
    """One of several phrasings."""
    return dice.choose(options)


def in_colour(text: str) -> str:
    """The text with its colours, sentences capitalised."""
    return _sentences(_CHOICE.sub(r"\1", text))


def colourless(text: str) -> str:
    """The text without its colours, sentences capitalised."""
    return _sentences(_CHOICE.sub(r"\2", text))


def _sentences(text: str) -> str:
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def article(word: str) -> str:
    """The indefinite article for a word."""
    return "an" if word[0] in "aeiou" else "a"


def plural(name: str) -> str:
    """Plural of one of scene_facts.CLASS_NAMES' values."""
    return f"{name}es" if name == "bus" else f"{name}s"


def counted(count: int, name: str) -> str:
    """`two cars`, `one bus`."""
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number} {name if count == 1 else plural(name)}"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def a_thing(thing: Thing) -> str:
    """`a {red|} car` in markup."""
    colour, name = thing.actor.colour_name, thing.name
    if name == "pedestrian":
        return f"a pedestrian{{ in {colour}|}}"
    return f"{{{article(colour)} {colour}|{article(name)}}} {name}"


def the_thing(thing: Thing) -> str:
    """`the {red |}car` in markup."""
    if thing.name == "pedestrian":
        return f"the pedestrian{{ in {thing.actor.colour_name}|}}"
    return f"the {{{thing.actor.colour_name} |}}{thing.name}"


def motion(dice: Dice, thing: Thing) -> str:
    """What it does, to stand after "is"."""
    if thing.status == "parked":
        return pick(dice, ("parked", "parked", "standing parked"))
    if thing.name in ("traffic cone", "barrier"):
        return pick(dice, ("standing", "set up", "placed", "standing still"))
    if thing.name == "pedestrian":
        if not thing.moving:
            return pick(dice, ("standing", "standing still", "waiting", "not moving"))
        return f"{pick(dice, ('walking', 'moving'))}{direction(dice, thing)}"
    if not thing.moving:
        return pick(dice, ("stopped", "standing still", "not moving", "waiting"))
    if thing.braking:
        return pick(dice, ("braking", "slowing down", "getting slower", "braking now"))
    if thing.speed_mps < SLOW_MPS:
        return f"moving slowly{direction(dice, thing)}"
    pace = " fast" if thing.speed_mps > FAST_MPS else ""
    return f"{pick(dice, ('moving', 'driving'))}{pace}{direction(dice, thing)}"


def direction(dice: Dice, thing: Thing) -> str:
    """Where something moving is headed, seen from the car; starts with a space."""
    turned = thing.heading
    if abs(turned) < ALIGNED_RAD:
        options = (" in our direction", " the same way as us")
    elif abs(turned) > np.pi - ALIGNED_RAD:
        way = " towards us" if thing.y_m > 0 else " away from us"
        options = (way, " in the opposite direction")
    elif turned > 0:
        options = (" to the left", " towards our left")
    else:
        options = (" to the right", " towards our right")
    return pick(dice, options)


def place(dice: Dice, thing: Thing) -> str:
    """Where on the map something is."""
    side = "right" if thing.x_m > 0 else "left"
    if thing.place == "kerb":
        with_us = abs(thing.heading) < ALIGNED_RAD and thing.x_m > 0
        against = abs(thing.heading) > np.pi - ALIGNED_RAD and thing.x_m < 0
        if with_us or against:
            return pick(dice, (f"at the {side} kerb", f"at the kerb on the {side}"))
        return pick(dice, ("at the kerb", "at the side of the road", "by the kerb"))
    if thing.place == "our lane" and thing.y_m < 0:
        return pick(dice, ("in our lane behind us", "behind us in our lane"))
    return pick(dice, PLACES[thing.place])


PLACES = {
    "our lane": ("in our lane", "in the same lane as us", "on our lane", "in the lane we drive in"),
    "left lane": ("in the lane to our left", "in the left lane", "one lane to the left"),
    "right lane": ("in the lane to our right", "in the right lane", "one lane to the right"),
    "oncoming lane": ("in the oncoming lane", "in the opposite lane", "in the lane for oncoming"
                      " traffic"),
    "pavement": ("on the pavement", "on the sidewalk", "on the walkway"),
    "crossing": ("on the pedestrian crossing", "on the crossing", "on the zebra crossing"),
    "junction": ("in the junction", "in the intersection", "inside the junction"),
    "road": ("on the road", "on the street", "on the roadway"),
    "side street": ("on the road", "on the street", "in its lane"),
    "off road": ("beside the road", "off the road", "next to the road"),
}  # fmt: skip


def metres(value: float) -> str:
    """A distance with one decimal."""
    return f"{value:.1f} m"


def who_is_around(facts: FrameFacts, reach_m: float) -> dict[str, int]:
    """How many of each kind are near, the most frequent first."""
    counts: dict[str, int] = {}
    for thing in facts.things:
        if thing.distance_m <= reach_m:
            counts[thing.name] = counts.get(thing.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
