"""Prompts are data: a dialect is a YAML file beside this one, or one of the user's own.

A dialect words what surrounds a record: the system prompt, the slots of the scene's tokens, the
car's state, the request. It is part of a model as weights are: a model trained on one dialect
answers nonsense in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike

from odvla.errors import UserError
from odvla.language.action_bins import ActionBins
from odvla.language.dialect_file import (
    ASKED_LIKE,
    EGO_FIELDS,
    KINDS,
    LABELS,
    TrainingStream,
    Wording,
    fields_of,
    read_wording,
)
from odvla.language.waypoints import (
    DECIMALS,
    PlanForm,
    PlanValues,
    format_number,
    format_waypoints,
)
from odvla.types import HISTORY, EgoState, Turn

__all__ = ["KINDS", "PARTS", "THINKING", "Dialect", "PlanDialect", "answers_of"]
# Parts of a request that an ablation may leave out (the paper's table IV): the fields they tell.
PARTS = {
    "ego": frozenset(EGO_FIELDS),
    "history": frozenset({"history"}),
    "command": frozenset({"command"}),
}


# The requests of a plan that is thought over, in order.
THINKING = ("describe", "decide", "conclude")


@dataclass(frozen=True)
class Dialect:
    """How conversations are worded.

    Args:
        name: "odvla" (for language models that can read), "compact" (for tiny ones), or the path of
            a YAML file.
        without: parts left out of every request, of "ego", "history" and "command".
        labels: what training takes loss on; "": as the dialect has it.

    Raises:
        UserError: there is no such dialect, its file is malformed, or `without` names no part.
    """

    name: str = "odvla"
    without: tuple[str, ...] = ()
    labels: Literal["", "answer_only", "reference"] = ""

    def __post_init__(self) -> None:
        """Read the file now, so that a mistake in it shows at construction."""
        if self.labels and self.labels not in LABELS:
            raise UserError(f"dialect.labels is {' or '.join(LABELS)}, not {self.labels!r}")
        for part in self.without:
            if part not in PARTS:
                raise UserError(f"dialect.without must be some of {', '.join(PARTS)}, not {part!r}")
            if not any(fields_of(line) & PARTS[part] for line in self.wording.lines.values()):
                raise UserError(
                    f"dialect.without names {part!r}, which dialect {self.name!r} does not tell"
                )
        _ = self.wording

    @property
    def has_ego_slot(self) -> bool:
        """Whether a request for a plan has a place for the ego token."""
        lines = [self.wording.lines[name] for name in self.wording.requests["plan"]]
        return any("<EGO>" in line for line in lines if not fields_of(line) & self._hidden)

    @property
    def _hidden(self) -> frozenset[str]:
        """Fields that are not told."""
        return frozenset(field for part in self.without for field in PARTS[part])

    @property
    def wording(self) -> Wording:
        """The texts."""
        return read_wording(self.name)

    @property
    def training(self) -> TrainingStream:
        """How its conversations are cut up for training."""
        stream = self.wording.training
        return replace(stream, labels=self.labels) if self.labels else stream

    def identity(self) -> dict[str, Any]:
        """What a handoff keeps of it: name, parts left out, SHA-256 and content of the file."""
        return {
            "name": self.name,
            "without": sorted(self.without),
            "sha256": self.wording.sha256,
            "content": dict(self.wording.content),
            "plan": self.plan_form.as_meta(),
        }

    def check_same(self, kept: Mapping[str, Any], where: str) -> None:
        """Refuse weights that were trained on other prompts.

        Args:
            kept: `identity()` of the dialect that they were trained on.
            where: what they are called in the message.

        Raises:
            UserError: the texts differ, or the parts left out, or the form of plans.
        """
        own = self.identity()
        if (own["sha256"], own["without"]) == (kept["sha256"], sorted(kept["without"])):
            written = kept.get("plan", own["plan"])
            if written == own["plan"]:
                return
            raise UserError(
                f"{where} has learned to write plans as {_written(written)}, and this experiment "
                f"reads them as {_written(own['plan'])} (stages.planning.actions): plans in "
                "another form are nonsense"
            )
        what = f"dialect {kept['name']!r}" + _left_out(kept["without"])
        mine = f"{self.name!r}" + _left_out(self.without)
        if own["sha256"] != kept["sha256"] and own["name"] == kept["name"]:
            mine += " with other texts"
        raise UserError(
            f"{where} was trained on {what}, and this experiment speaks {mine}: plans under other "
            "prompts are nonsense (--force-dialect, or force_dialect=true, takes them all the same)"
        )

    def turns(
        self, kind: str, answer: str | None, ego: EgoState | None, question: str = ""
    ) -> tuple[Turn, ...]:
        """A conversation of one request and, where it is known, its answer.

        Args:
            kind: one of KINDS.
            answer: None for a request that is still to be answered.
            ego: the car's state, one row; None will do where the request does not tell it.
            question: what is asked, for kinds that ask.

        Raises:
            UserError: an unknown kind, or the request needs an ego state that is not given.
        """
        turns = [Turn("user", self.request(kind, ego, question))]
        if self.wording.system:
            turns.insert(0, Turn("system", self.wording.system))
        if answer is not None:
            turns.append(Turn("assistant", answer))
        return tuple(turns)

    def thinking_turns(
        self, answers: Sequence[str | None], ego: EgoState | None
    ) -> tuple[Turn, ...]:
        """A plan that is thought over first: what is seen, what is to be done, the plan.

        Args:
            answers: those that are known, of the three; behind them stands the next request. None:
                not known, the next request follows at once.
            ego: see `turns`.

        Raises:
            UserError: the dialect has no such requests.
        """
        turns = [Turn("system", self.wording.system)] if self.wording.system else []
        for number, kind in enumerate(THINKING):
            if number <= len(answers):
                turns.append(Turn("user", self.request(kind, ego)))
            answer = answers[number] if number < len(answers) else None
            if answer is not None:
                turns.append(Turn("assistant", answer))
        return tuple(turns)

    def request(self, kind: str, ego: EgoState | None, question: str = "") -> str:
        """The user's message (see `turns`)."""
        requests = self.wording.requests
        chosen = kind if kind in requests else ASKED_LIKE.get(kind, kind)
        if chosen not in requests:
            raise UserError(
                f"dialect {self.name!r} has no request of kind {kind!r}, only {', '.join(requests)}"
            )
        lines = [self.wording.lines[name] for name in requests[chosen]]
        lines = [line for line in lines if not fields_of(line) & self._hidden]
        needed = {field for line in lines for field in fields_of(line)}
        values = {"question": question}
        if needed - {"question"}:
            if ego is None:
                raise UserError(f"a request of kind {kind!r} tells the ego state, which is missing")
            values |= self.ego_fields(ego)
        return "\n".join(line.format(**values) for line in lines)

    def ego_fields(self, ego: EgoState) -> dict[str, str]:
        """What the names in a line's braces stand for, of one row."""
        if len(ego.velocity) != 1:
            raise ValueError(f"one row of ego state makes a prompt, not {len(ego.velocity)}")
        scale = self.wording.scale
        vx, vy = ego.velocity[0].tolist()
        ax, ay = ego.acceleration[0].tolist()
        can_x, can_y = ego.can_accel[0].tolist()
        numbers = {
            "vx": vx * scale["velocity"],
            "vy": vy * scale["velocity"],
            "v_yaw": ego.yaw_rate[0].item(),
            "ax": ax * scale["acceleration"],
            "ay": ay * scale["acceleration"],
            "can_x": can_x,
            "can_y": can_y,
            "speed": ego.heading_speed[0].item() * scale["heading_speed"],
            "steering": ego.steering[0].item(),
        }
        past = ego.history[0]
        if self.wording.plan.values != "points":
            past = torch.diff(past, dim=0, append=past.new_zeros(1, 2))  # up to the car itself
        assert len(past) == HISTORY
        return {
            **{name: self._number(value) for name, value in numbers.items()},
            "history": self._points(past.tolist(), DECIMALS),
            "command": self.wording.commands[int(ego.command[0])],
        }

    @property
    def plan_form(self) -> PlanForm:
        """How plans are written: needed to read them back."""
        return self.wording.plan

    def plan_answer(self, waypoints: ArrayLike, last_step: ArrayLike) -> str:
        """A plan as it is to be answered.

        Args:
            waypoints: [6, 2] metres, lidar frame of t0.
            last_step: [2] metres that the car moved in the 0.5 s before.

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        return format_waypoints(waypoints, self.plan_form, last_step)

    def object_caption_answer(self, caption: str, x_m: float, y_m: float) -> str:
        """An object's caption with its place (LIDAR_TOP frame), as stage 1 has it."""
        return self.wording.caption_object_answer.format(
            caption=caption.strip(),
            x=self._number(x_m, self.plan_form.decimals),
            y=self._number(y_m, self.plan_form.decimals),
        )

    def _points(self, points: list[list[float]], decimals: int) -> str:
        pairs = [f"({self._number(x, decimals)},{self._number(y, decimals)})" for x, y in points]
        return ",".join(pairs)

    def _number(self, value: float, decimals: int = DECIMALS) -> str:
        if self.wording.signed_zero:
            return f"{value:.{decimals}f}"
        return format_number(value, decimals)


def answers_of(turns: Sequence[Turn]) -> list[str | None]:
    """The answer to each request of a conversation; None: it has none."""
    found: list[str | None] = []
    for turn in turns:
        if turn.role == "user":
            found.append(None)
        elif turn.role == "assistant":
            found[-1] = turn.text
    return found


@dataclass(frozen=True)
class PlanDialect(Dialect):
    """A dialect whose plans are written in another form than its file says.

    Prompts stay as they are, so that all that was learned before planning fits.

    Args:
        values: see `PlanForm`.
        bins: of action tokens; None: they are not known yet.
    """

    values: PlanValues = "points"
    bins: ActionBins | None = None

    @property
    def plan_form(self) -> PlanForm:
        """How plans are written."""
        return replace(self.wording.plan, values=self.values, bins=self.bins)


def _written(plan: Mapping[str, str]) -> str:
    form = plan["form"]
    return "action tokens" if form == "tokens" else f"{form} of {plan['decimals']} decimals"


def _left_out(parts: Any) -> str:
    return f" without {', '.join(sorted(parts))}" if parts else ""
