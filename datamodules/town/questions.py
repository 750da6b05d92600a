"""NuScenes-QA's records from the town's truth: five templates, zero or one hop, one-word answers.

A hop is a relation "to the front left of me" or "of the bus": one of six directions, in the car's
axes, as NuScenes-QA's scene graphs have them. Questions are proposed at random and asked only as
long as their answer is not more frequent than the other answers to the same question: what cannot
be seen in the question cannot be guessed from it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.town.phrasing import Dice, article, pick, plural
from datamodules.town.scene_facts import SECTORS, FrameFacts, Thing, sector_of

REACH_M = 40.0  # further things do not count; INFO says so
LARGEST_COUNT = 10
PROPOSALS = 14  # at most, for each question that is asked
ENOUGH = 2  # fair ones to choose from
SHARE_OF_ONE_ANSWER = 0.4  # of all answers to the same question, unless it is yes or no
INFO = {
    "description": "questions on the state of a generated town, in the format of NuScenes-QA",
    "reach_m": REACH_M,
    "directions": "60 degrees each, in the axes of the car; 'me' is LIDAR_TOP",
}
Template = Literal["exist", "count", "object", "status", "comparison"]
# (template, hops) of the questions of one key-frame
PLAN: tuple[tuple[Template, int], ...] = (
    ("exist", 0), ("exist", 1), ("exist", 1), ("count", 0), ("count", 1),
    ("object", 0), ("object", 1), ("object", 1), ("status", 0), ("status", 1), ("status", 1),
    ("comparison", 0), ("comparison", 1),
)  # fmt: skip
STATUSES = {
    "vehicle": ("moving", "stopped", "parked"),
    "rider": ("with rider",),
    "person": ("moving", "standing"),
    "object": (),
}
KINDS = {
    "car": "vehicle", "truck": "vehicle", "bus": "vehicle", "construction vehicle": "vehicle",
    "trailer": "vehicle", "motorcycle": "rider", "bicycle": "rider", "pedestrian": "person",
    "traffic cone": "object", "barrier": "object",
}  # fmt: skip
ASKED_NAMES = ("car", "car", "truck", "bus", "motorcycle", "bicycle", "pedestrian", "pedestrian",
               "traffic cone", "barrier", "construction vehicle", "thing")  # fmt: skip


@dataclass(frozen=True)
class Description:
    """Which things are meant: a class ("thing": any), a status ("": any), a place ("": any)."""

    name: str
    status: str = ""
    sector: str = ""  # one of SECTORS, seen from `of`
    of: str = ""  # "me", or the text of a thing that is alone of its kind

    @property
    def one(self) -> str:
        """`moving car`, `bicycle with rider`."""
        if self.status == "with rider":
            return f"{self.name} with rider"
        return f"{self.status} {self.name}".strip()

    @property
    def many(self) -> str:
        """`moving cars`."""
        if self.status == "with rider":
            return f"{plural(self.name)} with rider"
        return f"{self.status} {plural(self.name)}".strip()

    @property
    def where(self) -> str:
        """` to the front left of me`, starting with a space; empty without a place."""
        return f" to the {self.sector} of {self.of}" if self.sector else ""


@dataclass(frozen=True)
class Question:
    """A question in the abstract, and its answer."""

    template: Template
    hops: int
    asked: tuple[Description, ...]
    answer: str

    @property
    def fine(self) -> tuple[object, ...]:
        """What makes it the same question in other words."""
        return (self.template, self.hops, *self.asked)

    @property
    def coarse(self) -> tuple[object, ...]:
        """The same without places."""
        return (self.template, self.hops, *((d.name, d.status) for d in self.asked))


@dataclass
class Ledger:
    """How often each answer was given to each question of one split."""

    fine: dict[object, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    coarse: dict[object, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    template: dict[object, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def allows(self, question: Question) -> bool:
        """Whether its answer would stay within its share of the answers to this question."""
        yes_no = question.template in ("exist", "comparison")
        share, slack = (0.5, 0.5) if yes_no else (SHARE_OF_ONE_ANSWER, 1.0)
        return all(
            seen[question.answer] + 1 <= share * (seen.total() + 1) + slack
            for seen in (self.fine[question.fine], self.coarse[question.coarse])
        )

    def frequency(self, question: Question) -> int:
        """How often its answer was given to questions of its template."""
        return self.template[question.template, question.hops][question.answer]

    def write(self, question: Question) -> None:
        """Count a question that was asked."""
        self.fine[question.fine][question.answer] += 1
        self.coarse[question.coarse][question.answer] += 1
        self.template[question.template, question.hops][question.answer] += 1


class KeyframeQuestions:
    """Proposes and answers questions about one key-frame."""

    def __init__(self, facts: FrameFacts, dice: Dice) -> None:
        self.dice = dice
        self.things = [thing for thing in facts.things if thing.distance_m <= REACH_M]
        self.single = self._alone()

    def ask(self, ledger: Ledger) -> list[Question]:
        """The questions of PLAN that could be asked without giving their answers away."""
        proposers: dict[Template, Callable[[int], Question | None]] = {
            "exist": self._exist,
            "count": self._count,
            "object": self._object,
            "status": self._status,
            "comparison": self._comparison,
        }
        asked: list[Question] = []
        for template, hops in PLAN:
            fair: list[Question] = []
            for _ in range(PROPOSALS):
                question = proposers[template](hops)
                if question is None or not ledger.allows(question):
                    continue
                if all(question.fine != other.fine for other in asked):
                    fair.append(question)
                if len(fair) == ENOUGH:
                    break
            if fair:
                question = min(fair, key=ledger.frequency)
                ledger.write(question)
                asked.append(question)
        return asked

    def matching(self, wanted: Description) -> list[Thing]:
        """The things that a description fits."""
        found = [
            thing for thing in self.things
            if wanted.name in ("thing", thing.name) and wanted.status in ("", thing.status)
        ]  # fmt: skip
        if not wanted.sector:
            return found
        if wanted.of == "me":
            return [thing for thing in found if thing.sector == wanted.sector]
        origin = self.single[wanted.of]
        return [
            thing for thing in found
            if thing is not origin
            and sector_of(thing.x_m - origin.x_m, thing.y_m - origin.y_m) == wanted.sector
        ]  # fmt: skip

    def _alone(self) -> dict[str, Thing]:
        """Things that a class, or a status and a class, names beyond doubt: text -> thing."""
        groups: dict[str, list[Thing]] = defaultdict(list)
        for thing in self.things:
            groups[f"the {thing.name}"].append(thing)
            if thing.status and thing.status != "with rider":
                groups[f"the {thing.status} {thing.name}"].append(thing)
        return {text: found[0] for text, found in groups.items() if len(found) == 1}

    def _draw(self, hops: int) -> Description:
        """Half the time something that is there, half the time anything."""
        dice = self.dice
        if self.things and dice.uniform() < 0.5:
            thing = dice.choose(self.things)
            name = thing.name if dice.uniform() < 0.8 else "thing"
            status = thing.status if dice.uniform() < 0.5 else ""
            return self._placed(Description(name, status), hops, thing)
        name = pick(dice, ASKED_NAMES)
        choices = STATUSES[KINDS[name]] if name != "thing" else STATUSES["vehicle"]
        status = pick(dice, choices) if choices and dice.uniform() < 0.5 else ""
        return self._placed(Description(name, status), hops, None)

    def _placed(self, wanted: Description, hops: int, thing: Thing | None) -> Description:
        """With a place if a hop is asked for; where `thing` is, if it is given."""
        dice = self.dice
        if hops == 0:
            return wanted
        references = ["me", *(text for text, one in self.single.items() if one is not thing)]
        of = pick(dice, references) if dice.uniform() < 0.5 else "me"
        if thing is None:
            sector = pick(dice, SECTORS)
        elif of == "me":
            sector = thing.sector
        else:
            origin = self.single[of]
            sector = sector_of(thing.x_m - origin.x_m, thing.y_m - origin.y_m)
        return Description(wanted.name, wanted.status, sector, of)

    def _exist(self, hops: int) -> Question:
        wanted = self._draw(hops)
        return Question("exist", hops, (wanted,), "yes" if self.matching(wanted) else "no")

    def _count(self, hops: int) -> Question | None:
        wanted = self._draw(hops)
        count = len(self.matching(wanted))
        if count > LARGEST_COUNT:
            return None
        return Question("count", hops, (wanted,), str(count))

    def _object(self, hops: int) -> Question | None:
        if not self.things:
            return None
        thing = self.dice.choose(self.things)
        status = thing.status if hops == 0 or self.dice.uniform() < 0.5 else ""
        wanted = self._placed(Description("thing", status), hops, thing)
        if (hops == 0 and not status) or len(self.matching(wanted)) != 1:
            return None
        return Question("object", hops, (wanted,), thing.name)

    def _status(self, hops: int) -> Question | None:
        with_status = [thing for thing in self.things if thing.status]
        if not with_status:
            return None
        thing = self.dice.choose(with_status)
        name = thing.name if self.dice.uniform() < 0.7 or hops == 0 else "thing"
        wanted = self._placed(Description(name), hops, thing)
        if len(self.matching(wanted)) != 1:
            return None
        return Question("status", hops, (wanted,), thing.status)

    def _comparison(self, hops: int) -> Question | None:
        """More of one than of the other, or the same status."""
        if self.dice.uniform() < 0.5:
            first, second = self._draw(hops), self._draw(0)
            if first.one == second.one and not hops:
                return None
            more = len(self.matching(first)) > len(self.matching(second))
            return Question("comparison", hops, (first, second), "yes" if more else "no")
        drawn = [thing for thing in self.things if thing.status]
        if len(drawn) < 2:
            return None
        a, b = self.dice.choose(drawn), self.dice.choose(drawn)
        first = self._placed(Description(a.name), hops, a)
        others = [text for text, one in self.single.items() if one is b and text == f"the {b.name}"]
        if a is b or len(self.matching(first)) != 1 or not others or first.of == others[0]:
            return None
        same = Description(b.name, of="same status")
        return Question("comparison", hops, (first, same), "yes" if a.status == b.status else "no")


def worded(question: Question, dice: Dice) -> str:
    """One of the wordings of a question."""
    wanted = question.asked[0]
    one, many, where = wanted.one, wanted.many, wanted.where
    if question.template == "exist":
        options: tuple[str, ...] = (
            f"Are there any {many}{where}?",
            f"Are any {many} visible{where}?",
            f"Is there {article(one)} {one}{where}?",
            f"Can we see any {many}{where}?",
        )
    elif question.template == "count":
        options = (
            f"How many {many} are there{where}?",
            f"How many {many} can be seen{where}?",
            f"What number of {many} are there{where}?",
            f"What is the number of {many}{where}?",
        )
    elif question.template == "object":
        options = (
            f"What is the {one}{where}?",
            f"There is {article(one)} {one}{where}; what is it?",
            f"The {one}{where} is what?",
            f"What kind of thing is the {one}{where}?",
        )
    elif question.template == "status":
        options = (
            f"What is the status of the {one}{where}?",
            f"There is {article(one)} {one}{where}; what is its status?",
            f"In which status is the {one}{where}?",
            f"What status does the {one}{where} have?",
        )
    else:
        options = _compared(wanted, question.asked[1])
    return pick(dice, options)


def _compared(first: Description, second: Description) -> tuple[str, ...]:
    if second.of == "same status":
        a, b = f"the {first.one}{first.where}", f"the {second.one}"
        return (
            f"Is the status of {a} the same as that of {b}?",
            f"Does {a} have the same status as {b}?",
            f"Do {a} and {b} have the same status?",
            f"Is {a} in the same status as {b}?",
        )
    return (
        f"Are there more {first.many}{first.where} than {second.many}?",
        f"Do we see more {first.many}{first.where} than {second.many}?",
        f"Are more {first.many}{first.where} visible than {second.many}?",
        f"Is the number of {first.many}{first.where} larger than that of {second.many}?",
    )


def keyframe_questions(
    facts: FrameFacts, sample_token: str, ledger: Ledger, dice: Dice
) -> list[dict[str, Any]]:
    """NuScenes-QA records of one key-frame; `ledger` is the split's and is written to."""
    return [
        {
            "sample_token": sample_token,
            "question": worded(question, dice),
            "answer": question.answer,
            "template_type": question.template,
            "num_hop": question.hops,
        }
        for question in KeyframeQuestions(facts, dice).ask(ledger)
    ]
