"""Cases c and d: the track decoder, and the life of tracks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parity.golden import Check, Golden, under
from odvla.queries.box_codes import boxes_of_codes
from odvla.queries.track_learning import Draws, training_tracks
from odvla.queries.track_life import (
    EGO,
    NOBODY,
    MemoryBank,
    QueryInteraction,
    Range,
    TrackRules,
    Tracks,
    give_ids,
    move_references,
)
from odvla.queries.trackformer import TrackFormer, TrackFormerConfig
from odvla.types import BevGrid, SceneFeatures
from odvla.weight_names import to_odvla


def trackformer_config(model: dict[str, Any]) -> TrackFormerConfig:
    """Our settings for the reference's `UniAD` model."""
    head = model["pts_bbox_head"]
    decoder = head["transformer"]["decoder"]
    layer = decoder["transformerlayers"]
    among, cross = layer["attn_cfgs"]
    low, high = model["pc_range"][:3], model["pc_range"][3:]
    return TrackFormerConfig(
        queries=model["num_query"],
        layers=decoder["num_layers"],
        heads=among["num_heads"],
        hidden=layer["feedforward_channels"],
        points=cross.get("num_points", 4),
        classes=model["num_classes"],
        past_steps=head["past_steps"],
        future_steps=head["fut_steps"],
        z_range_m=(low[2], high[2]),
        bank_length=model["mem_args"]["memory_bank_len"],
        interaction_dropout=model["qim_args"]["merger_dropout"],
        rules=TrackRules(model["score_thresh"], model["filter_score_thresh"]),
        compat="uniad",
    )


def bev_grid(range_m: list[float], bev: list[int]) -> BevGrid:
    """The grid of a case."""
    rows, columns = bev
    return BevGrid(range_m[0], range_m[1], (range_m[3] - range_m[0]) / columns, rows, columns)


def load_trackformer(module: TrackFormer, weights: dict[str, Tensor]) -> None:
    """Fill the module from a reference state dict."""
    module.load_state_dict(under(to_odvla(weights), "queries.track."))
    module.eval()


def decoder(golden: Golden, stem: str) -> Iterator[Check]:
    """Case c: the decoder with box refinement, its heads, and decoding."""
    given = golden.tensors(stem)
    facts, model = golden.facts(stem), golden.facts("uniad_small_weights_rest")["model_cfg"]
    rows, columns = facts["bev"]
    grid = bev_grid(model["pc_range"], facts["bev"])
    module = trackformer_config(model).build(facts["embed_dims"], grid)
    load_trackformer(module, golden.weights)
    features = SceneFeatures(
        levels=(),
        bev=given["in/bev_embed"].transpose(0, 1).unflatten(1, (rows, columns)),
        grid=grid,
    )
    tracks = module.fresh(1)
    yield Check("query_embedding", tracks.query[0], given["in/query_embedding"])
    reference = given["in/ref_pts_unsigmoid"]
    yield Check("ref_pts_unsigmoid", tracks.reference[0], reference)
    found = module.detect(features, replace(tracks, reference=reference[None]))
    chosen = given["in/selected_query_rows"]
    for name, layers in (
        ("all_cls_scores", found.logits),
        ("all_bbox_preds", found.codes),
        ("all_past_traj_preds", found.past),
        ("query_feats", found.embeddings),
        ("inter_references", found.references),
    ):
        yield Check(f"{name}_sel", torch.stack(layers)[:, :, chosen], given[f"out/{name}_sel"])
    yield Check("last_cls_scores", found.logits[-1], given["out/last_cls_scores"])
    yield Check("last_bbox_preds", found.codes[-1], given["out/last_bbox_preds"])
    yield Check("last_query_feats", found.embeddings[-1], given["out/last_query_feats"])
    yield Check("last_ref_points", found.reference, given["out/last_ref_points"])
    yield from _decoded(module, module.update(tracks, found), given)


