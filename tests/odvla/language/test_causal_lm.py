"""The language model: Hugging Face's loss, room for added tokens, weights from a folder."""

import importlib.util
import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers import modeling_flash_attention_utils as flash

from odvla.errors import UserError
from odvla.freezing import FreezePlan
from odvla.language.causal_lm import CausalLM, LanguageConfig, LoraConfig, qwen2_5
from odvla.language.generation import generate
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


@pytest.mark.parametrize(("lengths", "calls"), [((10, 4, 7, 3, 9), 3), ((10, 10, 9, 10, 10), 1)])
def test_groups_of_like_length_give_the_same_loss_and_gradients(lengths, calls):
    torch.manual_seed(0)
    whole = LanguageConfig(**SMALL).build(40)
    grouped = LanguageConfig(**SMALL, length_groups=3).build(40)
    grouped.load_state_dict(whole.state_dict())
    ids, found, places = torch.randint(40, (5, 10)), [], []
    grouped.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: places.append(kwargs["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    for language in (whole, grouped):
        batch = spliced(language, ids, lengths, ids.clone())
        batch.labels[~batch.attention_mask] = IGNORE_INDEX
        loss, logits, labels = language(batch)
        loss.backward()
        found.append((loss, logits, labels, [p.grad for p in language.parameters()]))
    torch.testing.assert_close(found[1], found[0])
    assert len(places) == calls
    # In groups: the two shortest at 4 places, then two at 9, the longest at 10.
    assert sum(places) == (2 * 4 + 2 * 9 + 10 if calls == 3 else 50)


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at-all/really", "language.pretrained nowhere/at-all/really is not a folder"),
        (
            "Nobody/NoModel-0.5B",
            "Nobody/NoModel-0.5B is not on this machine; fetch it with: "
            "hf download Nobody/NoModel-0.5B",
        ),
    ],
)
def test_a_model_that_is_not_here_is_named_with_the_command_that_fetches_it(
    name, message, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        LanguageConfig(pretrained=name).build(40)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name} is not a model folder: .* no config"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"its config\.json is broken"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)
    (tmp_path / "config.json").write_text(Qwen2Config().to_json_string())
    with pytest.raises(UserError, match=f"{tmp_path.name} cannot be loaded"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)


# Parameters of the published models, embeddings of the input counted once where they are tied.
@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.5B", 494_032_768), ("3B", 3_085_938_688), ("7B", 7_615_616_512)],
)
def test_published_sizes_build_without_their_files(size, parameters):
    with torch.device("meta"):
        language = qwen2_5(size).build(151_682)
    assert sum(p.numel() for p in language.parameters()) == parameters
    assert language.max_positions == 32_768
    assert {p.device.type for p in language.parameters()} == {"meta"}


def test_there_are_no_other_sizes():
    with pytest.raises(UserError, match=r"comes in 0\.5B, 3B, 7B, not '13B'"):
        qwen2_5("13B")


