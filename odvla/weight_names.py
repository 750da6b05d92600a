"""Names of weights in UniAD's and OpenDriveVLA's checkpoints and ours: same tensors, same shapes.

A rule maps what starts with one prefix to another; `#` stands for a number that is kept. Of several
rules that fit, the longest counts (of two as long, the one with fewer #). What no rule fits is
either deliberately unused or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from odvla.errors import UserError

# Parts of a DrivingVLA, first words of its weights' names.
OWN_PARTS = ("encoder", "queries", "projectors", "language", "planner", "actions")
Rules = tuple[tuple[str, str], ...]
# (UniAD's prefix, ours)
RULES: Rules = (
    ("img_backbone.", "encoder.backbone."),
    ("img_neck.lateral_convs.#.conv.", "encoder.neck.lateral_convs.#."),
    ("img_neck.fpn_convs.#.conv.", "encoder.neck.fpn_convs.#."),
    ("pts_bbox_head.bev_embedding.", "encoder.bev_embedding."),
    ("pts_bbox_head.positional_encoding.row_embed.", "encoder.row_embed."),
    ("pts_bbox_head.positional_encoding.col_embed.", "encoder.col_embed."),
    ("pts_bbox_head.transformer.level_embeds", "encoder.level_embeds"),
    ("pts_bbox_head.transformer.cams_embeds", "encoder.cams_embeds"),
    ("pts_bbox_head.transformer.can_bus_mlp.#.", "encoder.can_bus_mlp.#."),
    ("pts_bbox_head.transformer.can_bus_mlp.norm.", "encoder.can_bus_mlp.4."),
    (
        "pts_bbox_head.transformer.encoder.layers.#.attentions.0.",
        "encoder.layers.#.temporal_attention.",
    ),
    (
        "pts_bbox_head.transformer.encoder.layers.#.attentions.1.deformable_attention.",
        "encoder.layers.#.spatial_attention.",
    ),
    (
        "pts_bbox_head.transformer.encoder.layers.#.attentions.1.output_proj.",
        "encoder.layers.#.spatial_attention.output_proj.",
    ),
    ("pts_bbox_head.transformer.encoder.layers.#.ffns.0.layers.0.0.", "encoder.layers.#.ffn.fc1."),
    ("pts_bbox_head.transformer.encoder.layers.#.ffns.0.layers.1.", "encoder.layers.#.ffn.fc2."),
    ("pts_bbox_head.transformer.encoder.layers.#.norms.#.", "encoder.layers.#.norms.#."),
    (
        "pts_bbox_head.transformer.decoder.layers.#.attentions.0.attn.",
        "queries.track.layers.#.self_attention.",
    ),
    (
        "pts_bbox_head.transformer.decoder.layers.#.attentions.1.",
        "queries.track.layers.#.cross_attention.",
    ),
    (
        "pts_bbox_head.transformer.decoder.layers.#.ffns.0.layers.0.0.",
        "queries.track.layers.#.ffn.fc1.",
    ),
    (
        "pts_bbox_head.transformer.decoder.layers.#.ffns.0.layers.1.",
        "queries.track.layers.#.ffn.fc2.",
    ),
    ("pts_bbox_head.transformer.decoder.layers.#.norms.#.", "queries.track.layers.#.norms.#."),
    ("pts_bbox_head.cls_branches.", "queries.track.cls_branches."),
    ("pts_bbox_head.reg_branches.", "queries.track.reg_branches."),
    ("pts_bbox_head.past_traj_reg_branches.", "queries.track.past_branches."),
    ("query_embedding.", "queries.track.query_embedding."),
    ("reference_points.", "queries.track.reference_points."),
    ("query_interact.", "queries.track.query_interaction."),
    ("memory_bank.", "queries.track.memory_bank."),
    ("seg_head.transformer.level_embeds", "queries.map.level_embeds"),
    ("seg_head.transformer.reference_points.", "queries.map.reference_points."),
    (
        "seg_head.transformer.encoder.layers.#.attentions.0.",
        "queries.map.encoder.#.attention.",
    ),
    ("seg_head.transformer.encoder.layers.#.ffns.0.layers.0.0.", "queries.map.encoder.#.ffn.fc1."),
    ("seg_head.transformer.encoder.layers.#.ffns.0.layers.1.", "queries.map.encoder.#.ffn.fc2."),
    ("seg_head.transformer.encoder.layers.#.norms.#.", "queries.map.encoder.#.norms.#."),
    (
        "seg_head.transformer.decoder.layers.#.attentions.0.attn.",
        "queries.map.decoder.#.self_attention.",
    ),
    (
        "seg_head.transformer.decoder.layers.#.attentions.1.",
        "queries.map.decoder.#.cross_attention.",
    ),
    ("seg_head.transformer.decoder.layers.#.ffns.0.layers.0.0.", "queries.map.decoder.#.ffn.fc1."),
    ("seg_head.transformer.decoder.layers.#.ffns.0.layers.1.", "queries.map.decoder.#.ffn.fc2."),
    ("seg_head.transformer.decoder.layers.#.norms.#.", "queries.map.decoder.#.norms.#."),
    ("seg_head.query_embedding.", "queries.map.query_embedding."),
    ("seg_head.stuff_query.", "queries.map.stuff_query."),
    ("seg_head.cls_branches.", "queries.map.cls_branches."),
    ("seg_head.reg_branches.", "queries.map.reg_branches."),
    ("seg_head.reg_branches2.", "queries.map.mask_reg_branches."),
    ("seg_head.cls_thing_branches.", "queries.map.thing_branches."),
    ("seg_head.cls_stuff_branches.", "queries.map.stuff_branches."),
    ("seg_head.things_mask_head.", "queries.map.thing_masks."),
    ("seg_head.stuff_mask_head.", "queries.map.stuff_masks."),
)
# What is left out on purpose, and why.
UNUSED = {
    "pts_bbox_head.code_weights": "weights of a loss; ours stand in the config",
    "criterion.code_weights": "weights of a loss; ours stand in the config",
    "seg_head.bev_embedding.weight": "the map head never reads it",
}
# OpenDriveVLA wraps UniAD's tower twice (LLaVA's tower, its model) and has Qwen2's own names.
TOWER = "model.vision_tower.vision_tower.vision_model."
STREAMS = ("scene", "track", "map")
OPENDRIVEVLA_RULES: Rules = (
    *((TOWER + theirs, ours) for theirs, ours in RULES),
    *((f"model.mm_projector_{stream}.", f"projectors.{stream}.") for stream in STREAMS),
    ("model.embed_tokens.", "language.model.model.embed_tokens."),
    ("model.layers.#.", "language.model.model.layers.#."),
    ("model.norm.", "language.model.model.norm."),
    ("lm_head.", "language.model.lm_head."),
)
# Checkpoints from before mmcv's second DCN interface name the offsets' convolution differently.
OLD_OFFSETS, NEW_OFFSETS = ".conv2_offset.", ".conv2.conv_offset."


@dataclass(frozen=True)
class Renamed:
    """What became of a set of names."""

    names: dict[str, str]  # from the old name to the new one
    unused: dict[str, str]  # old name and the reason
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How another project names the weights of one of its models."""

    name: str  # as on the command line
    title: str  # in sentences
    rules: Rules
    unused: Mapping[str, str]
    components: tuple[str, ...]  # of ours that it has, see component_of

    def to_ours(self, names: Iterable[str]) -> Renamed:
        """Their names to ours."""
        renamed, unused, unknown = {}, {}, []
        for name in names:
            if name in self.unused:
                unused[name] = self.unused[name]
                continue
            new = rename(name.replace(OLD_OFFSETS, NEW_OFFSETS), self.rules)
            if new is None:
                unknown.append(name)
            else:
                renamed[name] = new
        return Renamed(renamed, unused, tuple(unknown))

    def to_theirs(self, names: Iterable[str]) -> Renamed:
        """Our names to theirs."""
        back = tuple((ours, theirs) for theirs, ours in self.rules)
        found = {name: rename(name, back) for name in names}
        return Renamed(
            {name: new for name, new in found.items() if new is not None},
            {},
            tuple(name for name, new in found.items() if new is None),
        )