def _decoded(module: TrackFormer, tracks: Tracks, given: dict[str, Tensor]) -> Iterator[Check]:
    """What the box coder makes of the best queries, were all of them tracks."""
    wanted = under(given, "out/coder_")
    scores = tracks.logits.sigmoid().amax(-1)
    slots, inside = module.best(scores, tracks.codes, torch.ones_like(tracks.mask))
    order = _settle_ties(slots[0], scores[0], wanted["bbox_index"])
    yield Check("coder_bbox_index", order, wanted["bbox_index"], "index")
    placed = {int(slot): place for place, slot in enumerate(slots[0].tolist())}
    mask = inside[0][[placed[int(slot)] for slot in order.tolist()]]
    yield Check("coder_mask", mask.to(wanted["mask"].dtype), wanted["mask"], "index")
    labels = tracks.logits[0].argmax(-1)
    yield Check("coder_labels", labels[order], wanted["labels"], "index")
    yield Check("coder_scores", scores[0][order], wanted["scores"])
    yield Check("coder_track_scores", scores[0][order], wanted["track_scores"])
    yield Check("coder_bboxes", uniad_boxes(tracks.codes[0][order]), wanted["bboxes"])


def _settle_ties(slots: Tensor, scores: Tensor, wanted: Tensor, tie: float = 1e-5) -> Tensor:
    """Slots in the recorded order where only scores within `tie` of each other stand otherwise."""
    if slots.shape != wanted.shape or set(slots.tolist()) != set(wanted.tolist()):
        return slots
    close = (scores[slots] - scores[wanted]).abs() <= tie
    return torch.where(close, wanted, slots)


def uniad_boxes(codes: Tensor) -> Tensor:
    """Codes [..., 10] as the reference prints boxes: as ours, with its own yaw."""
    yaw = torch.atan2(codes[..., 6:7], codes[..., 7:8])
    return torch.cat([boxes_of_codes(codes)[..., :6], yaw, codes[..., 8:]], -1)


