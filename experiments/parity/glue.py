"""Case g: projectors, splicing, loss and greedy text of a small language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parity.golden import Check, Golden, under
from odvla.language.causal_lm import CausalLM, LanguageConfig
from odvla.language.generation import generate
from odvla.language.splice import Spliced, splice
from odvla.projectors import ProjectorConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.types import Frames, SceneFeatures, Talk

STREAMS = ("scene", "track", "map")
NO_TOKEN = -1  # an object that no track is


@dataclass(frozen=True)
class Glue:
    """The recorded model."""

    language: CausalLM
    projectors: Mapping[str, nn.Module]  # by stream


def build_glue(golden: Golden, stem: str) -> Glue:
    """The model of a case with its recorded weights."""
    sizes = golden.facts(stem)["config"]
    weights = under(golden.tensors(stem), "weight/")
    language = LanguageConfig(
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        intermediate=sizes["intermediate_size"],
        rope_theta=sizes["rope_theta"],
        tie_embeddings=sizes["tie_word_embeddings"],
    ).build(sizes["vocab_size"])
    own = {name: t for name, t in weights.items() if "mm_projector" not in name}
    if sizes["tie_word_embeddings"]:
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    language.model.load_state_dict(own)
    projectors = {}
    for stream in STREAMS:
        config = ProjectorConfig(sizes["mm_projector_type"])
        projectors[stream] = config.build(sizes["mm_hidden_size"], language.hidden)
        projectors[stream].load_state_dict(under(weights, f"model.mm_projector_{stream}."))
    return Glue(language.eval(), projectors)


def glue(golden: Golden, stem: str) -> Iterator[Check]:
    """Every recorded splice of the case, alone and side by side, padded left and right."""
    facts, tensors = golden.facts(stem), golden.tensors(stem)
    model = build_glue(golden, stem)
    names = sorted({name.split("/")[0] for name in tensors} - {"weight"})
    alone: dict[str, Spliced] = {}
    for name in names:
        given, wanted = under(tensors, f"{name}/in/"), under(tensors, f"{name}/out/")
        tokens = _tokens(golden, name, given)
        with torch.no_grad():
            projected = {stream: model.projectors[stream](rows) for stream, rows in tokens.items()}
        for stream, rows in projected.items():
            if f"{stream}_feature" in wanted:
                yield Check(f"{name}/{stream}_feature", rows, wanted[f"{stream}_feature"])
        case = facts["cases"].get(name, {})
        spliced = splice_case(model, given, case, projected, length=_length(case))
        yield Check(f"{name}/inputs_embeds", spliced.embeds, wanted["inputs_embeds"])
        if "attention_mask" in wanted:
            mask = spliced.attention_mask.to(wanted["attention_mask"].dtype)
            yield Check(f"{name}/attention_mask", mask, wanted["attention_mask"], "index")
        if "labels" in wanted:
            yield Check(f"{name}/labels", spliced.labels, wanted["labels"], "index")
        left = splice_case(model, given, case, projected, length=_length(case), pad_left=True)
        yield from _same_rows(f"{name}/left", left, spliced)
        yield from _spoken(name, model, spliced, left, wanted)
        alone[name] = spliced
    yield from _together(golden, stem, model, tensors, names, alone)


def _length(case: Mapping[str, Any]) -> int | None:
    return (case.get("config") or {}).get("tokenizer_model_max_length")


def _tokens(golden: Golden, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens of each stream [N, C] before the projectors."""
    things = torch.cat([given["chosen_output_query_things"], given["output_query_stuff"]])
    tokens = {"map": things}
    if "scene_pooled" in given:
        tokens["scene"] = given["scene_pooled"]
    else:
        level = golden.tensors(f"g_img_feat_2D_{name}")["img_feat_2D"]  # [1, cameras, C, h, w]
        sampler = SceneSamplerConfig().build(level.shape[2], None)
        frames: Frames = None  # type: ignore[assignment]  # pooling looks at features alone
        tokens["scene"] = sampler(SceneFeatures((level,)), frames)[0].feats[0]
    if "track_query_embeddings" in given:
        tokens["track"] = given["track_query_embeddings"]
    return tokens


def _talk(given: Mapping[str, Tensor]) -> Talk:
    ids = given["input_ids"]
    return Talk(
        input_ids=ids,
        labels=given.get("labels", ids),
        mask=given.get("attention_mask", torch.ones_like(ids)).bool(),
        prompt_length=torch.tensor([ids.shape[1]] * len(ids)),
        frame_index=torch.zeros(len(ids), dtype=torch.int64),
        object_boxes=torch.zeros(len(ids), 9),
        conversations=(),
    )


