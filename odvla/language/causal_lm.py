"""The causal language model: a Qwen2 from Hugging Face that reads embeddings, not ids.

Its head is applied only where it is needed, at label positions: with a vocabulary of 150 thousand
and a few dozen answer tokens in a prompt of hundreds, logits of the prompt would cost more than
all layers together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from odvla.errors import UserError
from odvla.language.splice import Spliced
from odvla.types import IGNORE_INDEX


@dataclass(frozen=True)
class LanguageConfig:
    """A Qwen2 of any size with random weights, or a pretrained one from a local folder.

    Where `pretrained` is set, the folder's config.json decides about all sizes.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    attention: str = "sdpa"  # any attention implementation of transformers
    gradient_checkpointing: bool = False
    pretrained: str | None = None

    def __post_init__(self) -> None:
        """Check that heads divide the width.

        Raises:
            UserError: naming the setting that does not fit.
        """
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(
                f"language.hidden {self.hidden} must be an even multiple of heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"language.heads {self.heads} must be a multiple of kv_heads {self.kv_heads}"
            )

    def build(self, vocab_size: int) -> CausalLM:
        """The model, with at least `vocab_size` embeddings.

        Raises:
            UserError: `pretrained` is not a folder with a model in it.
        """
        model = self._random(vocab_size) if self.pretrained is None else self._pretrained()
        grow_embeddings(model, vocab_size)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return CausalLM(model)

    def _random(self, vocab_size: int) -> Qwen2ForCausalLM:
        config = Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tie_embeddings,
        )
        config._attn_implementation = self.attention
        return Qwen2ForCausalLM(config)

    def _pretrained(self) -> Any:
        assert self.pretrained is not None
        folder = Path(self.pretrained).expanduser()
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"language.pretrained {folder} is not a model folder: its config.json is missing "
                "or broken"
            ) from error
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation=self.attention, dtype=torch.float32
        )


class CausalLM(nn.Module):
    """Embeddings in, loss or hidden states out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def hidden(self) -> int:
        """Width of an embedding."""
        return self.model.config.hidden_size

    @property
    def max_positions(self) -> int:
        """Longest sequence."""
        return self.model.config.max_position_embeddings

    @property
    def head(self) -> nn.Linear:
        """Hidden states -> logits."""
        return self.model.get_output_embeddings()

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of ids [...]."""
        return self.model.get_input_embeddings()(ids)

    def forward(self, spliced: Spliced) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token cross-entropy of a right-padded batch.

        Returns:
            loss (mean over all labels, fp32), logits [P, V] that predict labels [P]. Without any
            label the loss is a zero that has a gradient of zeros, so that distributed training goes
            on.
        """
        # Padding stands right of everything that counts, so causality alone keeps it out: without a
        # mask the fast attention kernels apply.
        states = self.model.model(inputs_embeds=spliced.embeds, use_cache=False).last_hidden_state
        due = spliced.labels[:, 1:] != IGNORE_INDEX  # [G, S - 1]
        labels = spliced.labels[:, 1:][due]  # [P]
        logits = self.head(states[:, :-1][due])  # [P, V]
        if len(labels) == 0:
            return logits.float().sum() + 0.0 * states.float().sum(), logits, labels
        return F.cross_entropy(logits.float(), labels), logits, labels


def grow_embeddings(model: Any, vocab_size: int) -> None:
    """Make room for added tokens; new rows are the mean of the old ones."""
    old = model.get_input_embeddings().num_embeddings
    if vocab_size <= old:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.lm_head)}
    with torch.no_grad():
        for weight in tables.values():
            weight[old:] = weight[:old].mean(0)
