"""Case k: the whole vision tower over two scenes, from images to what the language model gets."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.parity import maps
from experiments.parity.golden import Check, Golden, under
from experiments.parity.tracks import (
    bev_grid,
    load_trackformer,
    pose_of,
    trackformer_config,
    uniad_boxes,
)
from experiments.parity.vision import bevformer_config, load_encoder, resnet_config
from odvla.encoders.bev_motion import can_bus_deltas
from odvla.encoders.bevformer import BEVFormer
from odvla.encoders.protocol import EncoderState
from odvla.queries.panoptic_map import PanopticMap
from odvla.queries.track_life import Tracks, give_ids
from odvla.queries.trackformer import TrackFormer, TrackState
from odvla.types import Cameras, Frames, SceneFeatures


@dataclass(frozen=True)
class Tower:
    """The tower of a case."""

    encoder: BEVFormer
    tracks: TrackFormer
    map: PanopticMap


def build_tower(golden: Golden, stem: str) -> Tower:
    """The tower with the recorded weights, at the sizes of the case."""
    facts = golden.facts(stem)
    model = golden.facts(facts["model_cfg"].removesuffix(".json"))["model_cfg"]
    dim, bev = facts["embed_dims"], facts["bev"]
    transformer = model["pts_bbox_head"]["transformer"]
    encoder = bevformer_config(transformer, bev, resnet_config(model["img_backbone"]), dim).build()
    load_encoder(encoder, golden.weights)
    tracks = trackformer_config(model).build(dim, bev_grid(model["pc_range"], bev))
    load_trackformer(tracks, golden.weights)
    return Tower(encoder, tracks, maps.build_map(model["seg_head"], golden.weights))


def whole(golden: Golden, stem: str) -> Iterator[Check]:
    """Every frame of case k."""
    facts = golden.facts(stem)
    tower = build_tower(golden, stem)
    zeroed = "zeroed" in stem
    encoder_state: EncoderState | None = None
    track_state: TrackState | None = None
    previous: Tensor | None = None
    scene = None
    for entry in facts["frames"]:
        name = entry["file"].removesuffix(".safetensors")
        given = golden.tensors(name)
        inputs, wanted = under(given, "in/"), under(given, "out/")
        start = entry["scene"] != scene
        scene = entry["scene"]
        absolute = inputs["can_bus_abs"]
        can_bus = can_bus_deltas(absolute, None if zeroed and start else previous)
        if zeroed and start:
            can_bus = can_bus_deltas(absolute, absolute)
        previous = absolute
        label = name.rsplit("_", 1)[-1] + "/"
        yield Check(f"{label}can_bus", can_bus, wanted["can_bus_used"])
        pixels = inputs["img_int8"] if "img_int8" in inputs else _pixels(golden, name)
        frames = frames_of(pixels, inputs, can_bus, start)
        features, encoder_state, checks = _see(
            tower.encoder, pixels, frames, encoder_state, wanted, label
        )
        yield from checks
        track_state = yield from _track(tower.tracks, features, frames, track_state, wanted, label)
        assert features.bev is not None
        yield from maps.frame(tower.map, features.bev.permute(0, 3, 1, 2), wanted, label)


def _pixels(golden: Golden, name: str) -> Tensor:
    """The zeroed clip's images are those of the plain one."""
    return golden.tensors(name.replace("_zeroed", ""))["in/img_int8"]


def frames_of(pixels: Tensor, inputs: dict[str, Tensor], can_bus: Tensor, start: bool) -> Frames:
    """One row of Frames; the images are blank, only their size counts (`pixels` holds them)."""
    matrices = inputs["lidar2img"]
    return Frames(
        images=torch.zeros(pixels.shape, dtype=torch.uint8),
        cameras=Cameras(torch.eye(3).expand(1, len(matrices), 3, 3), matrices.float()[None]),
        lidar_to_global=pose_of(inputs["l2g_r_mat"], inputs["l2g_t"]),
        timestamp_s=inputs["timestamp"].double().view(1),
        can_bus=can_bus[None],
        scene_start=torch.tensor([start]),
        sample_tokens=("recorded",),
    )


def image_levels(encoder: BEVFormer, pixels: Tensor) -> tuple[Tensor, ...]:
    """Feature maps of recorded pixels [1, N, 3, h, w], which have the mean subtracted already."""
    maps = encoder.neck(encoder.backbone.encode(pixels[0].float()))
    return tuple(level[None] for level in maps)


