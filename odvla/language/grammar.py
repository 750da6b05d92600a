"""What may be written: automata over tokens, so that a generated trajectory always parses.

A trajectory's form is first an automaton over symbols (characters, and tags that are one token).
`compile_grammar` lifts it to the tokens of a vocabulary: from each state, a token is allowed where
all of its characters are, whichever way the text is cut into tokens. Greedy decoding then takes the
best of the allowed tokens, and every text it ends is one that `parse_waypoints` reads. Plans of
action tokens and answers that are one of a few texts are automata of the same kind.

A tag that the tokenizer has as one token is written as that token; where it has none, the tag is
spelled out like any other text. Vocabularies are byte-level or otherwise spell ASCII as itself; a
byte that is spelled <0x28> is left out, as tokenizers never cut a text that way.

Numbers have two decimals or one, no leading zeros, and lie in a given range. A zero has no minus,
unless the dialect writes one.

For the 151 thousand tokens of Qwen2.5, see docs/decisions.md for how long it takes; the result is
kept as long as its tokenizer, so that it is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from odvla.errors import UserError
from odvla.language.action_bins import DIMENSIONS, action_token
from odvla.language.automaton import Automaton, Range
from odvla.language.tokenizer import ChatTokenizer
from odvla.language.waypoints import DECIMALS, TRAJ_END, TRAJ_START, UNKNOWN
from odvla.types import WAYPOINTS, TensorFields

__all__ = [
    "Grammar",
    "Range",
    "action_grammar",
    "choice_grammar",
    "compile_grammar",
    "future_grammar",
    "plan_grammar",
]


@dataclass(frozen=True)
class Grammar(TensorFields):
    """A token automaton; columns are the K tokens that are allowed anywhere, in rising order."""

    token_ids: Tensor  # int64 [K]
    next_state: Tensor  # int64 [states, K]; -1: not allowed there
    start: int
    texts: tuple[str, ...]  # [K] what each token adds to the text; "" for the end token

    def accepts(self, ids: Iterable[int]) -> bool:
        """Whether the ids, the end token included, are a whole text of the grammar."""
        state = self.start
        for token in ids:
            after = self.steps[state].get(token)
            if after is None:
                return False
            state = after
        return state == self.end_state

    @property
    def end_state(self) -> int:
        """The state behind the end token."""
        return len(self.next_state) - 1

    @cached_property
    def steps(self) -> list[dict[int, int]]:
        """For each state, the tokens allowed and the states they lead to."""
        tokens = self.token_ids.tolist()
        return [
            {tokens[column]: after for column, after in enumerate(row) if after >= 0}
            for row in self.next_state.tolist()
        ]

    @cached_property
    def text_of(self) -> dict[int, str]:
        """What a token adds to the text."""
        return dict(zip(self.token_ids.tolist(), self.texts, strict=True))

    def forced(self, state: int) -> list[int]:
        """Tokens that follow because nothing else may; up to the end token."""
        found: list[int] = []
        while state != self.end_state and len(self.steps[state]) == 1:
            token, state = next(iter(self.steps[state].items()))
            found.append(token)
        return found


def plan_grammar(
    tokenizer: ChatTokenizer,
    x: Range | None = None,
    y: Range | None = None,
    decimals: int = DECIMALS,
    *,
    signed_zero: bool = False,
) -> Grammar:
    """Plans as `format_waypoints` writes them.

    Args:
        tokenizer: whose tokens are constrained.
        x: range of the coordinate to the right; None: two digits.
        y: range of the coordinate to the front.
        decimals: of every number.
        signed_zero: whether -0.00 may be written, as in the released dialect.
    """
    form = (x or Range(), y or Range(), decimals, signed_zero, True)
    return _trajectory_grammar(tokenizer, form)


def future_grammar(
    tokenizer: ChatTokenizer,
    x: Range | None = None,
    y: Range | None = None,
    decimals: int = DECIMALS,
    *,
    signed_zero: bool = False,
) -> Grammar:
    """Futures of agents as `format_future` writes them, unknown points included."""
    form = (x or Range(), y or Range(), decimals, signed_zero, False)
    return _trajectory_grammar(tokenizer, form)


def action_grammar(tokenizer: ChatTokenizer) -> Grammar:
    """Plans of action tokens: twelve of them, and then the end.

    Raises:
        UserError: the tokenizer has no action tokens.
    """
    actions = tokenizer.action_ids
    if not actions:
        raise UserError(
            "the tokenizer has no action tokens: train the stages before planning with "
            "tokenizer.action_tokens=256"
        )

    def compiled() -> Grammar:
        automaton = Automaton()
        start = node = automaton.node()
        for _ in range(DIMENSIONS):
            after = automaton.node()
            for number in range(len(actions)):
                automaton.literal(node, [action_token(number)], after)
            node = after
        vocabulary = tokenizer.tokenizer.get_vocab()
        return compile_grammar(automaton, start, node, vocabulary, tokenizer.end_id)

    return _kept(tokenizer, "actions", compiled)


def choice_grammar(tokenizer: ChatTokenizer, texts: tuple[str, ...]) -> Grammar:
    """One of some texts.

    Args:
        tokenizer: whose tokens are constrained.
        texts: at least one; none is the beginning of another.
    """
    for text in texts:
        if any(other != text and other.startswith(text) for other in texts):
            raise ValueError(f"{text!r} is the beginning of another choice")

    def compiled() -> Grammar:
        vocabulary = tokenizer.tokenizer.get_vocab()
        space = next((s for s in SPACES if s in vocabulary), " ")
        automaton = Automaton()
        start, end = automaton.node(), automaton.node()
        for text in texts:
            automaton.literal(start, text.replace(" ", space), end)
        return compile_grammar(automaton, start, end, vocabulary, tokenizer.end_id)

    return _kept(tokenizer, texts, compiled)


SPACES = ("\u0120", "\u2581")  # how byte-level and SentencePiece vocabularies spell one
_Form = tuple[Range, Range, int, bool, bool]  # x, y, decimals, signed zero, a plan (not a future)
# What was compiled, by tokenizer; with its size, because tokens may be added to it.
_COMPILED: WeakKeyDictionary[ChatTokenizer, dict[tuple[int, Any], Grammar]] = WeakKeyDictionary()


def _kept(tokenizer: ChatTokenizer, what: Any, compiled: Callable[[], Grammar]) -> Grammar:
    """A grammar, compiled at the first time it is asked for."""
    known = _COMPILED.setdefault(tokenizer, {})
    key = (len(tokenizer), what)
    if key not in known:
        known[key] = compiled()
    return known[key]


def _trajectory_grammar(tokenizer: ChatTokenizer, form: _Form) -> Grammar:
    return _kept(tokenizer, form, lambda: _compile_trajectory(tokenizer, form))


def _compile_trajectory(tokenizer: ChatTokenizer, form: _Form) -> Grammar:
    x, y, decimals, signed_zero, plan = form
    vocabulary = tokenizer.tokenizer.get_vocab()

    def tag(text: str) -> Sequence[str]:
        return [text] if text in vocabulary else text

    automaton = Automaton(decimals, signed_zero)
    start = node = automaton.node()
    if plan:
        node = automaton.literal(node, tag(TRAJ_START))
    node = automaton.literal(node, "[")
    for k in range(WAYPOINTS):
        opened = automaton.literal(node, ",(" if k else "(")
        node = automaton.number(opened, x)
        node = automaton.number(automaton.literal(node, ","), y)
        node = automaton.literal(node, ")")
        if not plan:
            automaton.literal(opened, f"{UNKNOWN},{UNKNOWN})", node)
    node = automaton.literal(node, "]")
    if plan:
        node = automaton.literal(node, tag(TRAJ_END))
    return compile_grammar(automaton, start, node, vocabulary, tokenizer.end_id)


def compile_grammar(
    automaton: Automaton, start: int, end: int, vocabulary: dict[str, int], end_id: int
) -> Grammar:
    """Lift an automaton over symbols to the tokens of a vocabulary.

    Args:
        automaton: edges between nodes.
        start: node before the text.
        end: node behind the text, from where only the end token goes on.
        vocabulary: ids of tokens by their spelling.
        end_id: the end token.

    Raises:
        UserError: the vocabulary lacks a character that the grammar needs.
    """
    edges, start, end = automaton.smallest(start, end)
    symbols = {symbol for followers in edges for symbol in followers}
    spelled = _spelled(vocabulary, symbols)
    for symbol in sorted(symbols):
        if not any(len(spelling) == 1 for spelling, _ in spelled.get(symbol, [])):
            raise UserError(f"the tokenizer has no token for {symbol!r}, which the answer needs")
    allowed: list[dict[int, int]] = []
    texts = {end_id: ""}
    for node, followers in enumerate(edges):
        reached: dict[int, int] = {}
        for symbol in followers:
            for spelling, token in spelled[symbol]:
                after = _walk(edges, node, spelling)
                if after is not None:
                    reached[token] = after
                    texts[token] = "".join(spelling)
        allowed.append(reached)
    ended = len(allowed)
    allowed[end][end_id] = ended
    # A finished row of a batch may go on being asked; it stays at the end.
    allowed.append({end_id: ended})
    tokens = sorted({token for reached in allowed for token in reached})
    column = {token: k for k, token in enumerate(tokens)}
    next_state = torch.full((len(allowed), len(tokens)), -1)
    for state, reached in enumerate(allowed):
        for token, after in reached.items():
            next_state[state, column[token]] = after
    spellings = tuple(texts[token] for token in tokens)
    return Grammar(torch.tensor(tokens), next_state, start, spellings)


def _spelled(
    vocabulary: dict[str, int], symbols: set[str]
) -> dict[str, list[tuple[tuple[str, ...], int]]]:
    """Tokens that are made of these symbols alone, by their first one."""
    characters = frozenset(symbol for symbol in symbols if len(symbol) == 1)
    found: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for text, token in vocabulary.items():
        if text in symbols:
            found.setdefault(text, []).append(((text,), token))
        elif text and characters.issuperset(text):
            found.setdefault(text[0], []).append((tuple(text), token))
    return found


def _walk(edges: list[dict[str, int]], node: int, spelling: tuple[str, ...]) -> int | None:
    """Node behind a chain of symbols; None where it leaves the automaton."""
    for symbol in spelling:
        after = edges[node].get(symbol)
        if after is None:
            return None
        node = after
    return node
