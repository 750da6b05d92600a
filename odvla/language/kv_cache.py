"""Keys and values of what a language model has read, in one block of fixed size.

Rows of a batch are at different places: each writes at slots of its own and sees slots of its own.

    slot     0 ......... length[g] ........................... capacity
             read for good        tokens of this run, a tree   nothing yet

A run writes the keys of its tree behind what counts already. Of a tree, one path is kept, moved
together, and the next run overwrites the rest.

Transformers asks a cache for nothing but `update`, and takes a mask of four axes as it is. The
attention here (`grouped_attention`) is scaled dot-product attention that does not copy keys and
values once for every query head that shares them; all implementations (eager, sdpa, flash) compute
the same, so that a model decodes with this one whichever it trains with.

Shapes: G rows, T tokens of a run, H query heads, K key heads, C capacity, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from odvla.errors import UserError

ATTENTION = "odvla_grouped"
MAX_PREFIXES = 4  # that are kept for one model


class RowCache(Cache):
    """Keys and values [layers, 2, G, K, C, E].

    Args:
        layers: of the model.
        capacity: slots of a row.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.layer_count = layers
        self.capacity = capacity
        self.block: Tensor | None = None
        self._slots: Tensor | int = 0
        self._used = 0

    def at(self, slots: Tensor | int, used: int) -> None:
        """Say where the next run goes.

        Args:
            slots: [G, T] slot of each token; a number: from there on, in all rows.
            used: slots that the run can see at most.
        """
        self._slots, self._used = slots, used

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values [G, K, T, E]; returns all that can be seen."""
        if self.block is None:
            G, K, _, E = key_states.shape
            # Zeros: what no one sees is weighted by nought, which would not help against NaN.
            # In mixed precision keys come in fp32 and values in bf16; both are kept as keys are.
            self.block = key_states.new_zeros(self.layer_count, 2, G, K, self.capacity, E)
        for part, states in zip(self.block[layer_idx], (key_states, value_states), strict=True):
            if isinstance(self._slots, int):
                part[:, :, self._slots : self._slots + states.shape[2]] = states
            else:
                rows = torch.arange(len(part), device=part.device)[:, None]
                part[rows, :, self._slots] = states.transpose(1, 2).to(part.dtype)
        keys, values = self.block[layer_idx, :, :, :, : self._used]
        return keys, values

    def move(self, rows: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots of rows to other slots, in all layers at once."""
        assert self.block is not None
        at = [torch.tensor(list(x), device=self.block.device) for x in (rows, sources, targets)]
        self.block[:, :, at[0], :, at[2]] = self.block[:, :, at[0], :, at[1]]

    def start_with(self, prefix: Tensor, rows: int) -> None:
        """Fill the first slots of all rows with a prefix [layers, 2, 1, K, P, E]."""
        layers, parts, _, K, P, E = prefix.shape
        if self.block is None:
            self.block = prefix.new_zeros(layers, parts, rows, K, self.capacity, E)
        self.block[:, :, :, :, :P] = prefix

    def clear(self) -> None:
        """Forget all keys and values, and keep their place."""
        if self.block is not None:
            self.block.zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots that can be seen."""
        return self._used


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [G, H, T, E] to [G, K, used, E]; a mask of None is causal.

    Raises:
        UserError: the model's attention is of another kind.
    """
    for extra in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            raise UserError(f"decoding knows no attention with {extra}, which the model has")
    G, H, T, E = query.shape
    group = H // key.shape[1]
    if attention_mask is None:
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=T > 1, scale=scaling, enable_gqa=group > 1
        )
    else:
        # Heads that share keys become further queries of them.
        packed = query.reshape(G, key.shape[1], group * T, E)
        mask = attention_mask.repeat(1, 1, group, 1)
        found = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        found = found.reshape(G, H, T, E)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)


@contextmanager
def decoding(model: Any, longest: int) -> Iterator[None]:
    """Let a model attend as a RowCache needs it.

    Args:
        model: of transformers.
        longest: slots that a token may see.

    Raises:
        UserError: the model looks back less far.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) or longest
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and longest > window:
        raise UserError(
            f"the language model looks {window} tokens back, fewer than the {longest} of a prompt "
            "and its answer, which decoding does not do"
        )
    usual = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual


@dataclass(frozen=True)
class _Version:
    """What a prefix was computed with; compared before it is used again."""

    dtype: torch.dtype | None  # of autocast; None: off
    places: tuple[tuple[int, int], ...]  # address and version of each parameter
    sample: tuple[float, ...]  # one value of each parameter: some optimisers write past versions


class PrefixStore:
    """Keys and values of texts that many prompts begin with, for each model."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[
            nn.Module, tuple[_Version, OrderedDict[tuple[int, ...], Tensor]]
        ] = WeakKeyDictionary()

    def of(self, language: nn.Module) -> OrderedDict[tuple[int, ...], Tensor] | None:
        """Prefixes [layers, 2, 1, K, P, E] by their ids, with the weights as they are now.

        Those of other weights are forgotten. None: there is no telling whether weights change.
        """
        version = _version(language)
        if version is None:
            return None
        found = self._kept.get(language)
        if found is None or found[0] != version:
            found = (version, OrderedDict())
            self._kept[language] = found
        while len(found[1]) > MAX_PREFIXES:
            found[1].popitem(last=False)
        return found[1]


def _version(language: nn.Module) -> _Version | None:
    # A sharded model's own part will do: its other parts change in the same steps.
    parameters = [getattr(p, "_local_tensor", p) for p in language.parameters()]
    if any(p.is_inference() for p in parameters):
        return None  # they keep no version
    device = parameters[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.no_grad():
        values = torch.stack([p.reshape(-1)[-1].float() for p in parameters if p.numel()])
    return _Version(
        dtype, tuple((p.data_ptr(), p._version) for p in parameters), tuple(values.tolist())
    )


PREFIXES = PrefixStore()
