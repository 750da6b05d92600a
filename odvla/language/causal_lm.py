"""The causal language model: any of Hugging Face's, reading embeddings, not ids.

Its head is applied only where it is needed, at label positions: with a vocabulary of 150 thousand
and a few dozen answer tokens in a prompt of hundreds, logits of the prompt would cost more than
all layers together.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from odvla.errors import UserError
from odvla.language.model_check import check_model
from odvla.language.model_folder import model_folder
from odvla.language.recorded_runs import RUNS
from odvla.language.splice import Spliced
from odvla.types import IGNORE_INDEX

Attention = Literal["sdpa", "eager", "flash_attention_2"]
MOST_PLACES = 0.9  # of a padded batch's, that groups of like length may still take


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) beside some linear layers; needs the extra [lora].

    The paper trains all parameters. With adapters a stage's freeze plan should name
    `language.*lora_*` instead of `language.*`.
    """

    rank: int = 16
    alpha: int = 32  # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def __post_init__(self) -> None:
        """Check the rank.

        Raises:
            UserError: it is not positive.
        """
        if self.rank < 1:
            raise UserError(f"language.lora.rank must be at least 1, not {self.rank}")


@dataclass(frozen=True)
class LanguageConfig:
    """A Qwen2 of any size with random weights, or any pretrained causal language model.

    Where `pretrained` is set, its config.json decides about all sizes; those given here are what
    is built in its place on the meta device, for planning, where its files are not there.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    vocab_size: int = 0  # embeddings at least; 0: as many as the tokenizer has ids
    attention: Attention = "sdpa"
    gradient_checkpointing: bool = False
    # Conversations of a training batch run in so many groups of like length, where that saves a
    # tenth of the places or more. The loss is the same to rounding.
    length_groups: int = 1
    pretrained: str | None = None  # folder, or hub id of files that are on this machine
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        """Check that heads divide the width.

        Raises:
            UserError: naming the setting that does not fit.
        """
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(
                f"language.hidden {self.hidden} must be an even multiple of heads {self.heads}"
            )
        if self.length_groups < 1:
            raise UserError(f"language.length_groups must be at least 1, not {self.length_groups}")
        if self.heads % self.kv_heads:
            raise UserError(
                f"language.heads {self.heads} must be a multiple of kv_heads {self.kv_heads}"
            )

    def build(self, vocab_size: int, fresh_ids: Sequence[int] = ()) -> CausalLM:
        """The model, with at least `vocab_size` embeddings.

        Args:
            vocab_size: ids of the tokenizer.
            fresh_ids: ids that a pretrained model has never seen: their embeddings become the mean
                of the others (a row that only pads its table, as Qwen2.5's does, is noise).

        Raises:
            UserError: `pretrained` is not on this machine or of a kind that cannot be used, or a
                package is missing.
        """
        on_meta = torch.get_default_device().type == "meta"
        if self.pretrained is None or on_meta:
            model = self._random(max(vocab_size, self.vocab_size))
        else:
            model = self._pretrained()
        grow_embeddings(model, vocab_size)
        if self.pretrained is not None and not on_meta:
            reset_embeddings(model, fresh_ids)
            check_model(CausalLM(model), f"language.pretrained {self.pretrained}")
        if self.lora is not None:
            add_adapters(model, self.lora)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return CausalLM(model, self.length_groups)

    def _random(self, vocab_size: int) -> Any:
        """A model of these sizes; of the pretrained one's, where they are known."""
        if self.pretrained is not None:
            try:
                folder = model_folder(self.pretrained, "language.pretrained", "config.json")
            except UserError:
                pass
            else:
                known = AutoConfig.from_pretrained(folder, local_files_only=True)
                return AutoModelForCausalLM.from_config(known)
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
        on_meta = torch.get_default_device().type == "meta"
        config._attn_implementation = "sdpa" if on_meta else self._attention()
        return Qwen2ForCausalLM(config)

    def _pretrained(self) -> Any:
        assert self.pretrained is not None
        folder = model_folder(self.pretrained, "language.pretrained", "config.json")
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"language.pretrained {folder} is not a model folder: its config.json is broken"
            ) from error
        attention = self._attention()
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, attn_implementation=attention, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"language.pretrained {folder} cannot be loaded: {line}") from error

    def _attention(self) -> str:
        """The attention implementation, if it can run here."""
        if self.attention == "flash_attention_2" and (
            importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available()
        ):
            raise UserError(
                "language.attention flash_attention_2 needs a GPU and the package flash-attn; "
                "set language.attention=sdpa"
            )
        return self.attention


# Sizes of the published models: (hidden, layers, heads, kv_heads, intermediate, tied, vocabulary).
QWEN2_5 = {
    "0.5B": (896, 24, 14, 2, 4864, True, 151_936),
    "3B": (2048, 36, 16, 2, 11_008, True, 151_936),
    "7B": (3584, 28, 28, 4, 18_944, False, 152_064),
}


