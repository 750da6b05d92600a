"""Attention over a block of keys equals the formula; prefixes are forgotten with their weights."""

import copy

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from odvla.language.causal_lm import LanguageConfig
from odvla.language.kv_cache import MAX_PREFIXES, PrefixStore, RowCache, decoding, grouped_attention


def softmax_attention(query, key, value, mask):
    """The formula, head by head."""
    group = query.shape[1] // key.shape[1]
    found = torch.empty_like(query)
    for h in range(query.shape[1]):
        scores = query[:, h] @ key[:, h // group].transpose(1, 2) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        found[:, h] = scores.softmax(-1) @ value[:, h // group]
    return found.transpose(1, 2)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_grouped_attention_is_the_formula(heads):
    generator = torch.Generator().manual_seed(0)
    G, T, C, E = 3, 5, 11, 8
    query = torch.randn(G, heads[0], T, E, generator=generator)
    key, value = torch.randn(2, G, heads[1], C, E, generator=generator)
    mask = torch.rand(G, 1, T, C, generator=generator) < 0.5
    mask[..., 0] = True
    found, _ = grouped_attention(nn.Module(), query, key, value, mask, scaling=E**-0.5)
    torch.testing.assert_close(found, softmax_attention(query, key, value, mask))
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(G, 1, T, T)
    key, value = key[:, :, :T], value[:, :, :T]
    found, _ = grouped_attention(nn.Module(), query, key, value, None, scaling=E**-0.5)
    torch.testing.assert_close(found, softmax_attention(query, key, value, causal))


def test_attention_of_another_kind_is_refused():
    query = torch.zeros(1, 1, 1, 2)
    with pytest.raises(UserError, match="softcap"):
        grouped_attention(nn.Module(), query, query, query, None, softcap=30.0)


def test_rows_write_and_move_where_they_are():
    cache = RowCache(layers=1, capacity=8)
    states = torch.arange(2 * 3, dtype=torch.float).reshape(2, 1, 3, 1)
    cache.at(torch.tensor([[0, 1, 2], [4, 5, 6]]), 7)
    keys, values = cache.update(states, -states, 0)
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 3, 4, 5]]
    assert torch.equal(values, -keys)
    cache.move([0, 1], [2, 6], [1, 4])
    assert cache.block[0, 0, :, 0, :7, 0].tolist() == [[0, 2, 2, 0, 0, 0, 0], [0, 0, 0, 0, 5, 4, 5]]


def test_a_model_attends_as_before_after_decoding():
    model = LanguageConfig(hidden=16, layers=1, heads=2, attention="eager").build(20).model
    with decoding(model, 10):
        assert model.config._attn_implementation != "eager"
    assert model.config._attn_implementation == "eager"


def test_a_model_that_looks_back_less_far_is_refused():
    model = LanguageConfig(hidden=16, layers=1, heads=2).build(20).model
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"], 8
    message = "looks 8 tokens back, fewer than the 10"
    with pytest.raises(UserError, match=message), decoding(model, 10):
        pass


@pytest.fixture
def language():
    return LanguageConfig(hidden=16, layers=1, heads=2, intermediate=24).build(20)


def stepped(optimiser):
    def change(language):
        steps = optimiser(language.parameters())
        sum(p.square().sum() for p in language.parameters()).backward()
        steps.step()

    return change


def loaded(language):
    changed = {name: 2 * value for name, value in copy.deepcopy(language.state_dict()).items()}
    language.load_state_dict(changed)


def past_versions(language):  # as DeepSpeed and moving averages do
    for parameter in language.parameters():
        parameter.data.mul_(1.5)


def one_replaced(language):
    language.model.model.norm.weight = nn.Parameter(torch.full((16,), 2.0))


@pytest.mark.parametrize(
    "change",
    [
        stepped(torch.optim.AdamW),
        stepped(lambda p: torch.optim.SGD(p, lr=0.1)),
        loaded,
        past_versions,
        one_replaced,
        lambda language: language.double(),
    ],
    ids=["adamw", "sgd", "load_state_dict", "data", "replaced", "dtype"],
)
def test_changed_weights_lose_their_prefixes(language, change):
    store = PrefixStore()
    store.of(language)[1, 2] = torch.zeros(1)
    assert (1, 2) in store.of(language)
    change(language)
    assert (1, 2) not in store.of(language)


def test_precision_is_part_of_a_prefix(language):
    store = PrefixStore()
    store.of(language)[1, 2] = torch.zeros(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (1, 2) not in store.of(language)


def test_few_prefixes_are_kept_and_none_of_what_has_no_version(language):
    store = PrefixStore()
    for k in range(MAX_PREFIXES + 3):
        store.of(language)[(k,)] = torch.zeros(1)
    assert len(store.of(language)) == MAX_PREFIXES
    with torch.inference_mode():
        unversioned = LanguageConfig(hidden=16, layers=1, heads=2).build(20)
    assert store.of(unversioned) is None
