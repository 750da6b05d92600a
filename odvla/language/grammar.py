"""What may be written: automata over tokens, so that a generated trajectory always parses.

A trajectory's form is first an automaton over symbols (characters, and tags that are one token).
`compile_grammar` lifts it to the tokens of a vocabulary: from each state, a token is allowed where
all of its characters are, whichever way the tokenizer cuts the text. Greedy decoding then takes the
best of the allowed tokens, and every text it ends is one that `parse_waypoints` reads.

Numbers have two decimals or one, no leading zeros, no minus before zero, and lie in a given range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odvla.errors import UserError
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import DECIMALS, TRAJ_END, TRAJ_START, UNKNOWN
from odvla.types import WAYPOINTS, TensorFields

_WRITABLE = re.compile(rf"[-0-9.,()\[\]{UNKNOWN}]+")
_LARGEST_M = 99.99  # two digits before the point


@dataclass(frozen=True)
class Grammar(TensorFields):
    """A token automaton; columns are the K tokens that are allowed anywhere."""

    token_ids: Tensor  # int64 [K]
    next_state: Tensor  # int64 [states, K]; -1: not allowed there
    start: int

    def accepts(self, ids: Iterable[int]) -> bool:
        """Whether the ids, the end token included, are a whole text of the grammar."""
        column = {token: k for k, token in enumerate(self.token_ids.tolist())}
        state, whole = self.start, False
        for token in ids:
            state = int(self.next_state[state, column[token]]) if token in column else -1
            if state < 0:
                return False
            whole = state == self.end_state
        return whole

    @property
    def end_state(self) -> int:
        """The state behind the end token."""
        return len(self.next_state) - 1


@dataclass(frozen=True)
class Range:
    """Metres that a coordinate may take; zero lies inside."""

    low_m: float = -_LARGEST_M
    high_m: float = _LARGEST_M

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            UserError: zero is not inside, or a bound has three digits before the point.
        """
        if not -_LARGEST_M <= self.low_m <= 0 <= self.high_m <= _LARGEST_M:
            raise UserError(
                f"a coordinate's range must include 0 and lie within +-{_LARGEST_M}, "
                f"not ({self.low_m}, {self.high_m})"
            )


