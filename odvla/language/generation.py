"""Decoding of a batch from embeddings: greedy or sampled, with or without a grammar or drafts.

The model is run on the prompts, and then on what was written, until all rows have ended. A run
reads a tree of tokens a row (see `draft`): first what is decided but not read yet, then a guess of
what follows. At each node the model says what it writes next; as long as that is in the tree, no
further run is needed to read it. Tokens that a grammar leaves no choice about are written unasked.

    prompt -> runs on trees:  chosen token + forced tokens + guess   -> longest path that is right

What is written is what a loop without cache, drafts and forced tokens would write: the token of
the largest logit among those allowed, and of the lowest id where several are equally large. (In
floating point a logit may differ in its last digits with the shape of a run; only two logits as
close as that could swap.) Drawn tokens are those of the largest logit plus noise, the noise being
the row's and the place's alone, so they are no different with drafts either.

Prompts come padded at the left and are moved to start in slot 0. Where all begin with the same
text, its keys and values are computed once for the weights and used again in later calls.

Shapes: G rows, S places of a prompt, T nodes of a run, D width, K tokens of the grammar.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from odvla.errors import UserError
from odvla.language.causal_lm import CausalLM
from odvla.language.choice import Choice
from odvla.language.draft import Draft, Drafting, TokenTree
from odvla.language.grammar import Grammar
from odvla.language.kv_cache import PREFIXES, RowCache, decoding
from odvla.language.recorded_runs import RUNS, SLOT_STEP, RecordedRuns, nodes_run
from odvla.language.splice import Spliced
from odvla.language.thin_products import thin_products

FREE = 0  # state of a row without a grammar
LEAST_NODES = 6  # of a row's tree, however many rows share a run
SHORTEST_PREFIX = 16  # tokens: below, looking whether weights have changed costs more
ROUND = 16  # slots that a run sees are rounded up to this, for few different shapes


@dataclass(frozen=True)
class Decoded:
    """New ids of each row, and what they cost."""

    ids: list[list[int]]  # without end tokens
    runs: int  # times the model was run, the prompts' runs included
    read: int  # tokens that it was run on after the prompts, all rows together
    prefill_s: float  # seconds until the prompts were read
    decode_s: float  # seconds after that


def generate(
    language: CausalLM,
    prompts: Spliced,
    end_id: int,
    *,
    max_new_tokens: int,
    grammar: Grammar | None = None,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """New ids of each row; see `decode`."""
    found = decode(
        language, prompts, end_id, max_new_tokens=max_new_tokens, grammar=grammar, seeds=seeds
    )
    return found.ids


def decode(
    language: CausalLM,
    prompts: Spliced,
    end_id: int,
    *,
    max_new_tokens: int,
    grammar: Grammar | None = None,
    seeds: Sequence[int] = (),
    temperature: float = 1.0,
    drafts: Sequence[Draft] = (),
    drafting: Drafting | None = None,
    prefix: Sequence[int] = (),
    record: bool = True,
) -> Decoded:
    """The most likely next token, again and again, or a random one as likely as the model says.

    Args:
        language: the model.
        prompts: G embedded prompts, padded at the left.
        end_id: token that finishes a row; not part of the result.
        max_new_tokens: most tokens a row may get, the end token included.
        grammar: what may be written; None: anything.
        seeds: one a row: its tokens are drawn at random; none: they are the most likely ones. What
            a row draws depends on its seed and prompt alone, not on the rows beside it.
        temperature: logits are divided by it before tokens are drawn.
        drafts: one a row that guesses what the row writes; they need a grammar.
        drafting: how much of a guess is tried.
        prefix: ids of text that all prompts begin with, to be remembered for later calls.
        record: on a GPU, record runs as CUDA graphs where that is possible (see `recorded_runs`).

    Raises:
        UserError: prompt and answer together are longer than the model's context, the temperature
            is not positive, or the model computes NaN.
    """
    S = prompts.embeds.shape[1]
    if max_new_tokens + S > language.max_positions:
        raise UserError(
            f"a prompt of {S} tokens and {max_new_tokens} new ones exceed the language model's "
            f"{language.max_positions} positions"
        )
    if not temperature > 0:
        raise UserError(f"the temperature must be positive, not {temperature}")
    if drafts and grammar is None:
        raise ValueError("drafts are for texts of a grammar")
    training = language.training
    language.eval()  # gradient checkpointing, where it is on, would keep the cache empty
    try:
        with torch.no_grad():
            choice = Choice(language, grammar, seeds, temperature)
            settings = drafting or Drafting()
            decoder = _Decoder(language, prompts, end_id, max_new_tokens, choice, drafts, settings)
            return decoder.run(prefix, record=record)
    finally:
        language.train(training)


@dataclass
class _Row:
    """What one row has written and read.

    `written` starts with a stand-in for the prompt's last place, which is read like a token: what
    the model says there comes first.
    """

    written: list[int]
    states: list[int]  # of the grammar, behind each token written
    limit: int
    end_id: int
    read: int = 0  # tokens of `written` whose keys are in the cache
    done: bool = False

    @property
    def ids(self) -> list[int]:
        """The new ids."""
        return self.written[1:]

    def write(self, token: int, grammar: Grammar | None) -> None:
        """Add a token."""
        self.written.append(token)
        self.states.append(FREE if grammar is None else grammar.steps[self.states[-1]][token])
        self.done = token == self.end_id or len(self.ids) == self.limit

    def force(self, grammar: Grammar | None) -> None:
        """Add the tokens that are the only ones allowed."""
        if grammar is not None and not self.done:
            for token in grammar.forced(self.states[-1])[: self.limit - len(self.ids)]:
                self.write(token, grammar)


class _Decoder:
    """One batch on its way."""

    def __init__(
        self,
        language: CausalLM,
        prompts: Spliced,
        end_id: int,
        max_new_tokens: int,
        choice: Choice,
        drafts: Sequence[Draft],
        drafting: Drafting,
    ) -> None:
        self.language = language
        self.end_id = end_id
        self.choice = choice
        self.grammar = choice.grammar
        self.limit = max_new_tokens
        self.drafts = drafts
        self.drafting = drafting
        self.embeds, self.lengths = _from_the_left(prompts)
        self.device = self.embeds.device
        self.runs = self.tokens_read = 0
        start = FREE if self.grammar is None else self.grammar.start
        self.rows = [_Row([end_id], [start], max_new_tokens, end_id) for _ in self.lengths]
        # The last row that runs has all the nodes, and writes them behind its last token at worst.
        self.width = drafting.width(self.device.type) if drafts else 1
        nodes = max(LEAST_NODES, self.width, max_new_tokens)
        capacity = self.embeds.shape[1] + max_new_tokens + nodes + ROUND
        self.layers = language.model.config.num_hidden_layers
        self.cache = RowCache(self.layers, capacity)
        self.recorded: RecordedRuns | None = None

    def run(self, prefix: Sequence[int], *, record: bool) -> Decoded:
        """Write all rows to their ends."""
        started = read = self._now()
        if self.limit > 0:
            rows, capacity = len(self.rows), self.cache.capacity
            with (
                RUNS.lend(self.language, self.layers, rows, capacity)
                if record
                else nullcontext() as self.recorded,
                decoding(self.language.model, self.embeds.shape[1] + self.limit),
                thin_products(self.language.model),
            ):
                if self.recorded is not None:
                    self.cache = self.recorded.cache
                self._read_prompts(self._known(prefix))
                read = self._now()
                while not all(row.done for row in self.rows):
                    self._step()
        ids = [[token for token in row.ids if token != self.end_id] for row in self.rows]
        return Decoded(ids, self.runs, self.tokens_read, read - started, self._now() - read)

    # -- the prompts ----------------------------------------------------------------------------

    def _known(self, prefix: Sequence[int]) -> int:
        """Fill the cache with a prefix of all prompts; returns its length."""
        # The last place of a prompt is always read, for what it says comes next.
        ids = tuple(prefix)[: min(self.lengths) - 1]
        kept = PREFIXES.of(self.language) if len(ids) >= SHORTEST_PREFIX else None
        if kept is None:
            return 0
        if ids not in kept:
            cache = RowCache(self.layers, len(ids))
            self.runs += 1
            self._states(self.embeds[:1, : len(ids)], cache, 0, len(ids), None)
            assert cache.block is not None
            kept[ids] = cache.block
        kept.move_to_end(ids)
        self.cache.start_with(kept[ids], len(self.rows))
        return len(ids)

    def _read_prompts(self, known: int) -> None:
        """Run on the prompts but for the `known` first places, and on a guess behind each."""
        for row in self.rows:
            row.force(self.grammar)
        # Branches would need a mask over the whole prompt; a chain is but a longer prompt.
        trees = [self._tree(g, branches=False) for g in range(len(self.rows))]
        S = self.embeds.shape[1] + max(map(len, trees)) - 1
        embeds = F.pad(self.embeds, (0, 0, 0, S - self.embeds.shape[1]))
        for length, tree, places in zip(self.lengths, trees, embeds, strict=True):
            tokens = torch.tensor(tree.tokens[1:], dtype=torch.int64, device=self.device)
            places[length : length - 1 + len(tree)] = self.language.embed(tokens)
        mask = None  # causal
        if known:
            slots = torch.arange(S, device=self.device)
            mask = (slots <= slots[known:, None])[None, None]  # [1, 1, S - known, S]
        self.runs += 1
        states = self._states(embeds[:, known:], self.cache, known, S, mask)
        rows = [g for g, tree in enumerate(trees) for _ in tree.tokens]
        places_read = [self._base(g) - known + d for g, t in enumerate(trees) for d in t.depths]
        self._accept(trees, states[rows, places_read])

    # -- what is written ------------------------------------------------------------------------

    def _step(self) -> None:
        """One run on a tree for each row that has not ended."""
        trees = [
            TokenTree() if row.done else self._tree(g, branches=self.drafting.branches)
            for g, row in enumerate(self.rows)
        ]
        G, T, slot_step = len(trees), max(map(len, trees)), ROUND
        if self.recorded is not None:
            T, slot_step = nodes_run(T), SLOT_STEP
        base = np.array([self._base(g) for g in range(G)])
        tokens = np.full((G, T), self.end_id)
        depths = np.zeros((G, T), dtype=np.int64)
        sees = np.tile(np.eye(T, dtype=bool), (G, 1, 1))  # [G, T, T] nodes on the way to a node
        for g, tree in enumerate(trees):
            tokens[g, : len(tree)], depths[g, : len(tree)] = tree.tokens, tree.depths
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    sees[g, node] |= sees[g, parent]
        used = min(-(-(int(base.max()) + T) // slot_step) * slot_step, self.cache.capacity)
        slots = base[:, None] + np.arange(T)
        visible = np.tile(np.arange(used) < base[:, None, None], (1, T, 1))  # [G, T, used]
        for g in range(G):
            visible[g, :, base[g] : base[g] + T] = sees[g]
        numbers = torch.from_numpy(np.stack([tokens, slots, base[:, None] + depths]))
        sights = torch.from_numpy(visible)
        self.runs += 1
        if self.recorded is not None:
            states = self.recorded(self._read_trees, numbers, sights, self.device)
        else:
            states = self._read_trees(numbers.to(self.device), sights.to(self.device))
        rows = [g for g, tree in enumerate(trees) for _ in tree.tokens]
        nodes = [node for tree in trees for node in range(len(tree))]
        self.tokens_read += len(nodes)
        self._accept(trees, states[rows, nodes])

    def _read_trees(self, numbers: Tensor, visible: Tensor) -> Tensor:
        """Run the model on trees.

        Args:
            numbers: [3, G, T] ids, slots and positions of their nodes.
            visible: [G, T, slots] what each node sees.

        Returns:
            states [G, T, D].
        """
        tokens, slots, positions = numbers
        embeds = self.language.embed(tokens)
        mask = visible[:, None]
        return self._states(embeds, self.cache, slots, visible.shape[-1], mask, positions)

    def _tree(self, g: int, *, branches: bool) -> TokenTree:
        """What row g is to be run on: what it has written and not read, and a guess."""
        row, tree = self.rows[g], TokenTree()
        unread = zip(row.written[row.read :], row.states[row.read :], strict=True)
        for token, state in unread:
            tree.add(token, len(tree) - 1, state)
        if self.drafts and not row.done:
            assert self.grammar is not None
            tree.grow(
                self.drafts[g].propose(row.ids),
                self.grammar,
                most=self._most(),
                deepest=self.limit - 1 - row.read,  # the last token need not be read
                branches=branches,
            )
        return tree

    def _accept(self, trees: Sequence[TokenTree], states: Tensor) -> None:
        """Write what the model says at the nodes of the trees.

        Args:
            trees: one a row, without nodes where the row has ended.
            states: [nodes of all trees, D] what the model made of them.
        """
        places = [
            (g, self.rows[g].read + depth) for g, tree in enumerate(trees) for depth in tree.depths
        ]
        best = self.choice(states, [state for tree in trees for state in tree.states], places)
        moved: list[tuple[int, int, int]] = []
        for g, (row, tree) in enumerate(zip(self.rows, trees, strict=True)):
            said, best = best[: len(tree)], best[len(tree) :]
            if row.done:
                continue
            node = len(row.written) - row.read - 1  # of the last token written
            path = list(range(node + 1))
            while not row.done:
                row.write(said[node], self.grammar)
                follower = tree.children[node].get(said[node])
                if follower is None:
                    break
                node = follower
                path.append(node)
            base = self._base(g)
            moved += [(g, base + k, base + at) for at, k in enumerate(path) if k != at]
            row.read += len(path)
            row.force(self.grammar)
        if moved:
            self.cache.move(*zip(*moved, strict=True))

    # -- running --------------------------------------------------------------------------------

    def _base(self, g: int) -> int:
        """Slot and position of row g's next token."""
        return self.lengths[g] - 1 + self.rows[g].read

    def _most(self) -> int:
        """Nodes that a row's tree may have, unless more are written and not read."""
        if not self.drafts:
            return 1
        running = sum(not row.done for row in self.rows)
        return max(LEAST_NODES, self.width // max(1, running))

    def _states(
        self,
        embeds: Tensor,
        cache: RowCache,
        slots: Tensor | int,
        used: int,
        mask: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run the model: [G, T, D] -> [G, T, D]."""
        if positions is None:
            positions = torch.arange(used - embeds.shape[1], used, device=self.device)[None]
        cache.at(slots, used)
        return self.language.model.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _from_the_left(prompts: Spliced) -> tuple[Tensor, list[int]]:
    """Embeddings [G, S, D] with all padding at the right, and the rows' lengths."""
    S = prompts.embeds.shape[1]
    lengths = prompts.attention_mask.sum(1)
    take = (torch.arange(S, device=lengths.device) + (S - lengths)[:, None]).clamp(max=S - 1)
    embeds = prompts.embeds.gather(1, take[..., None].expand_as(prompts.embeds))
    return embeds, lengths.tolist()
