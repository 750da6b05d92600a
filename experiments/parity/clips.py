"""Cases e and n: the matcher of tracks with its losses, and training on a clip with gradients.

Both need gradients; see WITH_GRADIENTS in run.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parity.golden import Check, Golden, distance, under
from experiments.parity.tracks import bev_grid, load_trackformer, pose_of, trackformer_config
from experiments.parity.vision import bevformer_config, load_encoder, resnet_config
from experiments.parity.whole import image_levels
from odvla.encoders.bevformer import BEVFormer
from odvla.encoders.history import after_history, uniad_history
from odvla.losses.clip import (
    ClipCriterion,
    ClipLossConfig,
    ClipTargets,
    Lesson,
    LevelMatch,
    without_ego,
)
from odvla.queries.track_learning import EGO_LABEL, TrackLearning
from odvla.queries.trackformer import TrackFormer, TrackState
from odvla.types import Cameras, Frames, TokenSet
from odvla.weight_names import to_uniad

# The reference has the place of the car's own query written into its matcher.
REFERENCE_EGO = 900
# Our names of the losses, and the reference's.
LOSSES = {
    "agent_class": "loss_cls",
    "agent_box": "loss_bbox",
    "past_trajectory": "loss_past_trajs",
}
# The recording keeps the gradient of every so many-th row where it is thinned out.
KEPT_ROWS = 9
# Relative change of parameters that changes activations about as much as another order of the same
# operations does, and how often it is tried.
ROUNDING = 3e-6
JITTERS = 2


def clip_loss_config(loss: dict[str, Any], *, past_trajectory: float | None = None) -> Any:
    """Our settings for the reference's `loss_cfg`."""
    assigner, focal = loss["assigner"], loss["loss_cls"]
    weight = loss["loss_past_traj_weight"] if past_trajectory is None else past_trajectory
    return ClipLossConfig(
        agent_class=focal["loss_weight"],
        agent_box=loss["loss_bbox"]["loss_weight"],
        past_trajectory=weight,
        cost_class=assigner["cls_cost"]["weight"],
        cost_box=assigner["reg_cost"]["weight"],
        focal_alpha=focal["alpha"],
        focal_gamma=focal["gamma"],
        code_weights=tuple(loss["code_weights"]),
        compat="uniad",
        history="uniad",
    )


def recorded_code(boxes: Tensor) -> Tensor:
    """Recorded boxes [..., 9] (bottom centre, the reference's yaw) as codes [..., 10]."""
    x, y, z, width, length, height, yaw, vx, vy = boxes.unbind(-1)
    parts = (x, y, width.log(), length.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy)
    return torch.stack(parts, -1)


def pairs(match: LevelMatch) -> Tensor:
    """Query and target [P, 2] as the reference lists them: new ones first, a gone object is -1."""
    ids, inherited = match.ids[0] >= 0, match.inherited[0]
    order = torch.cat([(ids & ~inherited).nonzero()[:, 0], inherited.nonzero()[:, 0]])
    return torch.stack([order, match.target[0, order]], 1)


# -- case e ---------------------------------------------------------------------------------------


