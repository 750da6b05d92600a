"""Cases f_panseg and l_panseg_loss, and the map part of k: the panoptic map head and its losses.

Recordings hold decisions that hang on the sixth digit: the order of two candidates with nearly the
same score, a cell whose mask value is nearly the threshold. Where our number is within TIE of such
a border, the recorded decision is taken; everywhere else ours stands, and differs if it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from experiments.parity.golden import Check, Golden, under
from odvla.errors import UserError
from odvla.losses.boxes_2d import boxes_of_masks
from odvla.losses.panoptic_map import (
    MASKED_CLASS_FACTOR,
    MatchCosts,
    PanopticMapLossConfig,
    ThingTargets,
)
from odvla.queries.panoptic_map import (
    Candidates,
    Drawing,
    EncoderLayer,
    PanopticMap,
    PanopticMapConfig,
    attention_levels,
)
from odvla.queries.panoptic_merge import Merged, merge, quality
from odvla.types import BevGrid, MapDecoding
from odvla.weight_names import from_uniad, to_odvla

TIE = 1e-5
MAX_PER_IMAGE = 100  # the reference's default, where a case names none
OVERLAP = 0.4


def build_map(head: dict[str, Any], weights: dict[str, Tensor]) -> PanopticMap:
    """Our module for the reference's `PansegformerHead`, filled with its weights.

    Args:
        head: settings of the head.
        weights: state dict by the reference's names; only `seg_head.*` is read.

    Raises:
        UserError: the head is of a kind that ours is not.
    """
    bev = [head["bev_h"], head["bev_w"]]
    wanted = {"as_two_stage": False, "with_box_refine": True, "num_stuff_classes": 1}
    for name, value in (*wanted.items(), ("canvas_size", bev)):
        if head[name] != value:
            raise UserError(f"seg_head.{name} is {head[name]!r}; the map head knows {value!r} only")
    own = under(
        to_odvla({n: w for n, w in weights.items() if n.startswith("seg_head.")}), "queries.map."
    )
    x0, y0, _, x1, _, _ = head["pc_range"]
    grid = BevGrid(x0, y0, (x1 - x0) / bev[1], *bev)
    dim = own["query_embedding.weight"].shape[1] // 2
    module = map_config(head, own).build(dim, grid)
    module.load_state_dict(own)
    return module.eval()


def map_config(head: dict[str, Any], own: dict[str, Tensor]) -> PanopticMapConfig:
    """Our settings for the reference's head; the stride quirk by the weights' shapes."""
    encoder, decoder = head["transformer"]["encoder"], head["transformer"]["decoder"]
    layer = encoder["transformerlayers"]
    attention = layer["attn_cfgs"]
    heads, points = attention.get("num_heads", 8), attention.get("num_points", 4)
    things, stuff = head["thing_transformer_head"], head["stuff_transformer_head"]
    return PanopticMapConfig(
        queries=head["num_query"],
        encoder_layers=encoder["num_layers"],
        decoder_layers=decoder["num_layers"],
        heads=heads,
        hidden=layer["feedforward_channels"],
        points=points,
        classes=head["num_things_classes"],
        thing_mask_layers=things["num_decoder_layers"],
        stuff_mask_layers=stuff["num_decoder_layers"],
        mask_heads=things["nhead"],
        max_candidates=head.get("test_cfg", {}).get("max_per_img", MAX_PER_IMAGE),
        overlap_threshold=head.get("overlap_threshold_things", OVERLAP),
        attention_levels=attention_levels(own, heads, points),
        compat="uniad",
    )


def as_map(bev: Tensor, module: PanopticMap) -> Tensor:
    """A recorded BEV [S, 1, C] as [1, C, H, W]."""
    return bev.permute(1, 2, 0).unflatten(2, module.size)


# -- case f ---------------------------------------------------------------------------------------


def head(golden: Golden, stem: str) -> Iterator[Check]:
    """Case f_panseg: every part of the head, merging, and what the language model gets."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    wanted = under(given, "out/")
    module = build_map(facts["cfg"], under(given, "weight/"))
    bev = as_map(given["in/bev_embed"], module)
    yield from _encoder(module, bev, wanted)
    decoding = module.decode(bev)
    yield from _decoder(module, decoding, wanted)
    candidates = module.candidates(decoding)
    theirs = wanted["raw_bbox_index"] * module.config.classes + wanted["raw_labels"]
    candidates = settle_candidates(module, decoding, candidates, theirs)
    yield Check("raw_bbox_index", candidates.query[0], wanted["raw_bbox_index"], "index")
    yield Check("raw_labels", candidates.labels[0], wanted["raw_labels"], "index")
    yield Check("raw_bbox", with_scores(candidates.boxes, candidates.scores), wanted["raw_bbox"])
    drawing = module.draw(decoding, candidates)
    yield from _painted(module, decoding, candidates, drawing, wanted)
    drivable = settle_cells(drawing.drivable[0], wanted["drivable"])
    yield Check("drivable", drivable, wanted["drivable"], "index")
    order = final_order(candidates, wanted["bbox"], wanted["labels"])
    inside = wanted["segm"][order.argsort()].bool()
    things = nudged(drawing.things, inside[None], module.rules.covered)
    merged = merge(things, candidates.scores, candidates.labels, module.rules)
    merged = settle_order(module, things, candidates, merged, order)
    segm = (things > module.rules.covered)[0][merged.order[0]]
    yield Check("segm", segm.to(torch.uint8), wanted["segm"], "index")
    yield from _merged(module, candidates, things, merged, wanted)
    tokens = module.tokens(
        drawing, merged, module.predictions(decoding, candidates, drawing, merged)
    )
    places = merged.kept[0].nonzero()[:, 0]
    yield Check("chosen_positions", places, wanted["chosen_positions"], "index")
    yield Check("output_query_things", drawing.thing_queries[0], wanted["output_query_things"])
    chosen = wanted["chosen_output_query_things"]
    yield Check("chosen_output_query_things", tokens.feats[0, :-1], chosen)
    yield Check("output_query_stuff", tokens.feats[0, -1:], wanted["output_query_stuff"])


