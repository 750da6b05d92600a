"""A language model of random weights that nevertheless writes given plans.

Time does not depend on what weights are, but how many tokens a plan has and how many of them a
draft guesses does. So the model must write plans as a trained one does. Training half a billion
parameters for that would take hours; solving for one matrix takes a second:

    what the last layer's MLP adds = down_proj(features),      features [positions, intermediate]

With more features than positions there is a down_proj (the one of least norm, by ridge regression)
that turns the hidden state at each position of the given prompts and answers into the embedding of
the token that comes next, times a constant. All other weights stay random, but queries and keys are
enlarged: at their usual random size attention is nearly uniform, so that the same digit at two
places of a plan would look the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odvla.language.causal_lm import CausalLM
from odvla.language.splice import Spliced

SHARPNESS = 4.0  # standard deviation of what the softmax of attention is taken of
RIDGE = 1e-7  # of the features' mean square: enough that rounding does not matter


@torch.no_grad()
def teach(language: CausalLM, prompts: Sequence[Spliced], answers: Sequence[list[int]]) -> None:
    """Change the last down_proj so that each answer is what greedy decoding writes.

    Args:
        language: a Qwen2 with tied embeddings.
        prompts: one prompt each, without padding.
        answers: their tokens, the end token included.

    Raises:
        ValueError: more tokens are to be written than the matrix can hold.
    """
    _sharpen(language)
    down: Any = language.model.base_model.layers[-1].mlp.down_proj
    positions = sum(map(len, answers))
    if positions > down.in_features:
        raise ValueError(
            f"{positions} tokens are more than {down.in_features} features can tell apart"
        )
    features: list[Tensor] = []
    states: list[Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    norm = language.model.base_model.norm.register_forward_pre_hook(
        lambda _, inputs: states.append(inputs[0])
    )
    kept = down.weight.clone()
    down.weight.zero_()  # so that `states` are those without what is to be found
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            read = torch.tensor([answer[:-1]], device=prompt.embeds.device)
            embeds = torch.cat([prompt.embeds, language.embed(read)], dim=1)
            language.model.base_model(inputs_embeds=embeds, use_cache=False)
            features[-1] = features[-1][0, -len(answer) :].double()
            states[-1] = states[-1][0, -len(answer) :].double()
    finally:
        hook.remove()
        norm.remove()
        down.weight.copy_(kept)
    x, h = torch.cat(features), torch.cat(states)
    tokens = torch.tensor([token for answer in answers for token in answer], device=x.device)
    wanted = language.embed(tokens).double()
    # As large as what is there already, which it has to drown.
    wanted *= h.pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    gram = x @ x.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    down.weight.copy_(torch.linalg.solve(gram, wanted - h).T @ x)


def _sharpen(language: CausalLM) -> None:
    """Scale queries and keys so that their products have the standard deviation SHARPNESS."""
    for layer in language.model.base_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            # Inputs are normalised: an entry of q or k has this standard deviation.
            size = projection.weight.std() * projection.in_features**0.5
            projection.weight.mul_(SHARPNESS**0.5 / size)
