"""nuX's records from the town's truth: what the car does and why, in several wordings.

The recorder's sentences are one wording each; scorers split narration and reasoning at the first
full stop, so that none may stand inside.
"""

from __future__ import annotations

import re

from datamodules.town.phrasing import Dice, pick
from datamodules.town.scene_facts import FrameFacts

NARRATIONS = {
    "the car is standing still": (
        "the car is standing still", "the car is not moving", "the car stands still",
        "the car is waiting",
    ),
    "the car is starting to move": (
        "the car is starting to move", "the car starts to move", "the car is moving off",
        "the car sets off",
    ),
    "the car is braking hard": (
        "the car is braking hard", "the car brakes hard", "the car is braking strongly",
        "the car slows down hard",
    ),
    "the car is slowing down": (
        "the car is slowing down", "the car slows down", "the car is reducing its speed",
        "the car is getting slower",
    ),
    "the car is turning left": (
        "the car is turning left", "the car turns left", "the car is making a left turn",
        "the car is turning to the left",
    ),
    "the car is turning right": (
        "the car is turning right", "the car turns right", "the car is making a right turn",
        "the car is turning to the right",
    ),
    "the car is moving to the left": (
        "the car is moving to the left", "the car moves over to the left",
        "the car is pulling out to the left", "the car swings out to the left",
    ),
    "the car is passing on the left": (
        "the car is passing on the left", "the car passes on the left",
        "the car is driving past on the left", "the car goes by on the left",
    ),
    "the car is moving back to the right": (
        "the car is moving back to the right", "the car moves back to the right",
        "the car is returning to the right", "the car swings back to the right",
    ),
    "the car is following the bend to the left": (
        "the car is following the bend to the left", "the car follows the left bend",
        "the car is going around a left bend", "the car follows the road to the left",
    ),
    "the car is following the bend to the right": (
        "the car is following the bend to the right", "the car follows the right bend",
        "the car is going around a right bend", "the car follows the road to the right",
    ),
    "the car is speeding up": (
        "the car is speeding up", "the car speeds up", "the car is accelerating",
        "the car is getting faster",
    ),
    "the car is driving straight ahead": (
        "the car is driving straight ahead", "the car drives straight on",
        "the car is going straight", "the car keeps going straight ahead",
    ),
}  # fmt: skip
# pattern of the recorder's reason -> wordings; {0} is what the pattern's group holds
REASONS = (
    (r"because the road leads there",
     ("because the road leads there", "because the road goes that way",
      "because the lane leads there", "to follow the road")),
    (r"because the route goes (left|right) at the junction",
     ("because the route goes {0} at the junction", "because its way goes {0} at the junction",
      "because it has to go {0} at the junction", "to go {0} at the junction")),
    (r"because (.+) is behind it",
     ("because {0} is behind it", "because it has passed {0}", "because it is past {0}",
      "because it has gone by {0}")),
    (r"because the (.+) in front is driving on",
     ("because the {0} in front is driving on", "because the {0} ahead drives on",
      "because the {0} in front is moving on", "because the {0} ahead is on the move")),
    (r"because the road bends",
     ("because the road bends", "because of the bend", "because the road is not straight",
      "because there is a bend")),
    (r"because (.+) is in the way",
     ("because {0} is in the way", "because {0} blocks part of the lane", "to pass {0}",
      "because {0} is standing in the lane")),
    (r"because there is a bend to the (left|right) ahead",
     ("because there is a bend to the {0} ahead", "because the road bends to the {0}",
      "because of the {0} bend ahead", "because a bend to the {0} is coming")),
    (r"because of the (.+) in front",
     ("because of the {0} in front", "because of the {0} ahead",
      "because it follows the {0} in front", "to keep its distance from the {0} in front")),
    (r"because the (.+) in front is braking",
     ("because the {0} in front is braking", "because the {0} ahead brakes",
      "because the {0} in front is slowing down", "because the {0} ahead is getting slower")),
    (r"because the (.+) in front is not moving",
     ("because the {0} in front is not moving", "because the {0} ahead stands still",
      "because the {0} in front has stopped", "because the {0} ahead is standing")),
    (r"because the light ahead is (red|yellow|green)",
     ("because the light ahead is {0}", "because the traffic light is {0}",
      "because of the {0} light ahead", "because the light shows {0}")),
    (r"because a pedestrian is crossing the street",
     ("because a pedestrian is crossing the street", "because a pedestrian is on the crossing",
      "because somebody crosses the street", "to let a pedestrian cross")),
    (r"because the road ahead is clear",
     ("because the road ahead is clear", "because the lane ahead is free",
      "because nothing is in the way", "because there is free road ahead")),
)  # fmt: skip


def narrate_keyframe(facts: FrameFacts, dice: Dice) -> dict[str, str]:
    """The nuX record of a key-frame: narration and reasoning."""
    return {
        "narration": pick(dice, NARRATIONS.get(facts.narration, (facts.narration,))),
        "reasoning": reworded(facts.reason, dice),
    }


def reworded(reason: str, dice: Dice) -> str:
    """One of the wordings of a reason; a reason that has none stays as it is."""
    for pattern, wordings in REASONS:
        match = re.fullmatch(pattern, reason)
        if match:
            return _agreeing(pick(dice, wordings).format(*match.groups()))
    return reason


def _agreeing(text: str) -> str:
    """`the road works` are the only obstacle in the plural."""
    for one, many in (("works is", "works are"), ("works blocks", "works block")):
        text = text.replace(one, many)
    return text