def _encoder(module: PanopticMap, bev: Tensor, wanted: dict[str, Tensor]) -> Iterator[Check]:
    sine = module.sine.T.unflatten(1, module.size)
    yield Check("pos_encoding", sine, wanted["pos_encoding"][0])
    memory, positions = module.encode(bev)
    yield Check("memory_pos", positions, wanted["memory_pos"][0])
    x, at = bev.flatten(2).transpose(1, 2), module.centres[None]
    for number, layer in enumerate(module.encoder):
        assert isinstance(layer, EncoderLayer)
        if f"enc_layer{number}_attn_out" in wanted:
            read = layer.attend(x, positions, module.size, at)
            yield Check(f"enc_layer{number}_attn", read, wanted[f"enc_layer{number}_attn_out"])
        x = layer(x, positions, module.size, at)
        if f"enc_layer{number}_out" in wanted:
            yield Check(f"enc_layer{number}", x, wanted[f"enc_layer{number}_out"])
    yield Check("memory", memory, wanted["memory"])


def _decoder(
    module: PanopticMap, decoding: MapDecoding, wanted: dict[str, Tensor]
) -> Iterator[Check]:
    for number, x in enumerate(decoding.layer_queries):
        if f"dec_layer{number}_out" in wanted:
            yield Check(f"dec_layer{number}", x, wanted[f"dec_layer{number}_out"])
    yield Check("query", decoding.layer_queries[-1], wanted["query"])
    positions = module.query_embedding.weight[:, : module.dim]
    yield Check("query_pos", positions, wanted["query_pos"])
    yield Check("reference", decoding.start, wanted["reference"])
    yield Check("outputs_classes", torch.stack(decoding.layer_logits), wanted["outputs_classes"])
    yield Check("outputs_coords", torch.stack(decoding.layer_boxes), wanted["outputs_coords"])


