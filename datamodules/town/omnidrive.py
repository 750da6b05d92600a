"""OmniDrive's records from the town's truth: description, action, questions, of some key-frames."""

from __future__ import annotations

from typing import Any

from datamodules.town.descriptions import (
    SIDES,
    front_text,
    hazard_text,
    light_text,
    road_text,
    scene_text,
    side_text,
)
from datamodules.town.narration import narrate_keyframe
from datamodules.town.phrasing import Dice, in_colour, pick
from datamodules.town.scene_facts import FrameFacts

EVERY_KEYFRAMES = 4  # files are many and small
PARTS = ("desc", "vqa", "conv", "keywords")


def frame_files(facts: FrameFacts, dice: Dice) -> dict[str, Any]:
    """Content of a key-frame's files by folder; none where it has no files."""
    if facts.keyframe % EVERY_KEYFRAMES:
        return {}
    told = narrate_keyframe(facts, dice)
    does = told["narration"]
    description = " ".join([in_colour(scene_text(facts, dice)), in_colour(road_text(facts, dice))])
    return {
        "keywords": does.removeprefix("the car is ").removeprefix("the car "),
        "desc": {"description": description, "action": f"{_capital(does)} {told['reasoning']}."},
        "vqa": [
            _pair("Which road users or things need attention, and why?", hazard_text(facts, dice)),
            _pair(
                "What is the right thing to do now, and why?",
                f"{does}, {told['reasoning']}.",
            ),
        ],
        "conv": _conversation(facts, dice),
    }


def _conversation(facts: FrameFacts, dice: Dice) -> list[dict[str, str]]:
    side = pick(dice, tuple(SIDES))
    where = "behind the car" if side == "back" else f"on the {side} side"
    pairs = [
        _pair("What is straight ahead?", front_text(facts, dice)),
        _pair(f"What is {where}?", side_text(facts, side, dice)),
    ]
    if facts.light is not None:
        pairs.append(_pair("What does the traffic light show?", light_text(facts, dice)))
    return pairs


def _pair(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": in_colour(answer)}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
