"""Guesses of what a language model will write, to be verified many tokens at a time.

A model that reads its own answer token by token is run once a token, though most tokens of a plan
are no surprise: brackets, commas, points, and the leading digits of a car that drives on. A draft
guesses the rest of the answer; the model reads the guess in one go and says where it would have
written something else. What it would have written is kept, and the draft goes on from there, so the
answer is the one that the model alone would have written (speculative decoding, Leviathan et al.
2023, with one certain draft).

Nobody guesses a decimal. There a draft spreads out: all ten digits are read side by side, as
branches of a tree (SpecInfer, Miao et al. 2024), and the branch that the model takes already knows
its next digit. So a number of two decimals costs one run of the model, where the digits before its
point are as guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from odvla.errors import UserError
from odvla.language.grammar import Grammar
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import (
    TRAJ_END,
    TRAJ_START,
    PlanForm,
    format_number,
)
from odvla.types import WAYPOINTS

MAX_INTEGER_DIGITS = 2  # of what a grammar allows
# Plans of nuScenes take 13.6 runs at 16 tokens and 11.8 at 48. On a GPU wider runs cost little
# more; on a CPU, where arithmetic soon outweighs reading weights, one of 48 costs twice as much as
# one of 16 (docs/decisions.md).
TOKENS_PER_RUN = {"cpu": 16, "gpu": 48}


@dataclass(frozen=True)
class Drafting:
    """How a plan's tokens are guessed; what is written does not depend on it.

    Args:
        guess: "motion" guesses that the car turns and drives on as it did, "none" guesses nothing:
            the model is run once a token, but for tokens that the grammar leaves no choice about.
        tokens_per_run: most tokens that the model reads in one go, of all rows together; each row
            gets its part. About as many as cost little more than one, because the weights must be
            read from memory anyway. 0: TOKENS_PER_RUN of the kind of machine.
        branches: spread out at the first decimal of a number.
    """

    guess: Literal["motion", "none"] = "motion"
    tokens_per_run: int = 0
    branches: bool = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.guess not in ("motion", "none"):
            raise UserError(f"drafting.guess must be motion or none, not {self.guess!r}")
        if self.tokens_per_run < 0:
            raise UserError(
                f"drafting.tokens_per_run must be at least 1, or 0 for a number that suits the "
                f"machine, not {self.tokens_per_run}"
            )

    def width(self, device: str) -> int:
        """Tokens a run on a device of this type."""
        return self.tokens_per_run or TOKENS_PER_RUN["cpu" if device == "cpu" else "gpu"]


@dataclass(frozen=True)
class Proposal:
    """A guess of the tokens to come."""

    tokens: list[int]
    spread: list[bool]  # True: the guess is hardly better than any other token allowed there


class Draft(Protocol):
    """Whatever can guess how a row goes on."""

    def propose(self, ids: Sequence[int]) -> Proposal:
        """Guess what follows the ids written so far."""
        ...


class MotionDraft:
    """Guesses a plan: the car drives on as it did, and then as the plan does that is being written.

    Args:
        tokenizer: cuts the guess into tokens.
        grammar: of the plan; knows the text of each token.
        form: how the plan's numbers are written.
        history: [H, 2] past positions, oldest first, 0.5 s apart, in metres in the frame of the
            plan, without the origin; at least one.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        grammar: Grammar,
        form: PlanForm,
        history: ArrayLike,
    ) -> None:
        self.tokenizer = tokenizer
        self.grammar = grammar
        self.form = form
        past = np.asarray(history, dtype=np.float64)
        self.past = np.concatenate([past, np.zeros((1, 2))])
        self.last_step = -past[-1]
        self._number = re.compile(rf"-?\d+\.\d{{{form.decimals}}}")

    def propose(self, ids: Sequence[int]) -> Proposal:
        """Guess what follows the ids written so far."""
        known = self.grammar.text_of
        written = "".join(known[token] for token in ids)
        text = self.whole_text(written)
        if text is None:
            return Proposal([], [])
        tokens = self.tokenizer.text_ids(text)
        if tokens[: len(ids)] == list(ids):
            tokens = tokens[len(ids) :]
        else:  # the model has cut its text in another way than the tokenizer does
            tokens = self.tokenizer.text_ids(text[len(written) :])
        spread = [False] * len(tokens)
        for place, token in enumerate(tokens):
            spread[place] = written.endswith(".")
            written += known.get(token, "")
        return Proposal([*tokens, self.tokenizer.end_id], [*spread, False])

    def whole_text(self, written: str) -> str | None:
        """A whole plan that begins with what is written; None where there is no telling."""
        done = self._number.findall(written)[: 2 * WAYPOINTS]
        numbers = done + [
            format_number(value, self.form.decimals, signed_zero=self.form.signed_zero)
            for value in self._numbers(done)[len(done) :]
        ]
        if len(done) < 2 * WAYPOINTS:
            behind = written
            for match in self._number.finditer(written):
                behind = written[match.end() :]
            begun = re.search(r"-?\d*\.?\d*$", behind)
            assert begun is not None  # it may be empty
            numbers[len(done)] = self._completed(begun[0], numbers[len(done)])
        points = [f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        text = f"{TRAJ_START}[{','.join(points)}]{TRAJ_END}"
        return text if text.startswith(written) else None

    def _numbers(self, done: Sequence[str]) -> list[float]:
        """All twelve numbers of a plan whose first ones are known."""
        written = np.array([float(number) for number in done])
        whole = len(written) // 2
        path = [*self.past, *self._positions(written[: 2 * whole].reshape(-1, 2))]
        while len(path) < len(self.past) + WAYPOINTS:
            path.append(_next_position(np.array(path[-4:])))
        return self.form.numbers(np.array(path[len(self.past) :]), self.last_step).ravel().tolist()

    def _positions(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.form.positions(numbers, self.last_step) if len(numbers) else numbers

    def _completed(self, begun: str, guess: str) -> str:
        """The number nearest to a guess among those that begin as written."""
        if guess.startswith(begun):
            return guess
        sign, digits = ("-", begun[1:]) if begun.startswith("-") else ("", begun)
        decimals = self.form.decimals
        heads = [digits] if "." in digits else [f"{digits or '0'}."]
        if "." not in digits and digits != "0":
            heads += [f"{digits}{d}." for d in ("09" if digits else "19")]
            if not digits:
                heads.append("99."[-MAX_INTEGER_DIGITS - 1 :])
        ends = []
        for head in heads:
            missing = decimals - len(head.partition(".")[2])
            ends += [head + "0" * missing, head + "9" * missing]
        smallest = f"0.{'0' * (decimals - 1)}1"
        found = [sign + (smallest if sign and float(end) == 0 else end) for end in ends]
        found = [number for number in found if number.startswith(begun)]
        return min(found, key=lambda number: abs(float(number) - float(guess)), default=guess)


def _next_position(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a car is next that turns and drives as it did between its last three positions."""
    step = path[-1] - path[-2] if len(path) > 1 else -path[0]
    if len(path) < 3:
        return path[-1] + step
    before = path[-2] - path[-3]
    # A car that hardly moves has no heading to turn.
    if min(math.hypot(*step), math.hypot(*before)) < 0.5:
        return path[-1] + step
    turn = math.atan2(step[1], step[0]) - math.atan2(before[1], before[0])
    c, s = math.cos(turn), math.sin(turn)
    return path[-1] + np.array([c * step[0] - s * step[1], s * step[0] + c * step[1]])


@dataclass
class TokenTree:
    """Tokens that a row is run on in one go: what it has written, and guesses of what follows.

    Node 0 is the first token; every other node has a parent before it.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # of the grammar, behind each token
    children: list[dict[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.tokens)

    def add(self, token: int, parent: int, state: int) -> int:
        """A node behind another one (-1: the first of all); returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.states.append(state)
        self.children.append({})
        if parent >= 0:
            self.children[parent][token] = len(self.tokens) - 1
        return len(self.tokens) - 1

    def grow(
        self, proposal: Proposal, grammar: Grammar, most: int, deepest: int, *, branches: bool
    ) -> None:
        """Add a proposal behind the last node, as far as the grammar allows it.

        Args:
            proposal: the guess.
            grammar: what is allowed.
            most: nodes that the tree may have.
            deepest: depth that a node may have.
            branches: add all that is allowed beside a guess that is to be spread.
        """
        node = len(self) - 1
        fans: list[int] = []  # nodes whose followers are all to be tried
        for token, spread in zip(proposal.tokens, proposal.spread, strict=True):
            after = grammar.steps[self.states[node]].get(token)
            if after is None or after == grammar.end_state or self.depths[node] >= deepest:
                break
            wide = len(grammar.steps[self.states[node]]) if spread and branches else 1
            if len(self) + sum(len(grammar.steps[self.states[f]]) - 1 for f in fans) + wide > most:
                break
            if spread and branches:
                fans.append(node)
            node = self.add(token, node, after)
        for fan in fans:
            for token, after in grammar.steps[self.states[fan]].items():
                if token not in self.children[fan]:
                    self.add(token, fan, after)