def qwen2_5(size: str, *, pretrained: bool = True) -> LanguageConfig:
    """Qwen2.5-Instruct of a published size.

    Args:
        size: one of QWEN2_5.
        pretrained: with its weights; False: random ones.

    Raises:
        UserError: there is no such size.
    """
    if size not in QWEN2_5:
        raise UserError(f"Qwen2.5 comes in {', '.join(QWEN2_5)}, not {size!r}")
    hidden, layers, heads, kv_heads, intermediate, tied, vocabulary = QWEN2_5[size]
    return LanguageConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        max_positions=32_768,
        rope_theta=1e6,
        tie_embeddings=tied,
        vocab_size=vocabulary,
        pretrained=f"Qwen/Qwen2.5-{size}-Instruct" if pretrained else None,
    )


class CausalLM(nn.Module):
    """Embeddings in, loss or hidden states out.

    Args:
        model: of Hugging Face.
        length_groups: see LanguageConfig.
    """

    def __init__(self, model: Any, length_groups: int = 1) -> None:
        super().__init__()
        self.model = model
        self.length_groups = length_groups

    def train(self, mode: bool = True) -> CausalLM:
        """Set the mode; training gets the memory that recorded runs of decoding hold."""
        if mode:
            RUNS.forget(self)
        return super().train(mode)

    @property
    def hidden(self) -> int:
        """Width of an embedding."""
        return self.model.config.hidden_size

    @property
    def max_positions(self) -> int:
        """Longest sequence."""
        return self.model.config.max_position_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """Its transformer layers, under whatever name."""
        config = self.model.config
        for part in self.model.base_model.modules():
            if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers:
                return part
        raise UserError(f"a language model of kind {config.model_type} has no list of layers")

    @property
    def head(self) -> nn.Linear:
        """Hidden states -> logits."""
        return self.model.get_output_embeddings()

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., D]."""
        return self.scaled(self.head(states))

    def scaled(self, logits: Tensor) -> Tensor:
        """What the head has made, as some kinds of models go on with it; most leave it alone."""
        config = self.model.config
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere's
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite's
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2's
            logits = (logits / cap).tanh() * cap
        return logits

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
        states = self.states(spliced)
        due = spliced.labels[:, 1:] != IGNORE_INDEX  # [G, S - 1]
        labels = spliced.labels[:, 1:][due]  # [P]
        logits = self.logits(states[:, :-1][due])  # [P, V]
        if len(labels) == 0:
            return logits.float().sum() + 0.0 * states.float().sum(), logits, labels
        return F.cross_entropy(logits.float(), labels), logits, labels

    def states(self, spliced: Spliced) -> Tensor:
        """Last hidden states [G, S, D] of a right-padded batch; anything where it is padded.

        Raises:
            UserError: flash-attention in fp32.
        """
        # Padding stands right of everything that counts, so causality alone keeps it out: without a
        # mask the fast attention kernels apply.
        body, embeds = self.model.base_model, spliced.embeds
        self._check_precision(embeds)
        if self.length_groups == 1:  # lengths are not asked for: a GPU need not be waited for
            return body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        lengths, order = spliced.attention_mask.sum(1).sort()
        rows = order.chunk(self.length_groups)
        longest = [int(held[-1]) for held in lengths.chunk(self.length_groups)]
        places = sum(len(group) * most for group, most in zip(rows, longest, strict=True))
        if places > MOST_PLACES * embeds.shape[:2].numel():
            return body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        groups = []
        for group, most in zip(rows, longest, strict=True):
            states = body(inputs_embeds=embeds[group, :most], use_cache=False).last_hidden_state
            groups.append(F.pad(states, (0, 0, 0, embeds.shape[1] - most)))
        return torch.cat(groups)[order.argsort()]

    def _check_precision(self, embeds: Tensor) -> None:
        """Say it before the kernel does, which knows no setting's name."""
        if (
            self.model.config._attn_implementation == "flash_attention_2"
            and embeds.dtype == torch.float32
            and not torch.is_autocast_enabled(embeds.device.type)
        ):
            raise UserError(
                "language.attention flash_attention_2 computes in bf16 or fp16, and this is fp32: "
                "set trainer.precision=bf16-mixed in training, language.attention=sdpa otherwise"
            )


def _embedding_tables(model: Any) -> list[nn.Parameter]:
    """Weights of the input and output embeddings; one where they are tied."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(t.weight): t.weight for t in tables}.values())


def grow_embeddings(model: Any, vocab_size: int) -> None:
    """Make room for added tokens; new rows are the mean of the old ones."""
    old = model.get_input_embeddings().num_embeddings
    if vocab_size <= old:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for weight in _embedding_tables(model):
            weight[old:] = weight[:old].mean(0)


def reset_embeddings(model: Any, ids: Sequence[int]) -> None:
    """Give ids that a model has never seen the mean of the rows before the first of them."""
    if not ids:
        return
    with torch.no_grad():
        for weight in _embedding_tables(model):
            weight[list(ids)] = weight[: min(ids)].mean(0)


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Put LoRA adapters into a model, in place; they add nothing before they have learned.

    Raises:
        UserError: peft is not installed, or the model has no layer of one of the names.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "language.lora needs peft: install the extra with pip install 'odvla[lora]'"
        ) from error
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for target in config.targets:
        if target not in names:
            raise UserError(f"language.lora.targets: the language model has no {target!r}")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)