def _object(case: Mapping[str, Any]) -> int:
    """Row of the track that the case asks about."""
    rows = case.get("track_gt_inds_to_embed_idx") or {}
    return rows.get(str(case.get("qa_instance_ind")), NO_TOKEN)


def splice_case(
    model: Glue,
    given: Mapping[str, Tensor],
    case: Mapping[str, Any],
    projected: Mapping[str, Tensor],
    *,
    length: int | None,
    pad_left: bool = False,
) -> Spliced:
    """The case through our splice."""
    talk = _talk(given)
    streams = {
        stream: (rows[None], torch.ones(1, len(rows), dtype=torch.bool))
        for stream, rows in projected.items()
    }
    chosen = torch.tensor([_object(case)] * len(talk.input_ids))
    text = model.language.embed(talk.input_ids.clamp(min=0))
    return splice(text, talk, streams, chosen, pad_left=pad_left, max_length=length)


def _same_rows(name: str, ours: Spliced, other: Spliced) -> Iterator[Check]:
    """What two paddings of the same conversations hold, padding aside."""
    for row in range(len(ours.embeds)):
        here, there = ours.attention_mask[row], other.attention_mask[row]
        label = f"{name}/row{row}"
        yield Check(f"{label}/embeds", ours.embeds[row][here], other.embeds[row][there])
        for field in ("labels", "position_ids"):
            mine, theirs = getattr(ours, field)[row][here], getattr(other, field)[row][there]
            yield Check(f"{label}/{field}", mine, theirs, "index")


def _spoken(
    name: str, model: Glue, spliced: Spliced, left: Spliced, wanted: Mapping[str, Tensor]
) -> Iterator[Check]:
    """Logits, loss and greedy ids, where they were recorded."""
    language = model.language
    if "logits" in wanted:
        states = language.model.base_model(inputs_embeds=spliced.embeds).last_hidden_state
        yield Check(f"{name}/logits", language.head(states), wanted["logits"])
    if "loss" in wanted:
        yield Check(f"{name}/loss", language(spliced)[0], wanted["loss"], "loss")
    if "generated_ids" in wanted:
        theirs = wanted["generated_ids"]
        ours = generate(language, left, NO_TOKEN, max_new_tokens=theirs.shape[1])
        yield Check(f"{name}/generated_ids", torch.tensor(ours), theirs, "index")


def _together(
    golden: Golden,
    stem: str,
    model: Glue,
    tensors: dict[str, Tensor],
    names: list[str],
    alone: Mapping[str, Spliced],
) -> Iterator[Check]:
    """All uncut cases as one batch: every row must be what it is alone."""
    cases = {name: golden.facts(stem)["cases"].get(name, {}) for name in names}
    names = [name for name in names if _length(cases[name]) is None]
    talks = {name: _talk(under(tensors, f"{name}/in/")) for name in names}
    tokens = {name: _tokens(golden, name, under(tensors, f"{name}/in/")) for name in names}
    streams = {}
    for stream in STREAMS:
        rows = [tokens[name].get(stream, torch.zeros(0, 1)) for name in names]
        width = max(row.shape[1] for row in rows)
        feats = torch.zeros(len(names), max(map(len, rows)), width)
        for number, row in enumerate(rows):
            feats[number, : len(row)] = row
        valid = torch.arange(feats.shape[1]) < torch.tensor([[len(row)] for row in rows])
        with torch.no_grad():
            streams[stream] = (model.projectors[stream](feats), valid)
    longest = max(talk.input_ids.shape[1] for talk in talks.values())
    parts = [_widened(talk, number, longest) for number, talk in enumerate(talks.values())]
    joined = _talk({"input_ids": torch.cat([part.input_ids for part in parts])})
    joined = replace(
        joined,
        labels=torch.cat([part.labels for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        frame_index=torch.cat([part.frame_index for part in parts]),
    )
    objects = [_object(cases[name]) for name in names for _ in talks[name].input_ids]
    text = model.language.embed(joined.input_ids.clamp(min=0))
    spliced = splice(text, joined, streams, torch.tensor(objects))
    done = 0
    for name in names:
        count = len(talks[name].input_ids)
        ours = Spliced(**{key: value[done : done + count] for key, value in vars(spliced).items()})
        yield from _same_rows(f"batch of all/{name}", ours, alone[name])
        done += count


def _widened(talk: Talk, frame: int, length: int) -> Talk:
    """A talk about another row, padded to a length."""

    def pad(tensor: Tensor, value: int | bool) -> Tensor:
        missing = length - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (0, missing), value=value)

    return replace(
        talk,
        input_ids=pad(talk.input_ids, 0),
        labels=pad(talk.labels, 0),
        mask=pad(talk.mask, False),
        frame_index=talk.frame_index + frame,
    )
