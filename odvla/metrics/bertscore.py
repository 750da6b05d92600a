"""BERTScore with a model from a local folder: nothing is ever downloaded.

Every token of one text is matched to the most similar one of the other, by the cosine of their
contextual embeddings; recall averages over the reference's tokens, precision over the prediction's,
F1 is their harmonic mean.

Which layer's embeddings, and whether scores are rescaled by a baseline, changes the number by more
than any model does. Here: no rescaling, no weights of rarity, special tokens left out, the layer is
told by the caller (the published default of bert-base-uncased is 9, of roberta-large 17).

Source: Zhang et al., BERTScore, ICLR 2020, equations 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odvla.errors import UserError


@dataclass(frozen=True)
class BertScores:
    """Means over all pairs, times 100."""

    precision: float
    recall: float
    f1: float
    model: str
    layer: int


def match(
    predicted: Tensor, references: Tensor, predicted_mask: Tensor, reference_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 [n] of embeddings [n, L, C] and [n, M, C] with masks [n, L], [n, M].

    A text without a token scores 0.
    """
    similarity = torch.einsum(
        "nlc,nmc->nlm",
        torch.nn.functional.normalize(predicted, dim=-1),
        torch.nn.functional.normalize(references, dim=-1),
    )
    both = predicted_mask[:, :, None] & reference_mask[:, None, :]
    similarity = similarity.masked_fill(~both, -2.0)
    precision = _mean(similarity.amax(2), predicted_mask)
    recall = _mean(similarity.amax(1), reference_mask)
    total = precision + recall
    f1 = torch.where(total > 0, 2 * precision * recall / total.clamp_min(1e-12), 0.0)
    empty = ~predicted_mask.any(1) | ~reference_mask.any(1)
    return tuple(values.masked_fill(empty, 0.0) for values in (precision, recall, f1))  # type: ignore[return-value]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def bert_score(
    predicted: Sequence[str],
    references: Sequence[str],
    folder: Path,
    layer: int,
    batch_size: int = 32,
) -> BertScores:
    """Score texts against one reference each.

    Args:
        predicted: texts.
        references: as many.
        folder: a Hugging Face encoder with its tokenizer.
        layer: whose output is compared; 0 is the embedding.
        batch_size: texts at once.

    Raises:
        UserError: the folder holds no model, or the model has no such layer.
        ValueError: nothing to score, or the lists differ in length.
    """
    from transformers import AutoModel, AutoTokenizer

    if len(predicted) != len(references) or not predicted:
        raise ValueError(f"got {len(predicted)} texts and {len(references)} references to score")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model for BERTScore: it has no config.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the model for BERTScore in {folder} cannot be loaded: {first}") from error
    layers = int(model.config.num_hidden_layers)
    if not 0 <= layer <= layers:
        raise UserError(f"the model in {folder} has layers 0 to {layers}, not {layer}")
    parts: list[Tensor] = []
    for start in range(0, len(predicted), batch_size):
        said = _embed(model, tokenizer, predicted[start : start + batch_size], layer)
        true = _embed(model, tokenizer, references[start : start + batch_size], layer)
        parts.append(torch.stack(match(said[0], true[0], said[1], true[1]), dim=1))
    means = 100 * torch.cat(parts).double().mean(0)
    precision, recall, f1 = means.tolist()
    return BertScores(precision, recall, f1, model=folder.name, layer=layer)


@torch.no_grad()
def _embed(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> tuple[Tensor, Tensor]:
    """Embeddings [n, L, C] of a layer, and which of them are words."""
    limit = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
    found = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=limit,
        return_tensors="pt",
        return_special_tokens_mask=True,
    )
    special = found.pop("special_tokens_mask").bool()
    hidden = model(**found, output_hidden_states=True).hidden_states[layer]
    return hidden, found["attention_mask"].bool() & ~special
