"""Which token comes next: the best or a random one, of all or of those that a grammar allows.

Shapes: D width, K tokens of the grammar, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from odvla.errors import UserError
from odvla.language.causal_lm import CausalLM
from odvla.language.grammar import Grammar


class Choice:
    """The next token at each node, and each row's random numbers."""

    def __init__(
        self, language: CausalLM, grammar: Grammar | None, seeds: Sequence[int], temperature: float
    ) -> None:
        self.language = language
        self.grammar = grammar
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.noise: list[dict[int, Tensor]] = [{} for _ in seeds]  # of a row's coming places
        self.places_drawn = [0 for _ in seeds]
        if grammar is not None:
            head = language.head
            device = head.weight.device
            self.token_ids = grammar.token_ids.to(device)
            self.forbidden = (grammar.next_state < 0).to(device)
            # Only these rows of the head can win; with Qwen's 150 thousand that is most of a step.
            self.weight = head.weight[self.token_ids]
            self.bias = None if head.bias is None else head.bias[self.token_ids]

    def __call__(
        self, states: Tensor, grammar_states: list[int], places: list[tuple[int, int]]
    ) -> list[int]:
        """Token ids of nodes.

        Args:
            states: [nodes, D] hidden states.
            grammar_states: of each node.
            places: row, and place in its answer, of the token that follows each node.
        """
        if self.grammar is None:
            return self._drawn(_checked(self.language.logits(states)), places).argmax(-1).tolist()
        written = F.linear(states, self.weight, self.bias)  # [nodes, K]
        logits = _checked(self.language.scaled(written))
        forbidden = self.forbidden[torch.tensor(grammar_states, device=logits.device)]
        best = self._drawn(logits, places).masked_fill(forbidden, -torch.inf).argmax(-1)
        return self.token_ids[best].tolist()

    def _drawn(self, logits: Tensor, places: list[tuple[int, int]]) -> Tensor:
        """Logits whose maximum is a random draw (Gumbel's trick), where rows have seeds."""
        if not self.generators:
            return logits
        width = logits.shape[-1]
        for row, place in places:
            while self.places_drawn[row] <= place:
                uniform = torch.rand(width, generator=self.generators[row])
                self.noise[row][self.places_drawn[row]] = -(-uniform.clamp_min(1e-30).log()).log()
                self.places_drawn[row] += 1
        noise = torch.stack([self.noise[row][place] for row, place in places])
        for row in {row for row, _ in places}:
            written = min(place for at, place in places if at == row)
            self.noise[row] = {k: drawn for k, drawn in self.noise[row].items() if k > written}
        return logits / self.temperature + noise.to(logits.device)


def _checked(logits: Tensor) -> Tensor:
    """The logits in fp32 or better; NaN, which argmax would take for the best, is refused."""
    if logits.isnan().any():
        raise UserError("the language model's logits are NaN: its weights or its inputs are broken")
    return logits.float() if logits.dtype != torch.float64 else logits