def _painted(
    module: PanopticMap,
    decoding: MapDecoding,
    candidates: Candidates,
    drawing: Drawing,
    wanted: dict[str, Tensor],
) -> Iterator[Check]:
    """Masks of both heads, also those between the layers, which only training paints."""
    query = decoding.layer_queries[-1][:, candidates.query[0]]
    things = module.thing_masks(decoding.memory, query, paint_layers=True)
    stuff = module.stuff_masks(decoding.memory, *module.stuff(1), paint_layers=True)
    yield Check("things_mask", drawing.things, wanted["things_mask"])
    yield Check("stuff_mask", drawing.drivable, wanted["stuff_mask"])
    for name, painted in (("things", things), ("stuff", stuff)):
        yield Check(f"{name}_mask_in_training", painted.mask, wanted[f"{name}_mask"])
        for number, mask in enumerate(painted.layer_masks):
            if f"{name}_mask_inter{number}" in wanted:
                theirs = wanted[f"{name}_mask_inter{number}"]
                yield Check(f"{name}_mask_inter{number}", mask, theirs)
        first = painted.layer_queries[0]
        yield Check(f"{name}_query_first", first, wanted[f"{name}_query_first"])
        yield Check(f"{name}_query_last", painted.queries, wanted[f"{name}_query_last"])


def _merged(
    module: PanopticMap,
    candidates: Candidates,
    things: Tensor,
    merged: Merged,
    wanted: dict[str, Tensor],
) -> Iterator[Check]:
    """The map, and the layers of results that the reference makes of it."""
    boxes = candidates.boxes[0][merged.order[0]]
    yield Check("bbox", with_scores(boxes[None], merged.scores), wanted["bbox"])
    yield Check("labels", merged.labels[0], wanted["labels"], "index")
    lanes = merged.lanes(module.config.classes)[0]
    yield Check("lane", lanes.to(torch.uint8), wanted["lane"], "index")
    scores = torch.zeros_like(wanted["lane_score"])
    panoptic = torch.zeros_like(wanted["panoptic"])
    for number, place in enumerate(merged.kept[0].nonzero()[:, 0].tolist()):
        cells, label = merged.cells[0, place], merged.labels[0, place]
        scores[label, cells] = things[0, merged.order[0, place]][cells]
        panoptic[cells] = torch.stack([label, label.new_tensor(number + 1)])
    yield Check("lane_score", scores, wanted["lane_score"])
    yield Check("panoptic", panoptic, wanted["panoptic"], "index")


# -- near-ties ------------------------------------------------------------------------------------


def settle_candidates(
    module: PanopticMap, decoding: MapDecoding, ours: Candidates, theirs: Tensor
) -> Candidates:
    """The recorded pairs, if each has our score of its place within TIE; else ours."""
    again = module.pairs(decoding, theirs[None])
    if ours.scores.shape != again.scores.shape or len(theirs.unique()) < len(theirs):
        return ours
    return again if bool(((ours.scores - again.scores).abs() <= TIE).all()) else ours


def settle_cells(values: Tensor, theirs: Tensor, covered: float = 0.5) -> Tensor:
    """Covered cells (0 or 1) of a mask, the recorded ones where a value is near the threshold."""
    return torch.where((values - covered).abs() <= TIE, theirs, (values > covered).to(theirs.dtype))


def nudged(masks: Tensor, inside: Tensor, covered: float) -> Tensor:
    """Masks whose values near the threshold lie on the recorded side of it."""
    sides = torch.where(inside, covered + TIE, covered - TIE)
    return torch.where((masks - covered).abs() <= TIE, sides, masks)