def _see(
    encoder: BEVFormer,
    pixels: Tensor,
    frames: Frames,
    state: EncoderState | None,
    wanted: dict[str, Tensor],
    label: str,
) -> tuple[SceneFeatures, EncoderState, list[Check]]:
    """Images to BEV, and its checks."""
    levels = image_levels(encoder, pixels)
    found = [
        Check(f"{label}fpn{number}", level, wanted[f"fpn{number}"])
        for number, level in enumerate(levels)
        if f"fpn{number}" in wanted
    ]
    if "img_feat_2D" in wanted:
        found.append(Check(f"{label}img_feat_2D", levels[-1], wanted["img_feat_2D"]))
    bev = encoder.encode_bev(levels, frames, state)
    found.append(Check(f"{label}bev_embed", bev, wanted["bev_embed"].transpose(0, 1)))
    bev = bev.unflatten(1, (encoder.config.rows, encoder.config.columns))
    features = SceneFeatures(levels=levels, bev=bev, grid=encoder.grid)
    known = torch.ones_like(frames.scene_start)
    return features, EncoderState(bev, frames.lidar_to_global, known), found


def _track(
    module: TrackFormer,
    features: SceneFeatures,
    frames: Frames,
    state: TrackState | None,
    wanted: dict[str, Tensor],
    label: str,
) -> Generator[Check, None, TrackState]:
    """One frame of the tracker; returns the state that the module itself gives."""
    before = module.start(frames) if state is None else module.forget(state, frames)
    carried = module.move(before, frames)
    if "det_query_tracked" in wanted:
        yield Check(f"{label}det_query", carried.query[0], wanted["det_query_tracked"])
        yield Check(f"{label}det_ref_pts", carried.reference[0], wanted["det_ref_pts_tracked"])
    tracks = module.fresh(1).cat(carried)
    found = module.detect(features, tracks)
    tracks = module.update(tracks, found)
    tracks, _ = give_ids(tracks, before.next_id, module.config.rules)
    for name, ours in (
        ("cls", tracks.logits),
        ("box", tracks.codes),
        ("feat", tracks.embedding),
        ("ref", tracks.reference),
        ("scores", tracks.scores),
    ):
        yield Check(f"{label}{name}", ours[0], wanted[name])
    yield Check(f"{label}obj_idxes", tracks.ids[0], wanted["obj_idxes"], "index")
    yield Check(f"{label}disappear_time", tracks.missed[0], wanted["disappear_time"], "index")
    yield from _boxes(module, tracks, wanted, label)
    tokens, following = module(features, frames, state)
    yield from _tokens(tokens.feats[0][tokens.mask[0]], wanted, label)
    yield from _following(following, wanted, label)
    return following


def _boxes(
    module: TrackFormer, tracks: Tracks, wanted: dict[str, Tensor], label: str
) -> Iterator[Check]:
    slots, counted = module.confident(tracks)
    slots = slots[0][counted[0]]
    yield Check(f"{label}track_ids", tracks.ids[0][slots], wanted["track_ids"], "index")
    yield Check(f"{label}scores_3d", tracks.scores[0][slots], wanted["scores_3d"])
    labels = tracks.logits[0].argmax(-1)[slots]
    yield Check(f"{label}labels_3d", labels, wanted["labels_3d"], "index")
    yield Check(f"{label}boxes_3d", uniad_boxes(tracks.codes[0][slots]), wanted["boxes_3d"])
    ego = uniad_boxes(tracks.codes[0][module.config.queries][None])
    yield Check(f"{label}sdc_boxes_3d", ego, wanted["sdc_boxes_3d"])


def _tokens(tokens: Tensor, wanted: dict[str, Tensor], label: str) -> Iterator[Check]:
    """Where the reference gives no track tokens at all, there must be none."""
    theirs = wanted.get("track_query_embeddings", tokens.new_zeros(0, tokens.shape[-1]))
    yield Check(f"{label}track_query_embeddings", tokens, theirs)


def _following(state: TrackState, wanted: dict[str, Tensor], label: str) -> Iterator[Check]:
    """The state for the next frame."""
    tracks = state.tracks
    yield Check(f"{label}qim_obj_idxes", tracks.ids[0], wanted["qim_obj_idxes"], "index")
    yield Check(f"{label}qim_query", tracks.query[0], wanted["qim_query"])
    yield Check(f"{label}qim_ref_pts", tracks.reference[0], wanted["qim_ref_pts"])
    yield Check(f"{label}qim_mem_bank", tracks.bank[0], wanted["qim_mem_bank"])
    empty = wanted["qim_mem_padding_mask"]
    ours = tracks.bank_empty[0].to(empty.dtype)
    yield Check(f"{label}qim_mem_padding_mask", ours, empty, "index")
    yield Check(f"{label}qim_save_period", tracks.wait[0], wanted["qim_save_period"])