TOWER_COMPONENTS = ("encoder", "queries.track", "queries.map")
UNIAD = Layout("uniad", "UniAD's track and map model", RULES, UNUSED, TOWER_COMPONENTS)
OPENDRIVEVLA = Layout(
    "opendrivevla",
    "OpenDriveVLA",
    OPENDRIVEVLA_RULES,
    {TOWER + name: reason for name, reason in UNUSED.items()},
    (*TOWER_COMPONENTS, *(f"projectors.{stream}" for stream in STREAMS), "language"),
)
LAYOUTS = {layout.name: layout for layout in (UNIAD, OPENDRIVEVLA)}


def from_uniad(names: Iterable[str]) -> Renamed:
    """UniAD's names to ours."""
    return UNIAD.to_ours(names)


def to_uniad(names: Iterable[str]) -> Renamed:
    """Our names to UniAD's."""
    return UNIAD.to_theirs(names)


def component_of(name: str) -> str:
    """The part of the model that one of our names belongs to, e.g. "queries.map"."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("queries", "projectors") else first


def rename(name: str, rules: Rules) -> str | None:
    """The new name by the longest rule that fits; None: none does."""
    best: tuple[tuple[int, int], str] | None = None
    for rank, pattern, target in _compiled(rules):
        found = pattern.match(name) if best is None or rank > best[0] else None
        if found:
            new = target
            for number in found.groups():
                new = new.replace("#", number, 1)
            best = rank, new + name[found.end() :]
    return best[1] if best else None


@lru_cache
def _compiled(rules: Rules) -> tuple[tuple[tuple[int, int], re.Pattern[str], str], ...]:
    """Rank, pattern and target of each rule."""
    return tuple(
        (
            (len(source), -source.count("#")),
            re.compile(re.escape(source).replace(r"\#", "#").replace("#", r"(\d+)")),
            target,
        )
        for source, target in rules
    )


def to_odvla(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UniAD state dict under our names, without what is deliberately unused.

    Raises:
        UserError: a name is unknown.
    """
    renamed = UNIAD.to_ours(tensors)
    if renamed.unknown:
        raise UserError(
            f"{renamed.unknown[0]!r} is no weight of UniAD's track and map model "
            f"({len(renamed.unknown)} unknown names)"
        )
    return {new: tensors[old] for old, new in renamed.names.items()}
