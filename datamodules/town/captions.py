"""TOD3Cap's file from the town's truth: a caption for every annotated object near the car."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from datamodules.town.phrasing import (
    AWAY,
    WHERE,
    Dice,
    a_thing,
    article,
    in_colour,
    motion,
    pick,
    place,
)
from datamodules.town.recorded import RecordedSample
from datamodules.town.scene_facts import FrameFacts, Thing, sector_of

if TYPE_CHECKING:
    from datamodules.town.tokens import TokenIndex

REACH_M = 50.0
OBJECTS_PER_KEYFRAME = 12  # the nearest; keeps the file small
NEIGHBOUR_M = 9.0
# {thing} {where} {away} {motion} {place}; {thing} is "a red car"
SENTENCES = (
    "{thing} {away} {where} is {motion} {place}.",
    "{where}, {away}, {thing} is {motion} {place}.",
    "there is {thing} {place}, {away} {where}. It is {motion}.",
    "{thing} is {motion} {place}. It is {away} {where}.",
    "{where} is {thing} {place}, {away}. It is {motion}.",
)
RELATIONS = (" It is {relation}.", " We see it {relation}.", " Its place is {relation}.",
             " It stands {relation}.")  # fmt: skip


def object_captions(
    facts: FrameFacts, sample: RecordedSample, tokens: TokenIndex, dice: Dice
) -> dict[str, dict[str, Any]]:
    """Records of one key-frame, keyed by annotation token.

    Numbers are in the frame of LIDAR_TOP: offsets and velocities in metres and m/s (x right, y
    forward), `localization_theta` in degrees from straight ahead, right positive. `2d_bbox` is
    (left, top, right, bottom) in pixels of `cam_file`; both are null where no camera sees the box.

    Args:
        facts: what is true.
        sample: the sample's cameras.
        tokens: the town's tokens.
        dice: chooses the words.
    """
    near = [thing for thing in facts.things if thing.distance_m <= REACH_M]
    near = near[:OBJECTS_PER_KEYFRAME]
    if not near:
        return {}
    seen = sample.seen_by([thing.actor for thing in near], facts.keyframe)
    records = {}
    for thing, (cam_file, rectangle) in zip(near, seen, strict=True):
        token = tokens.annotation(facts.scene, facts.keyframe, thing.actor.id)
        records[token] = {
            "sample_token": tokens.sample(facts.scene, facts.keyframe),
            "instance_token": tokens.instance(facts.scene, thing.actor.id),
            **_record(thing, facts, dice),
            "2d_bbox": rectangle,
            "3d_size": [float(edge) for edge in thing.actor.size_wlh],
            "cam_file": cam_file,
        }
    return records


def relation_of(thing: Thing, facts: FrameFacts) -> str:
    """Its nearest neighbour and the side it stands on, in the car's axes; "none" if alone."""
    others = [
        (math.hypot(thing.x_m - other.x_m, thing.y_m - other.y_m), other)
        for other in facts.things
        if other is not thing
    ]
    gap, other = min(others, key=lambda pair: pair[0], default=(math.inf, None))
    if other is None or gap > NEIGHBOUR_M:
        return "none"
    side = sector_of(thing.x_m - other.x_m, thing.y_m - other.y_m)
    return f"to the {side} of {article(other.name)} {other.name}"


def _record(thing: Thing, facts: FrameFacts, dice: Dice) -> dict[str, Any]:
    parts = {
        "thing": in_colour(a_thing(thing)).lower(),
        "away": pick(dice, AWAY).format(round(thing.distance_m)),
        "where": pick(dice, WHERE[thing.sector]),
        "motion": motion(dice, thing),
        "place": place(dice, thing),
    }
    relation = relation_of(thing, facts)
    caption = pick(dice, SENTENCES).format(**parts)
    if relation != "none" and dice.uniform() < 0.4:
        still = RELATIONS if not thing.moving else RELATIONS[:3]
        caption += pick(dice, still).format(relation=relation)
    vx, vy = thing.velocity
    return {
        "attribute_caption": {"attribute_caption": parts["thing"]},
        "depth_caption": {"depth": round(thing.distance_m, 2), "depth_caption": parts["away"]},
        "localization_caption": {
            "localization_caption": parts["where"],
            "x_offset": round(thing.x_m, 2),
            "y_offset": round(thing.y_m, 2),
            "localization_theta": round(math.degrees(math.atan2(thing.x_m, thing.y_m)), 1),
        },
        "motion_caption": {
            "motion_caption": parts["motion"],
            "x_vel": round(vx, 2),
            "y_vel": round(vy, 2),
            "bev_vel": round(thing.speed_mps, 2),
        },
        "map_caption": {"map_caption": parts["place"]},
        "relation_caption": relation,
        "final_caption": in_colour(caption),
    }
