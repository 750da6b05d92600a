"""Decoding of a batch from embeddings: greedy or sampled, with or without a grammar.

Prompts are padded at the left, so that all rows write at the same place. A row that has written the
end token is finished; decoding stops when all are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from odvla.errors import UserError
from odvla.language.causal_lm import CausalLM
from odvla.language.grammar import Grammar
from odvla.language.splice import Spliced


def generate(
    language: CausalLM,
    prompts: Spliced,
    end_id: int,
    *,
    max_new_tokens: int,
    grammar: Grammar | None = None,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """The most likely next token, again and again, or a random one as likely as the model says.

    Args:
        language: the model.
        prompts: G embedded prompts, padded at the left.
        end_id: token that finishes a row; not part of the result.
        max_new_tokens: most tokens a row may get, the end token included.
        grammar: what may be written; None: anything.
        seeds: one a row: its tokens are drawn at random; none: they are the most likely ones. What
            a row draws depends on its seed and prompt alone, not on the rows beside it.

    Returns:
        New ids of each row.

    Raises:
        UserError: prompt and answer together are longer than the model's context, or the model
            computes NaN.
    """
    S = prompts.embeds.shape[1]
    if max_new_tokens + S > language.max_positions:
        raise UserError(
            f"a prompt of {S} tokens and {max_new_tokens} new ones exceed the language model's "
            f"{language.max_positions} positions"
        )
    training = language.training
    language.eval()  # gradient checkpointing, where it is on, would keep the cache empty
    try:
        rows = _decode(language, prompts, end_id, max_new_tokens, grammar, seeds)
    finally:
        language.train(training)
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


@torch.no_grad()
def _decode(
    language: CausalLM,
    prompts: Spliced,
    end_id: int,
    max_new_tokens: int,
    grammar: Grammar | None,
    seeds: Sequence[int],
) -> list[list[int]]:
    """New ids of each row; a finished row is filled up with end_id."""
    G, S, _ = prompts.embeds.shape
    choose = _Choice(language, grammar, G, seeds)
    cache = DynamicCache(config=language.model.config)
    embeds, positions = prompts.embeds, prompts.position_ids
    mask = F.pad(prompts.attention_mask, (0, max_new_tokens), value=True)
    running = torch.ones(G, dtype=torch.bool, device=embeds.device)
    written: list[Tensor] = []
    for step in range(max_new_tokens):
        states = language.model.model(
            inputs_embeds=embeds,
            attention_mask=mask[:, : S + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        tokens = choose(states).masked_fill(~running, end_id)
        written.append(tokens)
        running = running & (tokens != end_id)
        if not running.any():
            break
        embeds = language.embed(tokens)[:, None]
        positions = positions[:, -1:] + 1
    return torch.stack(written, dim=1).tolist()


class _Choice:
    """Next token of each row; keeps each row's place in the grammar and in its random numbers."""

    def __init__(
        self, language: CausalLM, grammar: Grammar | None, rows: int, seeds: Sequence[int]
    ) -> None:
        self.head = language.head
        self.grammar = grammar
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if grammar is not None:
            device = self.head.weight.device
            self.token_ids = grammar.token_ids.to(device)
            self.next_state = grammar.next_state.to(device)
            self.state = torch.full((rows,), grammar.start, device=device)
            # Only these rows of the head can win; with Qwen's 150 thousand that is most of a step.
            self.weight = self.head.weight[self.token_ids]
            self.bias = None if self.head.bias is None else self.head.bias[self.token_ids]

    def __call__(self, states: Tensor) -> Tensor:
        """Token ids [G] for hidden states [G, D]."""
        if self.grammar is None:
            return self._drawn(_checked(self.head(states))).argmax(-1)
        logits = _checked(F.linear(states, self.weight, self.bias))  # [G, K]
        followers = self.next_state[self.state]  # [G, K]
        best = self._drawn(logits).masked_fill(followers < 0, -torch.inf).argmax(-1)  # [G]
        self.state = followers.gather(1, best[:, None])[:, 0]
        return self.token_ids[best]

    def _drawn(self, logits: Tensor) -> Tensor:
        """Logits whose maximum is a random draw (Gumbel's trick), where rows have seeds."""
        if not self.generators:
            return logits
        uniform = torch.stack(
            [torch.rand(logits.shape[-1], generator=generator) for generator in self.generators]
        )
        return logits - (-uniform.clamp_min(1e-30).log()).log().to(logits.device)


def _checked(logits: Tensor) -> Tensor:
    """The logits in fp32; NaN, which argmax would take for the best, is refused."""
    if logits.isnan().any():
        raise UserError("the language model's logits are NaN: its weights or its inputs are broken")
    return logits.float()
