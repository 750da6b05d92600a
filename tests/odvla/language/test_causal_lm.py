"""The language model: Hugging Face's loss, room for added tokens, weights from a folder."""

import pytest
import torch

from odvla.errors import UserError
from odvla.language.causal_lm import LanguageConfig
from odvla.language.splice import Spliced
from odvla.types import IGNORE_INDEX

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 32}


def spliced(language, ids, lengths, labels):
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    embeds = language.embed(ids) * mask[..., None]
    return Spliced(embeds, mask, positions, labels)


def test_the_loss_is_hugging_faces_without_logits_where_no_label_is():
    torch.manual_seed(0)
    language = LanguageConfig(**SMALL).build(40)
    ids = torch.randint(40, (3, 10))
    lengths = [10, 4, 7]
    batch = spliced(language, ids, lengths, ids.clone())
    batch.labels[~batch.attention_mask] = IGNORE_INDEX
    batch.labels[:, :3] = IGNORE_INDEX
    loss, logits, labels = language(batch)
    theirs = language.model(
        inputs_embeds=batch.embeds,
        attention_mask=batch.attention_mask.long(),
        labels=batch.labels,
    )
    torch.testing.assert_close(loss, theirs.loss)
    due = batch.labels[:, 1:] != IGNORE_INDEX
    assert logits.shape == (7 + 1 + 4, 40)
    torch.testing.assert_close(logits, theirs.logits[:, :-1][due])
    assert torch.equal(labels, batch.labels[:, 1:][due])


def test_a_saved_model_is_loaded_and_grows_by_mean_rows(tmp_path):
    torch.manual_seed(0)
    first = LanguageConfig(**SMALL).build(40)
    first.model.save_pretrained(tmp_path)
    config = LanguageConfig(pretrained=str(tmp_path))
    same, grown = config.build(40), config.build(43)
    assert same.hidden == 16
    for name, tensor in first.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    old, new = first.head.weight, grown.head.weight
    assert torch.equal(new[:40], old)
    torch.testing.assert_close(new[40:], old.mean(0).expand(3, -1))
    assert grown.head.weight is grown.model.get_input_embeddings().weight
    assert grown.head.out_features == 43


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 15}, "language.hidden 15"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(UserError, match=message):
        LanguageConfig(**(SMALL | change))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name} is not a model folder"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)