def final_order(candidates: Candidates, bbox: Tensor, labels: Tensor) -> Tensor:
    """Which candidate each recorded final row is, by box and class: int64 [N]."""
    apart = (candidates.boxes[0].unsqueeze(0) - bbox[:, None, :4]).abs().sum(-1)
    other = (candidates.labels != labels[:, None]).float()
    # Twins (the same class and box) are told apart by where they stand.
    place = torch.arange(len(labels), dtype=torch.float32)
    cost = apart + 1e6 * other + 1e-6 * (place[:, None] - place).abs()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def settle_order(
    module: PanopticMap, things: Tensor, candidates: Candidates, ours: Merged, order: Tensor
) -> Merged:
    """The map merged in the recorded order, if our scores fall in it up to TIE; else ours."""
    scores = (candidates.scores * quality(things, module.rules) ** 2)[0][order]
    if bool((scores.diff() > TIE).any()):
        return ours
    return merge(things, candidates.scores, candidates.labels, module.rules, order[None])


def settle_rows(rows: Tensor, scores: Tensor, places: Tensor, theirs: Tensor) -> Tensor:
    """Rows at places; of those whose score is within TIE of a place's, the recorded one's nearest.

    Args:
        rows: [N, C] by falling score.
        scores: [N].
        places: int64 [P].
        theirs: [P, C].
    """
    if len(places) != len(theirs):
        return rows[places]
    far = torch.cdist(theirs, rows)
    tied = (scores[places].unsqueeze(1) - scores).abs() <= TIE
    return rows[far.masked_fill(~tied, float("inf")).argmin(1)]


def with_scores(boxes: Tensor, scores: Tensor) -> Tensor:
    """[1, N, 4] and [1, N] to [N, 5]."""
    return torch.cat([boxes, scores.unsqueeze(-1)], -1)[0]


# -- case k ---------------------------------------------------------------------------------------


def frame(
    module: PanopticMap, bev: Tensor, wanted: dict[str, Tensor], label: str
) -> Iterator[Check]:
    """What the map head makes of a frame of case k.

    Args:
        module: the head.
        bev: [1, C, H, W].
        wanted: outputs of the frame.
        label: stands before the names.
    """
    decoding = module.decode(bev)
    candidates = module.candidates(decoding)
    drawing = module.draw(decoding, candidates)
    merged = merge(drawing.things, candidates.scores, candidates.labels, module.rules)
    if "seg_bbox" in wanted:
        order = final_order(candidates, wanted["seg_bbox"], wanted["seg_labels"])
        merged = settle_order(module, drawing.things, candidates, merged, order)
        boxes = candidates.boxes[:, merged.order[0]]
        yield Check(f"{label}seg_bbox", with_scores(boxes, merged.scores), wanted["seg_bbox"])
        yield Check(f"{label}seg_labels", merged.labels[0], wanted["seg_labels"], "index")
    if "seg_drivable" in wanted:
        drivable = settle_cells(drawing.drivable[0], wanted["seg_drivable"])
        yield Check(f"{label}seg_drivable", drivable, wanted["seg_drivable"], "index")
    if "seg_lane" in wanted:
        near = ((drawing.things[0] - module.rules.covered).abs() <= TIE).any(0)
        lanes = merged.lanes(module.config.classes)[0].to(torch.uint8)
        lanes = torch.where(near, wanted["seg_lane"], lanes)
        yield Check(f"{label}seg_lane", lanes, wanted["seg_lane"], "index")
    rows, scores = drawing.thing_queries[0], candidates.scores[0]
    if "output_query_things" in wanted:
        theirs = wanted["output_query_things"]
        every = settle_rows(rows, scores, torch.arange(len(rows)), theirs)
        yield Check(f"{label}output_query_things", every, theirs)
    tokens = module.tokens(
        drawing, merged, module.predictions(decoding, candidates, drawing, merged)
    )
    theirs = wanted.get("chosen_output_query_things", rows[:0])
    chosen = settle_rows(rows, scores, merged.kept[0].nonzero()[:, 0], theirs)
    yield Check(f"{label}chosen_output_query_things", chosen, theirs)
    stuff = wanted["output_query_stuff"]
    yield Check(f"{label}output_query_stuff", tokens.feats[0, -1:], stuff)