def track_life(golden: Golden, stem: str) -> Iterator[Check]:
    """Case d: births and deaths, memory bank and query interaction over a clip, and motion."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    dim, rules = facts["embed_dims"], facts["tracker"]
    bank = MemoryBank(dim).eval()
    bank.load_state_dict(under(given, "weight/memory_bank."))
    bank.save_period = facts["save_period"]
    interaction = QueryInteraction(dim, dropout=facts["qim_args"]["merger_dropout"]).eval()
    interaction.load_state_dict(under(given, "weight/query_interact."))
    life = TrackRules(rules["score_thresh"], rules["filter_score_thresh"], rules["miss_tolerance"])
    fresh = bare_tracks(given["in/init_query"], facts["mem_bank_len"])
    tracks, next_id = fresh, torch.zeros(1, dtype=torch.int64)
    for frame in range(facts["frames"]):
        name = f"f{frame}/"
        inputs, wanted = under(given, f"{name}in/"), under(given, f"{name}out/")
        ids = tracks.ids.clone()
        ids[:, facts["sdc_slot"]] = EGO
        tracks = replace(
            tracks,
            ids=ids,
            scores=inputs["scores"][None],
            embedding=inputs["output_embedding"][None],
        )
        tracks, next_id = give_ids(tracks, next_id, life)
        yield Check(f"{name}obj_idxes", tracks.ids[0], wanted["tracker_obj_idxes"], "index")
        missed = wanted["tracker_disappear_time"]
        yield Check(f"{name}disappear_time", tracks.missed[0], missed, "index")
        active = (tracks.ids >= 0) & (tracks.scores >= life.keep)
        mask = wanted["active_mask"]
        yield Check(f"{name}active", active[0].to(mask.dtype), mask, "index")
        tracks = bank(tracks)
        lives = tracks.ids[0] >= 0
        yield from _bank_checks(name, tracks, lives, wanted)
        carried = interaction(tracks.pick(tracks.ids >= 0))
        tracks = fresh.cat(carried)
        yield Check(f"{name}qim_obj_idxes", tracks.ids[0], wanted["qim_obj_idxes"], "index")
        yield Check(f"{name}qim_query", tracks.query[0], wanted["qim_query"])
    yield from _training_step(given, facts, bank, interaction)
    yield from _motion(given, golden)


def _bank_checks(
    name: str, tracks: Tracks, lives: Tensor, wanted: dict[str, Tensor]
) -> Iterator[Check]:
    empty = wanted["mb_mem_padding_mask"]
    yield Check(f"{name}bank_empty", tracks.bank_empty[0].to(empty.dtype), empty, "index")
    yield Check(f"{name}bank_embedding", tracks.embedding[0], wanted["mb_output_embedding"])
    if "mb_save_period" in wanted:
        yield Check(f"{name}save_period", tracks.wait[0], wanted["mb_save_period"])
    stored = wanted["mb_mem_bank"]
    bank = tracks.bank[0]
    yield Check(f"{name}bank", bank if len(bank) == len(stored) else bank[lives], stored)


def bare_tracks(query: Tensor, bank: int) -> Tracks:
    """Queries [Q, 2 C] of one scene that are no tracks yet."""
    count, dim = len(query), query.shape[1] // 2
    none = torch.full((1, count), NOBODY, dtype=torch.int64)
    zero = torch.zeros(1, count)
    return Tracks(
        query=query[None],
        reference=torch.zeros(1, count, 3),
        embedding=torch.zeros(1, count, dim),
        logits=torch.zeros(1, count, 1),
        codes=torch.zeros(1, count, 10),
        scores=zero,
        ids=none,
        missed=torch.zeros_like(none),
        bank=torch.zeros(1, count, bank, dim),
        bank_empty=torch.ones(1, count, bank, dtype=torch.bool),
        wait=zero,
        iou=zero,
        matched=none,
        mask=torch.ones(1, count, dtype=torch.bool),
    )


def _training_step(
    given: dict[str, Tensor], facts: dict[str, Any], bank: nn.Module, interaction: nn.Module
) -> Iterator[Check]:
    """A step in training mode, with the recorded draws instead of random ones."""
    inputs, wanted = under(given, "train/in/"), under(given, "train/out/")
    tracks = replace(
        bare_tracks(inputs["query"], facts["mem_bank_len"]),
        ids=inputs["obj_idxes"][None],
        iou=inputs["iou"][None],
        scores=inputs["scores"][None],
        embedding=inputs["output_embedding"][None],
        bank=inputs["mem_bank"][None],
        bank_empty=inputs["mem_padding_mask"][None].bool(),
    )
    bank.train()
    interaction.train()
    tracks = bank(tracks)
    yield from _bank_checks("train/", tracks, tracks.ids[0] >= 0, wanted)
    # The draws were made for the tracks that overlap well, and for those of them that were kept.
    good = ((tracks.ids >= 0) & (tracks.iou > 0.5))[0].nonzero()[:, 0]
    kept = inputs["draw_rand_like_scores"] > facts["qim_args"]["random_drop"]
    keep, accompany = torch.zeros(2, *tracks.ids.shape, dtype=torch.bool)
    keep[0, good] = kept
    accompany[0, good[kept]] = inputs["draw_bernoulli_fp"].bool()
    carried = interaction(training_tracks(tracks, Draws(keep, accompany)))
    merged = bare_tracks(given["in/init_query"], facts["mem_bank_len"]).cat(carried)
    yield Check("train/qim_obj_idxes", merged.ids[0], wanted["qim_obj_idxes"], "index")
    yield Check("train/qim_query", merged.query[0], wanted["qim_query"])
    yield Check("train/qim_scores", merged.scores[0], wanted["qim_scores"])


def _motion(given: dict[str, Tensor], golden: Golden) -> Iterator[Check]:
    """Reference points from one frame to the next."""
    low, high = [
        tuple(part)
        for part in torch.tensor(golden.facts("uniad_small_weights_rest")["model_cfg"]["pc_range"])
        .view(2, 3)
        .tolist()
    ]
    for name in sorted({key.split("/")[0] for key in given if key.startswith("velo")}):
        inputs = under(given, f"{name}/in/")
        moved = move_references(
            inputs["ref_pts"][None],
            inputs["velocity"][None],
            pose_of(inputs["l2g_r1"], inputs["l2g_t1"]),
            pose_of(inputs["l2g_r2"], inputs["l2g_t2"]),
            inputs["time_delta"],
            Range(low, high),
        )
        yield Check(f"{name}_ref_pts", moved, given[f"{name}/out/ref_pts"])


def pose_of(rotation: Tensor, translation: Tensor) -> Tensor:
    """Recorded poses (row vectors: p @ r + t) as float64 matrices [B, 4, 4]."""
    pose = torch.eye(4, dtype=torch.float64).repeat(rotation.view(-1, 3, 3).shape[0], 1, 1)
    pose[:, :3, :3] = rotation.view(-1, 3, 3).transpose(1, 2)
    pose[:, :3, 3] = translation.view(-1, 3)
    return pose