def matcher(golden: Golden, stem: str) -> Iterator[Check]:
    """Case e: costs, matches, losses and gradients of frames with given predictions."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    weighed = clip_loss_config(facts["loss_cfg"]).build(bev_grid([-1, -1, 0, 1, 1, 0], [1, 1]))
    more = replace(weighed.config, past_trajectory=1.0)
    iou, total, total_of_more = torch.zeros(1, facts["num_query"]), [], []
    for frame in range(facts["frames"]):
        inputs, wanted = under(given, f"f{frame}/in/"), under(given, f"f{frame}/out/")
        logits = inputs["pred_logits"].clone().requires_grad_()
        boxes = inputs["pred_boxes"].clone().requires_grad_()
        lesson = _lesson(weighed, inputs, logits, boxes, iou)
        yield from _match_checks(f"f{frame}/", weighed, lesson, wanted)
        levels = weighed.levels(lesson)
        losses = [value for level in levels for value in level.values()]
        total += losses
        yield from _loss_checks(frame, levels, under(given, "out/"))
        found = torch.autograd.grad(torch.stack(losses).sum(), [logits, boxes])
        for name, gradient in zip(("grad_logits", "grad_boxes"), found, strict=True):
            yield Check(f"f{frame}/{name}", gradient, wanted[name], "gradient")
        levels_of_more = ClipCriterion(more).levels(lesson)
        total_of_more += [value for level in levels_of_more for value in level.values()]
        if golden.has(f"{stem}_pasttraj_losses"):
            recorded = golden.facts(f"{stem}_pasttraj_losses")
            theirs = {key.removeprefix("out/"): torch.tensor(v) for key, v in recorded.items()}
            for check in _loss_checks(frame, levels_of_more, theirs):
                yield replace(check, name=f"pasttraj/{check.name}")
        iou = lesson.matches[-1].iou
    yield Check("total", torch.stack(total).sum(), given["out/total"], "loss")
    if golden.has(f"{stem}_pasttraj_losses"):
        yield Check("pasttraj/total", torch.stack(total_of_more).sum(), theirs["total"], "loss")


def _lesson(
    criterion: ClipCriterion, inputs: dict[str, Tensor], logits: Tensor, boxes: Tensor, iou: Tensor
) -> Lesson:
    """A frame of case e, all levels matched from the same state."""
    agents = len(inputs["gt_labels"])
    targets = ClipTargets(
        codes=inputs["gt_boxes"][None],
        labels=inputs["gt_labels"][None],
        ids=inputs["gt_obj_ids"][None],
        mask=torch.ones(1, agents, dtype=torch.bool),
        paths=inputs["gt_past_traj"][None],
        paths_mask=inputs["gt_past_traj_mask"][None],
        ego_code=inputs["gt_sdc_boxes"][:1],
        ego_label=inputs["gt_sdc_labels"][:1],
        ego_known=torch.ones(1, dtype=torch.bool),
    )
    used = torch.ones(1, logits.shape[1], dtype=torch.bool)
    ids = without_ego(inputs["obj_idxes"][None], REFERENCE_EGO)
    per_level = [(a[None], b[None]) for a, b in zip(logits, boxes, strict=True)]
    return Lesson(
        logits=tuple(level[0] for level in per_level),
        codes=tuple(level[1] for level in per_level),
        paths=tuple(level[None] for level in inputs["pred_past_trajs"]),
        matches=tuple(
            criterion.matcher.match(*level, ids, iou, used, targets) for level in per_level
        ),
        targets=targets,
        used=used,
        ego=REFERENCE_EGO,
    )


def _match_checks(
    name: str, criterion: ClipCriterion, lesson: Lesson, wanted: dict[str, Tensor]
) -> Iterator[Check]:
    for level, match in enumerate(lesson.matches):
        own = under(wanted, f"l{level}_")
        for key, costs in zip(
            ("cls_cost", "reg_cost"),
            criterion.matcher.costs(lesson.logits[level], lesson.codes[level], lesson.targets),
            strict=True,
        ):
            for theirs, (first, last) in _slices(own, key):
                yield Check(f"{name}l{level}_{key}", costs[0, first:last], own[theirs])
        yield Check(f"{name}l{level}_obj_idxes", match.ids[0], own["obj_idxes"], "index")
        if "matched_gt_idxes" in own:
            places = own["matched_gt_idxes"]
            yield Check(f"{name}l{level}_matched_gt_idxes", match.target[0], places, "index")
        yield Check(f"{name}l{level}_matched", pairs(match), own["matched_indices"], "index")
        yield Check(f"{name}l{level}_iou", match.iou[0], own["iou"])


def _slices(own: dict[str, Tensor], key: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Recorded costs name the queries that they are of: cls_cost_20_160."""
    for name in own:
        found = re.fullmatch(rf"{key}_(\d+)_(\d+)", name)
        if found:
            yield name, (int(found[1]), int(found[2]))


def _loss_checks(
    frame: int, levels: list[dict[str, Tensor]], wanted: dict[str, Tensor]
) -> Iterator[Check]:
    for level, losses in enumerate(levels):
        for ours, theirs in LOSSES.items():
            name = f"frame_{frame}_{theirs}_{level}"
            yield Check(name, losses.get(ours, torch.zeros(1)), wanted[name], "loss")


# -- case n ---------------------------------------------------------------------------------------


class RecordedEncoder(BEVFormer):
    """A BEVFormer whose images are recorded pixels with the mean subtracted."""

    pixels: dict[str, Tensor]

    def image_levels(self, frames: Frames) -> tuple[Tensor, ...]:
        """Feature maps of the pixels that the frame is named after."""
        return image_levels(self, self.pixels[frames.sample_tokens[0]])


@dataclass(frozen=True)
class Learner:
    """The modules of case n."""

    encoder: RecordedEncoder
    tracks: TrackFormer
    criterion: ClipCriterion