# -- case l ---------------------------------------------------------------------------------------


def loss_config(head: dict[str, Any]) -> PanopticMapLossConfig:
    """Our settings for the losses of the reference's `PansegformerHead`."""

    def costs(name: str, classes: float) -> MatchCosts:
        given = head["train_cfg"][name]
        return MatchCosts(
            cls=classes * given["cls_cost"]["weight"],
            box=given["reg_cost"]["weight"],
            iou=given["iou_cost"]["weight"],
            mask=given.get("mask_cost", {}).get("weight", 0.0),
        )

    return PanopticMapLossConfig(
        cls=head["loss_cls"]["loss_weight"],
        box=head["loss_bbox"]["loss_weight"],
        iou=head["loss_iou"]["loss_weight"],
        mask=head["loss_mask"]["loss_weight"],
        layers=costs("assigner", 1.0),
        masked=costs("assigner_with_mask", MASKED_CLASS_FACTOR),
        compat="uniad",
    )


def losses(golden: Golden, stem: str) -> Iterator[Check]:
    """Case l_panseg_loss: every loss, the queries that the filter keeps, and gradients."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    inputs, wanted = under(given, "in/"), under(given, "out/")
    weights_of, input_of = (Path(facts[name].split()[0]).stem for name in ("weights", "input"))
    head = golden.facts(weights_of)["cfg"]
    module = build_map(head, under(golden.tensors(weights_of), "weight/"))
    bev = golden.tensors(input_of)["in/bev_embed"].requires_grad_()
    labels = inputs["gt_lane_labels"].flatten()
    masks = inputs["gt_lane_masks"].view(len(labels), *module.size).bool()
    boxes = inputs["gt_lane_bboxes"].view(-1, 4)
    is_thing = labels < module.config.classes
    ours = boxes_of_masks(masks, far_edge=False)
    if bool((ours == boxes).all()):
        yield Check("gt_lane_bboxes", ours, boxes)
    things = ThingTargets(
        boxes=boxes[is_thing][None],
        labels=labels[is_thing][None],
        masks=masks[is_thing][None].float(),
        mask=is_thing[is_thing][None],
    )
    criterion = loss_config(head).build()
    decoding = module.decode(as_map(bev, module))
    filtered = criterion.filter(decoding, things)
    kept = filtered.query[filtered.mask].sort().values
    yield Check("filter_pos_ind_mask", kept, wanted["filter_pos_ind_mask"], "index")
    first = filtered.first.query.sort().values
    yield Check("filter_pos_inds", first, wanted["filter_pos_inds"], "index")
    terms = criterion.terms(module, decoding, things, masks[~is_thing].any(0)[None])
    recorded = {name for name in wanted if "loss" in name.split("/")[0]}
    if recorded != set(terms):
        raise UserError(f"{stem}: losses that only one side has: {sorted(recorded ^ set(terms))}")
    for name, term in terms.items():
        yield Check(name, term, wanted[name], "loss")
    total = torch.stack(list(terms.values())).sum()
    yield Check("total", total, wanted["total"], "loss")
    total.backward()
    assert bev.grad is not None
    yield Check("grad_bev", bev.grad, wanted["grad_bev"], "gradient")
    parameters = dict(module.named_parameters())
    for name, theirs in under(wanted, "grad/").items():
        old = f"seg_head.{name}"
        own = parameters[from_uniad([old]).names[old].removeprefix("queries.map.")]
        assert own.grad is not None
        yield Check(f"grad/{name}", own.grad, theirs, "gradient")