@dataclass
class _Automaton:
    """Deterministic automaton over symbols, built by adding pieces behind a node."""

    decimals: int = DECIMALS
    edges: list[dict[str, int]] = field(default_factory=list)

    def node(self) -> int:
        self.edges.append({})
        return len(self.edges) - 1

    def literal(self, source: int, symbols: Sequence[str], target: int | None = None) -> int:
        """Add a chain of symbols that ends in `target` (a new node where None)."""
        for symbol in symbols[:-1]:
            source = self.edges[source].setdefault(symbol, len(self.edges))
            if source == len(self.edges):
                self.edges.append({})
        end = self.node() if target is None else target
        self.edges[source][symbols[-1]] = end
        return end

    def number(self, source: int, bounds: Range) -> int:
        """Add a number within bounds; returns the node behind its last decimal."""
        end, unit = self.node(), 10**self.decimals
        self._unsigned(source, math.floor(round(bounds.high_m * unit, 6)), end, zero=True)
        lowest = math.floor(round(-bounds.low_m * unit, 6))
        if lowest > 0:
            self._unsigned(self.literal(source, "-"), lowest, end, zero=False)
        return end

    def _unsigned(self, source: int, most: int, end: int, *, zero: bool) -> None:
        """Add zero (unless `zero` is False) to `most` units of the last decimal."""
        unit = 10**self.decimals
        fractions: dict[tuple[int, bool], int] = {}
        for whole in range(most // unit + 1):
            cap = unit - 1 if whole < most // unit else most % unit
            key = (cap, zero or whole > 0)
            if key not in fractions:
                fractions[key] = self._fraction(*key, end)
            self.literal(source, f"{whole}.", fractions[key])

    def _fraction(self, cap: int, zero: bool, end: int) -> int:
        """Add the decimals up to `cap`; returns the node before them."""
        start = self.node()
        if self.decimals == 1:
            for tenths in range(0 if zero else 1, cap + 1):
                self.edges[start][str(tenths)] = end
            return start
        for tens in range(cap // 10 + 1):
            second = self.literal(start, str(tens))
            first_unit = 0 if zero or tens else 1
            last_unit = cap % 10 if tens == cap // 10 else 9
            for unit in range(first_unit, last_unit + 1):
                self.edges[second][str(unit)] = end
        return start


def plan_grammar(
    tokenizer: ChatTokenizer,
    x: Range | None = None,
    y: Range | None = None,
    decimals: int = DECIMALS,
) -> Grammar:
    """Plans as `format_waypoints` writes them.

    Args:
        tokenizer: whose tokens are constrained.
        x: range of the coordinate to the right; None: two digits.
        y: range of the coordinate to the front.
        decimals: of every number.
    """
    return _trajectory_grammar(tokenizer, (x or Range(), y or Range()), decimals, plan=True)


def future_grammar(
    tokenizer: ChatTokenizer,
    x: Range | None = None,
    y: Range | None = None,
    decimals: int = DECIMALS,
) -> Grammar:
    """Futures of agents as `format_future` writes them, unknown points included."""
    return _trajectory_grammar(tokenizer, (x or Range(), y or Range()), decimals, plan=False)


def _trajectory_grammar(
    tokenizer: ChatTokenizer, bounds: tuple[Range, Range], decimals: int, *, plan: bool
) -> Grammar:
    automaton = _Automaton(decimals)
    start = node = automaton.node()
    if plan:
        node = automaton.literal(node, [TRAJ_START])
    node = automaton.literal(node, "[")
    for k in range(WAYPOINTS):
        opened = automaton.literal(node, ",(" if k else "(")
        node = automaton.number(opened, bounds[0])
        node = automaton.number(automaton.literal(node, ","), bounds[1])
        node = automaton.literal(node, ")")
        if not plan:
            automaton.literal(opened, f"{UNKNOWN},{UNKNOWN})", node)
    node = automaton.literal(node, "]")
    if plan:
        node = automaton.literal(node, [TRAJ_END])
    return compile_grammar(automaton, start, node, tokenizer)


def compile_grammar(
    automaton: _Automaton, start: int, end: int, tokenizer: ChatTokenizer
) -> Grammar:
    """Lift an automaton over symbols to the tokens of a vocabulary.

    Args:
        automaton: edges between nodes.
        start: node before the text.
        end: node behind the text, from where only the end token goes on.
        tokenizer: whose tokens are to be used.

    Raises:
        UserError: the vocabulary lacks a character that the grammar needs.
    """
    spelled: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for text, token in tokenizer.tokenizer.get_vocab().items():
        # Byte-level vocabularies spell printable ASCII as itself.
        if text in (TRAJ_START, TRAJ_END):
            spelled.setdefault(text, []).append(((text,), token))
        elif _WRITABLE.fullmatch(text):
            spelled.setdefault(text[0], []).append((tuple(text), token))
    allowed: list[dict[int, int]] = []
    for edges in automaton.edges:
        reached: dict[int, int] = {}
        for symbol in edges:
            if not any(len(symbols) == 1 for symbols, _ in spelled.get(symbol, [])):
                raise UserError(f"the tokenizer has no token for {symbol!r}, which plans need")
            for symbols, token in spelled[symbol]:
                node = _walk(automaton, edges, symbols)
                if node is not None:
                    reached[token] = node
        allowed.append(reached)
    ended = len(allowed)
    allowed[end][tokenizer.end_id] = ended
    # A finished row of a batch may go on being asked; it stays at the end.
    allowed.append({tokenizer.end_id: ended})
    tokens = sorted({token for reached in allowed for token in reached})
    column = {token: k for k, token in enumerate(tokens)}
    next_state = torch.full((len(allowed), len(tokens)), -1)
    for state, reached in enumerate(allowed):
        for token, node in reached.items():
            next_state[state, column[token]] = node
    return Grammar(torch.tensor(tokens), next_state, start)


def _walk(automaton: _Automaton, edges: dict[str, int], symbols: tuple[str, ...]) -> int | None:
    """Node behind a chain of symbols; None where it leaves the automaton."""
    node: int | None = None
    for symbol in symbols:
        node = edges.get(symbol)
        if node is None:
            return None
        edges = automaton.edges[node]
    return node
