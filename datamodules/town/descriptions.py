"""nuCaption's records from the town's truth: questions about the scene, answered in sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datamodules.town.phrasing import (
    Dice,
    a_thing,
    colourless,
    counted,
    in_colour,
    listed,
    metres,
    motion,
    pick,
    place,
    the_thing,
    who_is_around,
)
from datamodules.town.scene_facts import FrameFacts, Thing

AROUND_M = 40.0
FREE_M = 25.0  # a lane without a leader this far is called free
NEAR_CROSSING_M = 30.0
SIDES = {
    "left": ("front left", "back left"),
    "right": ("front right", "back right"),
    "back": ("back",),
}
NOTHING_AHEAD = ("nothing is close ahead of us.", "the view ahead is free.",
                 "there are no objects ahead.", "no object is in front of us.")  # fmt: skip
IN_JUNCTION = ("we are in a junction.", "the car is inside a junction.",
               "we drive through a junction.", "we are in an intersection.")  # fmt: skip
QUESTIONS = {
    "scene": (
        "Describe the scene.", "What does the scene around the car look like?",
        "What is going on around the car?", "Give a short description of the scene.",
    ),
    "front": (
        "What is in front of the car?", "Describe the objects ahead of the car.",
        "What can be seen in the front view?", "Which objects are ahead?",
    ),
    "left": (
        "What is on the left of the car?", "Describe the left side.",
        "What can be seen to the left?", "Which objects are on the left side?",
    ),
    "right": (
        "What is on the right of the car?", "Describe the right side.",
        "What can be seen to the right?", "Which objects are on the right side?",
    ),
    "back": (
        "What is behind the car?", "Describe the view to the back.",
        "What can be seen in the back view?", "Which objects are behind the car?",
    ),
    "road": (
        "Describe the road.", "What does the road ahead look like?",
        "How does the street go on?", "What can you say about the road ahead?",
    ),
    "hazards": (
        "What should the car pay attention to?", "Are there any hazards ahead?",
        "What is important for driving now?", "What does the driver have to watch?",
    ),
}  # fmt: skip


def described(facts: FrameFacts, sample_token: str, dice: Dice) -> list[dict[str, Any]]:
    """Records of one key-frame: the scene, the front, one other side, the road, the hazards.

    `answer_lidar` says the same without colours, those of the traffic lights included.
    """
    side = pick(dice, tuple(SIDES))
    answers: list[tuple[str, Callable[[FrameFacts, Dice], str]]] = [
        ("scene", scene_text),
        ("front", front_text),
        (side, lambda facts, dice: side_text(facts, side, dice)),
        ("road", road_text),
        ("hazards", hazard_text),
    ]
    records = []
    for topic, answer in answers:
        text = answer(facts, dice)
        record = {
            "sample_token": sample_token,
            "question": pick(dice, QUESTIONS[topic]),
            "answer": in_colour(text),
            "answer_lidar": colourless(text),
        }
        if topic in ("front", *SIDES):
            record["view"] = topic
        records.append(record)
    return records


def scene_text(facts: FrameFacts, dice: Dice) -> str:
    """What the car does, what is ahead, who is around, the light."""
    does = pick(dice, ("{}.", "{} now.", "at the moment {}.")).format(facts.narration)
    parts = [does, way_text(facts, dice)]
    if facts.light is not None and facts.leader is None:
        parts.append(light_text(facts, dice))
    counts = who_is_around(facts, AROUND_M)
    if counts:
        everyone = listed([counted(count, name) for name, count in counts.items()])
        parts.append(
            pick(dice, ("around us: {}.", "we see {}.", "near the car: {}.", "in view: {}."))
            .format(everyone)
        )  # fmt: skip
    else:
        parts.append(
            pick(dice, ("nobody is around.", "the street is empty.", "we see no traffic."))
        )
    return " ".join(parts)


def way_text(facts: FrameFacts, dice: Dice) -> str:
    """The leader, or that there is none."""
    leader = facts.leader
    if leader is None or leader.ahead_m is None or leader.ahead_m > 2 * FREE_M:
        return pick(
            dice,
            ("no vehicle drives in front of us.", "there is no vehicle ahead in our lane.",
             "no leading vehicle is in our lane.", "our lane has no vehicle ahead."),
        )  # fmt: skip
    form = pick(
        dice,
        ("{0} is {1} {2} ahead in our lane.", "{2} ahead in our lane {0} is {1}.",
         "in our lane {0} is {1}, {2} ahead.", "we have {0} {2} in front of us, it is {1}."),
    )  # fmt: skip
    return form.format(a_thing(leader), motion(dice, leader), metres(leader.ahead_m))


def light_text(facts: FrameFacts, dice: Dice) -> str:
    """The light ahead; without colours only that there is one."""
    assert facts.light is not None
    assert facts.light_ahead_m is not None
    form = pick(
        dice,
        ("{{the light ahead is {0}|there is a traffic light ahead}}, {1} to its stop line.",
         "{1} ahead {{the traffic light is {0}|is a traffic light}}.",
         "{{the traffic light shows {0}|we come to a traffic light}}, it is {1} to the line.",
         "we see {{a {0} light|a traffic light}}, the stop line is {1} ahead."),
    )  # fmt: skip
    return form.format(facts.light, metres(facts.light_ahead_m))


def front_text(facts: FrameFacts, dice: Dice) -> str:
    """Up to three nearest things straight ahead, and the light."""
    ahead = [t for t in facts.things if t.sector == "front" and t.distance_m <= AROUND_M]
    parts = [_thing_text(thing, dice) for thing in ahead[:3]]
    if len(ahead) > 3:
        more = counted(len(ahead) - 3, "more object")
        verb = "is" if len(ahead) == 4 else "are"
        form = pick(
            dice,
            ("further ahead {1} {0}.", "{0} {1} further ahead.", "beyond {1} {0}.",
             "{0} {1} behind them."),
        )  # fmt: skip
        parts.append(form.format(more, verb))
    if not parts:
        parts.append(pick(dice, NOTHING_AHEAD))
    if facts.light is not None:
        parts.append(light_text(facts, dice))
    return " ".join(parts)


def side_text(facts: FrameFacts, side: str, dice: Dice) -> str:
    """How many of each kind are on a side, and the nearest of them."""
    there = [t for t in facts.things if t.sector in SIDES[side] and t.distance_m <= AROUND_M]
    where = "behind us" if side == "back" else f"on the {side}"
    if not there:
        return pick(
            dice,
            ("nothing is {}.", "there is nothing {}.", "we see nobody {}.", "{} it is empty."),
        ).format(where)
    counts: dict[str, int] = {}
    for thing in there:
        counts[thing.name] = counts.get(thing.name, 0) + 1
    everyone = listed([counted(count, name) for name, count in sorted(counts.items())])
    text = pick(dice, ("{1} we see {0}.", "we see {0} {1}.", "{1}: {0}.", "{0} {1}."))
    nearest = there[0]
    second = ""
    if len(there) > 1:
        second = pick(
            dice,
            (" The nearest is {} at {}, {}.", " Closest is {}, {} away, {}.",
             " Next to us is {} at {}, {}.", " The first one is {}, {} from us, {}."),
        ).format(a_thing(nearest), metres(nearest.distance_m), motion(dice, nearest))  # fmt: skip
    else:
        second = pick(
            dice,
            (" It is {0}, {1} away.", " It is {1} away and {0}.", " It is {0} at {1}.",
             " At {1} it is {0}."),
        ).format(motion(dice, nearest), metres(nearest.distance_m))  # fmt: skip
    return text.format(everyone, where) + second


def road_text(facts: FrameFacts, dice: Dice) -> str:
    """Lanes, bends, junction, crossing."""
    lanes = "one lane" if facts.lanes_each_way == 1 else "two lanes"
    parts = [
        pick(
            dice,
            ("the street has {} each way.", "there {verb} {} in each direction.",
             "we are on a street with {} a direction.", "the road has {} for each direction."),
        ).format(lanes, verb="is" if facts.lanes_each_way == 1 else "are")
    ]  # fmt: skip
    if facts.bend:
        parts.append(
            pick(dice, ("it bends to the {}.", "our way bends to the {} ahead.",
                       "ahead it goes to the {}.", "we follow it to the {}.")).format(facts.bend)
        )  # fmt: skip
    elif not facts.in_junction:
        parts.append(pick(dice, ("it goes straight on.", "our way is straight.",
                                "ahead it is straight.", "it runs straight ahead.")))  # fmt: skip
    if facts.in_junction:
        parts.append(pick(dice, IN_JUNCTION))
    elif facts.junction_ahead_m is not None:
        parts.append(
            pick(dice, ("a junction comes after {}.", "there is a junction {} ahead.",
                       "it is {} to the next junction.", "after {} we reach a junction."))
            .format(metres(facts.junction_ahead_m))
        )  # fmt: skip
    if facts.crossing_ahead_m is not None:
        parts.append(_crossing_text(facts.crossing_ahead_m, dice))
    return " ".join(parts)


def hazard_text(facts: FrameFacts, dice: Dice) -> str:
    """Up to two things that matter for the next seconds, the most urgent first."""
    found = [text for text in _hazards(facts, dice) if text]
    if not found:
        return pick(
            dice,
            ("nothing special, the road ahead is clear.", "there is no hazard ahead.",
             "no hazard is close.", "nothing is in our way."),
        )  # fmt: skip
    return " ".join(found[:2])


def _hazards(facts: FrameFacts, dice: Dice) -> list[str]:
    texts = []
    for thing in facts.things:
        on_way = thing.name == "pedestrian" and thing.place in ("crossing", "road")
        if on_way and 0 < thing.y_m < NEAR_CROSSING_M and abs(thing.x_m) < 12:
            texts.append(
                pick(dice, ("{0} is {1} {2}, {3} ahead.", "{3} ahead {0} is {1} {2}.",
                           "watch {0}, {3} ahead, {1} {2}.", "there is {0} {2} at {3}, {1}."))
                .format(a_thing(thing), motion(dice, thing), place(dice, thing), metres(thing.y_m))
            )  # fmt: skip
            break
    leader = facts.leader
    if leader is not None and leader.ahead_m is not None and leader.ahead_m < FREE_M:
        texts.append(
            pick(dice, ("{0} in front is {1}, {2} ahead.",
                        "keep away from {0} {2} ahead, it is {1}.",
                       "watch {0} {2} in front, it is {1}.", "{2} in front {0} is {1}."))
            .format(the_thing(leader), motion(dice, leader), metres(leader.ahead_m))
        )  # fmt: skip
    if facts.light in ("red", "yellow"):
        texts.append(light_text(facts, dice))
    narrowing = [
        t for t in facts.things
        if t.ahead_m is not None and t.ahead_m < FREE_M and t.place in ("kerb", "road")
        and t.name != "pedestrian"
    ]  # fmt: skip
    if narrowing:
        first = min(narrowing, key=lambda thing: thing.ahead_m or 0.0)
        texts.append(
            pick(dice, ("{0} narrows our lane {1} ahead.",
                        "{1} ahead {0} stands partly in our lane.",
                        "we must pass {0} {1} ahead.",
                        "there is {0} at the edge of our lane, {1} ahead."))
            .format(a_thing(first), metres(first.ahead_m or 0.0))
        )  # fmt: skip
    if facts.bend:
        texts.append(
            pick(dice, ("the road bends to the {}.", "a bend to the {} follows.",
                        "mind the bend to the {}.", "we must follow the bend to the {}."))
            .format(facts.bend)
        )  # fmt: skip
    return texts


def _thing_text(thing: Thing, dice: Dice) -> str:
    form = pick(
        dice,
        ("{0} is {1} {2}, {3} away.", "{3} away {0} is {1} {2}.", "{0} {2} is {1}, at {3}.",
         "there is {0} {2} at {3}, {1}."),
    )  # fmt: skip
    return form.format(a_thing(thing), motion(dice, thing), place(dice, thing),
                       metres(thing.distance_m))  # fmt: skip


def _crossing_text(ahead_m: float, dice: Dice) -> str:
    if ahead_m < 1.0:
        return pick(dice, ("we are on a crossing.", "the car is on a crossing.",
                          "we pass a crossing.", "a crossing is right here."))  # fmt: skip
    return pick(
        dice,
        ("a crossing is {} ahead.", "{} ahead is a pedestrian crossing.",
         "there is a crossing after {}.", "we come to a crossing in {}."),
    ).format(metres(ahead_m))  # fmt: skip