def saved(kind, folder, **more):
    """A model with random weights, larger than usual: what is left out then shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(kind(**sizes | heads | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (LlamaConfig, {}),
        (MistralConfig, {}),
        (GPTNeoXConfig, {}),
        (GemmaConfig, {"head_dim": 8}),
        (CohereConfig, {"pad_token_id": 0}),  # scales its logits
        (GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    ],
)
def test_any_causal_lm_of_hugging_face(kind, more, tmp_path):
    saved(kind, tmp_path, **more)
    language = LanguageConfig(pretrained=str(tmp_path)).build(40)
    ids = torch.randint(40, (2, 6))
    batch = spliced(language, ids, [6, 6], ids.clone())
    loss, _, _ = language(batch)
    theirs = language.model(input_ids=ids, labels=ids)
    torch.testing.assert_close(loss, theirs.loss)
    assert len(language.layers) == 2


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (BertConfig, {}, "kind bert cannot be used here: its tokens see what follows them"),
        (FalconConfig, {}, "kind falcon cannot be used here: "),
        (
            DeepseekV3Config,  # keys and values of different widths
            {
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 4,
            },
            "kind deepseek_v3 cannot be used here: ",
        ),
    ],
)
def test_a_kind_of_model_that_would_go_wrong_is_refused(kind, more, message, tmp_path):
    saved(kind, tmp_path, **more)
    with pytest.raises(UserError, match=f"language.pretrained {tmp_path}: a model of {message}"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)


def test_logits_that_are_more_than_the_heads_are_noticed(tmp_path, monkeypatch):
    saved(CohereConfig, tmp_path, pad_token_id=0)
    monkeypatch.setattr(CausalLM, "scaled", lambda self, logits: logits)
    with pytest.raises(UserError, match="its logits are not those of its head"):
        LanguageConfig(pretrained=str(tmp_path)).build(40)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree(attention):
    torch.manual_seed(0)
    plain = LanguageConfig(**SMALL).build(40)
    other = LanguageConfig(**SMALL, attention=attention, gradient_checkpointing=True).build(40)
    other.load_state_dict(plain.state_dict())
    ids = torch.randint(40, (2, 6))
    losses = []
    for language in (plain, other.train()):
        language.zero_grad()
        loss = language(spliced(language, ids, [6, 4], ids))[0]
        loss.backward()
        losses.append((loss, language.model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])
    assert other.model.config._attn_implementation == attention


def test_flash_attention_that_cannot_run_is_refused():
    if importlib.util.find_spec("flash_attn") and torch.cuda.is_available():
        pytest.skip("it can run here")
    with pytest.raises(UserError, match="needs a GPU and the package flash-attn"):
        LanguageConfig(**SMALL, attention="flash_attention_2").build(40)


@pytest.fixture
def flash_kernel(monkeypatch):
    """flash-attention's place in transformers, taken by a kernel that any CPU can run.

    It refuses what the real one refuses, and shows that what we call it with is what it takes; that
    the real one computes the same is its own tests' affair.
    """
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        calls.append((tuple(q.shape), causal))
        found = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),  # [B, S, H, E] in and out
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=True,
        )
        return found.transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, *, softmax_scale=None, causal=False, **kwargs):
        raise AssertionError("batches are to be run whole: nothing asks for packed sequences")

    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_fn", flash_attn_func, raising=False)
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_attn_varlen_func, raising=False)
    for name in ("_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        process = flash._lazy_define_process_function(flash_attn_func)
        monkeypatch.setattr(flash, name, process, raising=False)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_flash_attention_gets_what_it_takes_and_gives_the_same_loss(
    flash_kernel, groups, checkpointing
):
    torch.manual_seed(0)
    language = LanguageConfig(
        **SMALL, length_groups=groups, gradient_checkpointing=checkpointing
    ).build(40)
    language.train()
    ids, lengths = torch.randint(40, (4, 12)), [12, 3, 4, 9]
    labels = torch.where(torch.arange(12) < torch.tensor(lengths)[:, None], ids, IGNORE_INDEX)
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        language.model.config._attn_implementation = attention
        language.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = language(spliced(language, ids, lengths, labels))[0]
        loss.backward()
        found.append((loss, language.model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    assert all(causal for _, causal in flash_kernel)
    rows = {shape[:2] for shape, _ in flash_kernel}
    assert rows == ({(4, 12)} if groups == 1 else {(2, 4), (2, 12)})
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=1e-3)  # bfloat16


def test_flash_attention_in_fp32_is_refused(flash_kernel):
    language = LanguageConfig(**SMALL).build(40)
    language.model.config._attn_implementation = "flash_attention_2"
    ids = torch.randint(40, (2, 6))
    with pytest.raises(UserError, match=r"set trainer\.precision=bf16-mixed"):
        language(spliced(language, ids, [6, 4], ids))


def test_with_flash_attention_plans_are_written_as_without(flash_kernel):
    """Decoding has an attention of its own."""
    torch.manual_seed(0)
    language = LanguageConfig(**SMALL).build(40)
    ids = torch.randint(40, (2, 6))
    written = []
    for attention in ("sdpa", "flash_attention_2"):
        language.model.config._attn_implementation = attention
        prompts = spliced(language, ids, [6, 6], ids)
        written.append(generate(language, prompts, 1, max_new_tokens=8))
        assert language.model.config._attn_implementation == attention
    assert written[0] == written[1]
    assert not flash_kernel


def test_rows_of_ids_that_were_never_trained_start_as_the_mean(tmp_path):
    torch.manual_seed(0)
    LanguageConfig(**SMALL, tie_embeddings=False).build(40).model.save_pretrained(tmp_path)
    config = LanguageConfig(pretrained=str(tmp_path))
    plain, fresh = config.build(37), config.build(37, (35, 36))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(m.model, name)().weight for m in (plain, fresh))
        torch.testing.assert_close(new[35:37], old[:35].mean(0).expand(2, -1))
        assert torch.equal(new[:35], old[:35])
        assert torch.equal(new[37:], old[37:])


def test_adapters_start_as_nothing_and_learn_alone():
    torch.manual_seed(0)
    plain = LanguageConfig(**SMALL).build(40)
    adapted = LanguageConfig(**SMALL, lora=LoraConfig(rank=2)).build(40)
    renamed = {n.replace(".base_layer.", "."): n for n in adapted.state_dict()}
    adapted.load_state_dict({renamed[n]: t for n, t in plain.state_dict().items()}, strict=False)
    chosen = FreezePlan(("*lora_*",)).apply(adapted)
    assert len(chosen) == 2 * 2 * 7  # matrices, layers, targets
    ids = torch.randint(40, (2, 6))
    losses = [model(spliced(model, ids, [6, 4], ids))[0] for model in (plain, adapted)]
    torch.testing.assert_close(losses[0], losses[1])
    losses[1].backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == chosen
    with pytest.raises(UserError, match="has no 'wq'"):
        LanguageConfig(**SMALL, lora=LoraConfig(targets=("wq",))).build(40)
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoraConfig(rank=0)