def learner(golden: Golden, stem: str) -> Learner:
    """The modules with the recorded weights in training mode, with nothing left to chance."""
    facts = golden.facts("uniad_small_weights_rest")
    model, bev, dim = facts["model_cfg"], facts["bev"], facts["embed_dims"]
    settings = golden.facts(stem)["settings"]
    threshold = re.search(r"gt_iou_threshold ([\d.]+\d)", settings)
    config = bevformer_config(
        model["pts_bbox_head"]["transformer"], bev, resnet_config(model["img_backbone"]), dim
    )
    encoder = RecordedEncoder(replace(config, dropout=0.0))
    load_encoder(encoder, golden.weights)
    tracks = replace(
        trackformer_config(model),
        dropout=0.0,
        interaction_dropout=0.0,
        learning=TrackLearning(
            token_iou=float(threshold[1]) if threshold else model["gt_iou_threshold"],
            random_drop=0.0,
            false_tracks=0.0,
        ),
    ).build(dim, bev_grid(model["pc_range"], bev))
    load_trackformer(tracks, golden.weights)
    criterion = clip_loss_config(model["loss_cfg"]).build(tracks.grid)
    return Learner(encoder.train(), tracks.train(), criterion)


def training_clip(golden: Golden, stem: str) -> Iterator[Check]:
    """Case n: matches, ids, overlaps, carried tracks, losses and gradients of a clip."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    modules = learner(golden, stem)
    clip = tuple(_frames(given, step) for step in range(facts["frames"]))
    lessons, total = [], []
    for step, seen in enumerate(play(modules, clip, given)):
        wanted, lesson = under(given, f"f{step}/out/"), seen.lesson
        lessons.append(lesson)
        yield Check(f"f{step}/bev_embed", seen.bev.transpose(0, 1), wanted["bev_embed"])
        yield Check(f"f{step}/pred_logits", lesson.logits[-1], wanted["pred_logits"])
        yield Check(f"f{step}/pred_boxes", lesson.codes[-1], wanted["pred_boxes"])
        slack = _overlap_slack(lesson.codes[-1], wanted["pred_boxes"])
        for check in _match_checks(f"f{step}/", modules.criterion, lesson, wanted):
            yield replace(check, slack=slack if check.name.endswith("iou") else 0.0)
        tokens, mask = seen.tokens, seen.tokens.mask[0]
        theirs = wanted["track_query_embeddings"]
        yield Check(f"f{step}/track_query_embeddings", tokens.feats[0][mask], theirs)
        assert tokens.query_index is not None
        places = lesson.matches[-1].target[0, tokens.query_index[0][mask]]
        theirs = wanted["track_query_matched_idxes"]
        yield Check(f"f{step}/track_query_matched_idxes", places, theirs, "index")
        following = clip[step + 1] if step + 1 < len(clip) else None
        yield from _carried(f"f{step}/", modules.tracks, seen.state, following, wanted)
        levels = modules.criterion.levels(lesson)
        total += [value for level in levels for value in level.values()]
        yield from _loss_checks(step, levels, under(given, "out/"))
    yield Check("total", torch.stack(total).sum(), given["out/total"], "loss")
    yield from _gradient_checks(golden, stem, gradients(modules, lessons, given), clip, given)


@dataclass(frozen=True)
class Seen:
    """One frame of the clip."""

    bev: Tensor  # [1, H * W, C]
    tokens: TokenSet
    state: TrackState
    lesson: Lesson


def play(modules: Learner, clip: tuple[Frames, ...], given: dict[str, Tensor]) -> Iterator[Seen]:
    """Go through the clip as training does."""
    modules.encoder.pixels = {
        frames.sample_tokens[0]: given["in/img_int8"][:, step] for step, frames in enumerate(clip)
    }
    histories = uniad_history(modules.encoder, clip, None)
    state: TrackState | None = None
    for step, frames in enumerate(clip):
        features, _ = modules.encoder(after_history(frames), histories[step])
        assert features.bev is not None
        tokens, state, lesson = modules.tracks.learn(
            features, frames, state, _targets(given, step), modules.criterion.matcher
        )
        yield Seen(features.bev.flatten(1, 2), tokens, state, lesson)


def _overlap_slack(ours: Tensor, theirs: Tensor) -> float:
    """How far overlaps may differ because boxes do, whose tolerance is relative to the range.

    Moving a box by d changes its overlap by at most about 2 d over its width, in each direction.
    """
    moved = float((ours.detach()[..., :2] - theirs[..., :2]).abs().max())
    return 4 * moved / float(theirs[..., 2:4].exp().min())


def _frames(given: dict[str, Tensor], step: int) -> Frames:
    inputs, images = under(given, f"f{step}/in/"), given["in/img_int8"][:, step]
    matrices = inputs["lidar2img"]
    return Frames(
        images=torch.zeros(images.shape, dtype=torch.uint8),
        cameras=Cameras(torch.eye(3).expand(1, len(matrices), 3, 3), matrices.float()[None]),
        lidar_to_global=pose_of(inputs["l2g_r_mat"], inputs["l2g_t"]),
        timestamp_s=inputs["timestamp"].double().view(1),
        can_bus=inputs["can_bus"][None],
        scene_start=torch.tensor([step == 0]),
        sample_tokens=(f"recorded {step}",),
    )


def _targets(given: dict[str, Tensor], step: int) -> ClipTargets:
    inputs = under(given, f"f{step}/in/")
    return ClipTargets(
        codes=recorded_code(inputs["gt_boxes"])[None],
        labels=inputs["gt_labels"][None],
        ids=inputs["gt_inds"][None],
        mask=torch.ones(1, len(inputs["gt_inds"]), dtype=torch.bool),
        paths=inputs["gt_past_traj"][None],
        paths_mask=inputs["gt_past_traj_mask"][None],
        ego_code=recorded_code(inputs["gt_sdc_box"]),
        ego_label=torch.tensor([EGO_LABEL]),
        ego_known=torch.ones(1, dtype=torch.bool),
    )


def _carried(
    name: str,
    module: TrackFormer,
    state: TrackState,
    following: Frames | None,
    wanted: dict[str, Tensor],
) -> Iterator[Check]:
    """The tracks of the next frame, where they are expected in it."""
    tracks = state.tracks
    count = module.config.queries + 1 + tracks.ids.shape[1]
    yield Check(f"{name}n_instances_next", torch.tensor(count), wanted["n_instances_next"], "index")
    ids = wanted["next_obj_idxes_tail"]
    yield Check(f"{name}next_obj_idxes", tracks.ids[0], ids, "index")
    yield Check(f"{name}next_query", tracks.query[0], wanted["next_query_tail"])
    if following is not None:
        reference = module.move(state, following).reference[0]
    else:
        assert state.height is not None
        reference = torch.cat([tracks.reference[0, :, :2], state.height[0, :, None]], 1)
    yield Check(f"{name}next_ref_pts", reference, wanted["next_ref_pts_tail"])


def gradients(
    modules: Learner,
    lessons: list[Lesson],
    given: dict[str, Tensor],
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Gradients of the clip's loss by the reference's names.

    The recorded ground truth coincides with predictions of the last level. An absolute error has no
    derivative there, and which one is taken hangs on the last bit: so predictions of the last level
    are given the recorded values before errors are taken.

    Args:
        modules: what has seen the clip.
        lessons: what it saw.
        given: the recording.
        generator: also move each recorded value by -1, 0 or 1 unit in its last place.
    """
    losses = []
    for step, lesson in enumerate(lessons):
        recorded = given[f"f{step}/out/pred_boxes"]
        if generator is not None:
            units = torch.randint(-1, 2, recorded.shape, generator=generator)
            # Only sizes are rounded on their way from metres to the code and back.
            moved = torch.nextafter(recorded, recorded + units)
            sizes = [2, 3, 5]
            recorded = recorded.index_copy(-1, torch.tensor(sizes), moved[..., sizes])
        own = lesson.codes[-1]
        codes = (*lesson.codes[:-1], own + (recorded - own).detach())
        for level in modules.criterion.levels(replace(lesson, codes=codes)):
            losses += list(level.values())
    torch.stack(losses).sum().backward()
    ours = to_uniad_named(modules)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in ours.items()
    }


