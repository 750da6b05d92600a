"""Whether a pretrained language model is of a kind that can be used here, seen by trying.

Hugging Face has causal language models of a hundred kinds. What is relied on: embeddings go in and
hidden states come out, no place sees what follows it, logits are the head's (`CausalLM.logits`),
and keys and values can lie in a RowCache. A model of which one of these is not true would learn or
write something wrong, perhaps without any error; a few tokens tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odvla.errors import UserError
from odvla.language.kv_cache import RowCache, decoding

if TYPE_CHECKING:  # it asks for this check
    from odvla.language.causal_lm import CausalLM

_TOKENS = 4
_TOLERANCE = 1e-3  # of the largest number


def check_model(language: CausalLM, where: str) -> None:
    """Run a model on a few tokens in the ways that training and decoding do.

    Args:
        language: the model, on a device that can run it.
        where: what it is called in messages.

    Raises:
        UserError: naming what it does otherwise.
    """
    kind = language.model.config.model_type
    training = language.training
    language.eval()
    try:
        with torch.no_grad():
            problem = _problem(language)
    except Exception as error:  # whatever a model of unknown kind may raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problem = lines[0].rstrip(".")
    finally:
        language.train(training)
    if problem:
        raise UserError(f"{where}: a model of kind {kind} cannot be used here: {problem}")


def _problem(language: CausalLM) -> str:
    """What is not as it must be; "": nothing."""
    model = language.model
    body, layers = model.base_model, len(language.layers)
    assert language.max_positions >= _TOKENS
    embeds = language.embed(torch.arange(_TOKENS, device=language.head.weight.device))[None]
    states = body(inputs_embeds=embeds, use_cache=False).last_hidden_state  # [1, T, D]
    if not states.isfinite().all():
        return ""  # broken weights are another matter, and found by whoever uses them
    start = body(inputs_embeds=embeds[:, :-1], use_cache=False).last_hidden_state
    if not _same(start, states[:, :-1]):
        return "its tokens see what follows them"
    if not _same(language.logits(states), model(inputs_embeds=embeds, use_cache=False).logits):
        return "its logits are not those of its head"
    cache, last = RowCache(layers, _TOKENS), _TOKENS - 1
    with decoding(model, _TOKENS):
        for first, end in ((0, last), (last, _TOKENS)):
            places = torch.arange(first, end, device=embeds.device)[None]
            seen = torch.ones(1, 1, 1, end, dtype=torch.bool, device=embeds.device)
            cache.at(first, end)
            found = body(
                inputs_embeds=embeds[:, first:end],
                attention_mask=seen if first else None,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
    if not _same(found, states[:, last:]):
        return "it writes otherwise with a cache than without"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    largest = float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= _TOLERANCE * largest
