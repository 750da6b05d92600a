"""The form of a trajectory as an automaton over symbols: characters, and tags that are one token.

Built by adding pieces behind a node, then made as small as possible. There are no cycles: no text
of a trajectory is endless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from odvla.errors import UserError
from odvla.language.waypoints import DECIMALS

_LARGEST_M = 99.99  # two digits before the point


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
class Automaton:
    """Deterministic automaton over symbols.

    Args:
        decimals: of every number.
        signed_zero: whether a zero may have a minus.
    """

    decimals: int = DECIMALS
    signed_zero: bool = False
    edges: list[dict[str, int]] = field(default_factory=list)

    def node(self) -> int:
        """A new node."""
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
        if lowest > 0 or self.signed_zero:
            self._unsigned(self.literal(source, "-"), lowest, end, zero=self.signed_zero)
        return end

    def _unsigned(self, source: int, most: int, end: int, *, zero: bool) -> None:
        """Add zero (unless `zero` is False) to `most` units of the last decimal."""
        unit = 10**self.decimals
        fractions: dict[tuple[int, bool], int] = {}
        for whole in range(most // unit + 1):
            cap = unit - 1 if whole < most // unit else most % unit
            key = (cap, zero or whole > 0)
            if key == (0, False):
                continue  # whole and fraction are both zero
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
            first_unit = 0 if zero or tens else 1
            last_unit = cap % 10 if tens == cap // 10 else 9
            if first_unit > last_unit:
                continue
            second = self.literal(start, str(tens))
            for unit in range(first_unit, last_unit + 1):
                self.edges[second][str(unit)] = end
        return start

    def smallest(self, start: int, end: int) -> tuple[list[dict[str, int]], int, int]:
        """The automaton of the same texts with the fewest nodes.

        Nodes from which the same can follow become one, from the end backwards (Revuz 1992).

        Returns:
            Edges, start and end; the end is the last node.
        """
        merged: dict[int, int] = {}
        edges: list[dict[str, int]] = []
        known: dict[tuple[tuple[str, int], ...], int] = {}
        stack = [start]
        while stack:
            node = stack[-1]
            waiting = [after for after in self.edges[node].values() if after not in merged]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if node in merged:
                continue
            followers = {symbol: merged[after] for symbol, after in self.edges[node].items()}
            assert followers or node == end, "a node without a way on"
            key = tuple(sorted(followers.items()))
            if key not in known:
                known[key] = len(edges)
                edges.append(followers)
            merged[node] = known[key]
        # The end was numbered first; turned round, it is last.
        last = len(edges) - 1
        turned = [{s: last - after for s, after in followers.items()} for followers in edges[::-1]]
        return turned, last - merged[start], last - merged[end]