def to_uniad_named(modules: Learner) -> dict[str, nn.Parameter]:
    """Parameters by the reference's names."""
    parts = {"encoder.": modules.encoder, "queries.track.": modules.tracks}
    ours = {
        prefix + name: parameter
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    return {theirs: ours[name] for name, theirs in to_uniad(ours).names.items()}


def _gradient_checks(
    golden: Golden,
    stem: str,
    ours: dict[str, Tensor],
    clip: tuple[Frames, ...],
    given: dict[str, Tensor],
) -> Iterator[Check]:
    """Recorded gradients, and the norm of every parameter's.

    A derivative jumps where a sampling point crosses a cell's border or an activation crosses zero.
    How much such things weigh is measured: the same gradients with parameters changed by about what
    rounding changes activations.
    """
    others = []
    for seed in range(JITTERS):
        modules, generator = learner(golden, stem), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in to_uniad_named(modules).values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + ROUNDING * noise)
        lessons = [seen.lesson for seen in play(modules, clip, given)]
        others.append(gradients(modules, lessons, given, generator))
    for name, theirs in under(given, "out/grad/").items():
        step = 1 if ours[name].shape == theirs.shape else KEPT_ROWS
        slack = max(distance(other[name][::step], ours[name][::step]) for other in others)
        yield Check(f"grad/{name}", ours[name][::step], theirs, "gradient as a whole", 2 * slack)
    for name, norm in golden.facts(stem)["grad_norms"].items():
        own = ours[name].norm()
        slack = max(distance(other[name].norm(), own) for other in others)
        theirs = torch.tensor(norm)
        yield Check(f"grad norm/{name}", own, theirs, "gradient as a whole", 2 * slack)
