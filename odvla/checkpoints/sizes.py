"""The sizes of a checkpoint's models, read from its shapes, and with them every name and shape.

From a few shapes follow the configs of our modules; the modules, built on the meta device, say what
each tensor must be called and how large it must be. So a checkpoint is held against the very code
that will load it. What shapes do not tell (heads: 8 everywhere in UniAD; metres a cell) keeps the
config's default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.resnet import BLOCKS, EXPANSION, ResNetConfig
from odvla.errors import UserError
from odvla.language.causal_lm import LanguageConfig
from odvla.projectors import NAMES, Kind, ProjectorConfig, kind_of
from odvla.queries.panoptic_map import UNIAD_ATTENTION_LEVELS, PanopticMapConfig
from odvla.queries.trackformer import TrackFormerConfig
from odvla.types import BevGrid

Shape = tuple[int, ...]
HEADS = 8  # of every attention in UniAD's tower
RANGE_X_M = 51.2  # half the width of UniAD's BEV; its height follows from its rows
# (hidden, layers) -> heads, key-value heads, name
QWEN = {
    (896, 24): (14, 2, "Qwen2.5-0.5B"),
    (2048, 36): (16, 2, "Qwen2.5-3B"),
    (3584, 28): (28, 4, "Qwen2.5-7B"),
}
_HEAD_SIZES = (128, 64, 32, 16, 8, 4, 2)
EMBEDDING = "language.model.model.embed_tokens.weight"
HEAD = "language.model.lm_head.weight"


@dataclass(frozen=True)
class Shapes:
    """Shapes of a checkpoint under our names, and how its owner calls them."""

    of: Mapping[str, Shape]
    where: str  # for sentences: the file
    original: Callable[[str], str]

    def size(self, name: str, axis: int = 0) -> int:
        """One side of a tensor.

        Raises:
            UserError: the tensor is missing or has fewer sides.
        """
        shape = self.of.get(name)
        if shape is None:
            raise UserError(f"{self.where} lacks {self.original(name)!r}")
        if len(shape) <= axis or not shape[axis]:
            raise UserError(
                f"{self.where}: {self.original(name)!r} has shape {shape}, one with a side number "
                f"{axis + 1} is needed"
            )
        return shape[axis]

    def count(self, prefix: str) -> int:
        """How many numbered items a list has."""
        found = [re.match(r"(\d+)\.", name[len(prefix) :]) for name in self.under(prefix)]
        return max((int(number[1]) + 1 for number in found if number), default=0)

    def under(self, prefix: str) -> list[str]:
        """Names that start so."""
        return [name for name in self.of if name.startswith(prefix)]

    def last(self, prefix: str) -> str:
        """The last weight of a numbered list of layers."""
        return f"{prefix}{max(self.count(prefix) - 1, 0)}.weight"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a checkpoint amount to; None where it holds no such part."""

    encoder: BEVFormerConfig | None = None
    track: TrackFormerConfig | None = None
    map: PanopticMapConfig | None = None
    projectors: dict[str, ProjectorConfig] = field(default_factory=dict)  # by stream
    language: LanguageConfig | None = None
    vocab_rows: int = 0
    shapes: dict[str, Shape] = field(default_factory=dict)  # of everything, under our names


def sizes_of(shapes: Shapes) -> Sizes:
    """Read the sizes, and list every name and shape that models of these sizes have.

    Raises:
        UserError: a tensor that tells a size is missing, or sizes contradict one another.
    """
    encoder = encoder_config(shapes) if shapes.under("encoder.") else None
    # Modules keep their grid, but no shape in them depends on it.
    grid = encoder.grid if encoder else BevGrid(-RANGE_X_M, -RANGE_X_M, 1.0, 1, 1)
    track = track_config(shapes) if shapes.under("queries.track.") else None
    map_head = map_config(shapes) if shapes.under("queries.map.") else None
    expected: dict[str, Shape] = {}
    if encoder:
        expected |= _shapes_of("encoder.", encoder)
    for config, at in ((track, "queries.track."), (map_head, "queries.map.")):
        if config is not None:
            dim = shapes.size(f"{at}query_embedding.weight", 1) // 2
            dim = encoder.dim if encoder else dim
            expected |= _shapes_of(at, config, dim, grid)
    projectors = {}
    streams = dict.fromkeys(name.split(".")[1] for name in shapes.under("projectors."))
    for stream in streams:
        projectors[stream], own = _projector(shapes, f"projectors.{stream}.")
        expected |= own
    language, rows = None, 0
    if shapes.under("language."):
        language = language_config(shapes)
        rows = shapes.size(EMBEDDING)
        expected |= _language_shapes(language, rows)
    return Sizes(encoder, track, map_head, projectors, language, rows, expected)


def encoder_config(shapes: Shapes) -> BEVFormerConfig:
    """BEVFormer's sizes."""
    size, at = shapes.size, "encoder."
    rows, columns = size(f"{at}row_embed.weight"), size(f"{at}col_embed.weight")
    dim = size(f"{at}bev_embedding.weight", 1)
    levels = size(f"{at}level_embeds")
    attention = f"{at}layers.0.temporal_attention.attention_weights.weight"
    temporal = size(attention) // (2 * HEADS)
    attention = f"{at}layers.0.spatial_attention.attention_weights.weight"
    spatial = size(attention) // (levels * HEADS)
    half_y = RANGE_X_M * rows / columns
    z_low, z_high = BEVFormerConfig.range_m[2], BEVFormerConfig.range_m[5]
    return _made(
        shapes,
        BEVFormerConfig,
        backbone=_backbone_config(shapes),
        dim=dim,
        rows=rows,
        columns=columns,
        range_m=(-RANGE_X_M, -half_y, z_low, RANGE_X_M, half_y, z_high),
        cameras=size(f"{at}cams_embeds"),
        levels=levels,
        layers=shapes.count(f"{at}layers."),
        heads=HEADS,
        hidden=size(f"{at}layers.0.ffn.fc1.weight"),
        spatial_points=spatial,
        temporal_points=temporal,
    )


def _backbone_config(shapes: Shapes) -> ResNetConfig:
    at = "encoder.backbone."
    base = shapes.size(f"{at}conv1.weight")
    third = shapes.count(f"{at}layer3.")
    depths = {blocks[2]: depth for depth, blocks in BLOCKS.items()}
    if third not in depths:
        raise UserError(
            f"{shapes.where}: the backbone has {third} blocks in its third stage; that is none of "
            f"ResNet-{', ResNet-'.join(map(str, sorted(BLOCKS)))}"
        )
    channels = [base * EXPANSION * 2**stage for stage in range(4)]
    laterals = range(shapes.count("encoder.neck.lateral_convs."))
    inputs = [shapes.size(f"encoder.neck.lateral_convs.{n}.weight", 1) for n in laterals]
    deformable = [
        stage
        for stage in range(4)
        if any(".conv_offset." in name for name in shapes.under(f"{at}layer{stage + 1}."))
    ]
    stages = tuple(stage for stage in range(4) if channels[stage] in inputs)
    return _made(
        shapes,
        ResNetConfig,
        depth=depths[third],
        base_channels=base,
        stages=stages,
        deformable_stages=tuple(deformable),
    )


def track_config(shapes: Shapes) -> TrackFormerConfig:
    """TrackFormer's sizes."""
    size, at = shapes.size, "queries.track."
    steps = size(shapes.last(f"{at}past_branches.0.")) // 2
    past = min(TrackFormerConfig.past_steps, steps)
    return _made(
        shapes,
        TrackFormerConfig,
        queries=size(f"{at}query_embedding.weight") - 1,
        layers=shapes.count(f"{at}layers."),
        heads=HEADS,
        hidden=size(f"{at}layers.0.ffn.fc1.weight"),
        points=size(f"{at}layers.0.cross_attention.attention_weights.weight") // HEADS,
        classes=size(shapes.last(f"{at}cls_branches.0.")),
        past_steps=past,
        future_steps=steps - past,
    )


def map_config(shapes: Shapes) -> PanopticMapConfig:
    """The map head's sizes.

    How many levels its attentions have weights for says whether it was trained with UniAD's stride
    quirk (see docs/parity.md).
    """
    size, at = shapes.size, "queries.map."
    points = PanopticMapConfig.points
    samples = size(f"{at}encoder.0.attention.attention_weights.weight")
    levels = max(samples // (HEADS * points), 1)
    usual = levels in (1, UNIAD_ATTENTION_LEVELS)
    return _made(
        shapes,
        PanopticMapConfig,
        queries=size(f"{at}query_embedding.weight"),
        encoder_layers=shapes.count(f"{at}encoder."),
        decoder_layers=shapes.count(f"{at}decoder."),
        heads=HEADS,
        hidden=size(f"{at}encoder.0.ffn.fc1.weight"),
        points=points,
        classes=size(f"{at}thing_branches.0.weight"),
        thing_mask_layers=shapes.count(f"{at}thing_masks.blocks."),
        stuff_mask_layers=shapes.count(f"{at}stuff_masks.blocks."),
        mask_heads=size(f"{at}thing_masks.attnen.linear_l1.0.weight"),
        attention_levels=None if usual else levels,
        compat="uniad" if levels > 1 else "none",
    )


def language_config(shapes: Shapes) -> LanguageConfig:
    """Qwen2's sizes.

    Heads do not show in the shapes: known sizes have theirs, for others the widest head that fits
    is taken, which changes no shape.
    """
    size, at = shapes.size, "language.model.model.layers."
    hidden, layers = size(EMBEDDING, 1), shapes.count(at)
    values = size(f"{at}0.self_attn.k_proj.weight")
    heads, kv_heads, _ = QWEN.get((hidden, layers), (0, 0, ""))
    if not heads:
        widths = [w for w in _HEAD_SIZES if hidden % w == 0 and values % w == 0]
        heads, kv_heads = (hidden // widths[0], values // widths[0]) if widths else (1, 1)
    return _made(
        shapes,
        LanguageConfig,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=size(f"{at}0.mlp.gate_proj.weight"),
        tie_embeddings=HEAD not in shapes.of,
    )


def qwen_name(config: LanguageConfig) -> str | None:
    """Which published Qwen2.5 has these sizes."""
    known = QWEN.get((config.hidden, config.layers))
    return known[2] if known else None


def _projector(shapes: Shapes, prefix: str) -> tuple[ProjectorConfig, dict[str, Shape]]:
    names = [name.removeprefix(prefix) for name in shapes.under(prefix)]
    # With one name missing or too many it is the kind that most of them belong to.
    kinds: list[Kind] = sorted(NAMES, key=lambda k: -len(NAMES[k].intersection(names)))
    kind = kind_of(names) or kinds[0]
    if not NAMES[kind].intersection(names):
        raise UserError(
            f"{shapes.where}: {shapes.original(prefix + names[0])!r} belongs to no kind of "
            f"projector ({', '.join(NAMES)})"
        )
    matrix = {"linear": "weight", "mlp2x_gelu": "0.weight", "qwen2_5_rms": "1.0.weight"}[kind]
    hidden, dim = shapes.size(prefix + matrix), shapes.size(prefix + matrix, 1)
    if "language.model.model.norm.weight" in shapes.of:  # it must fit the model that it feeds
        hidden = shapes.size("language.model.model.norm.weight")
    config = ProjectorConfig(kind)
    return config, _shapes_of(prefix, config, dim, hidden)


def _language_shapes(config: LanguageConfig, rows: int) -> dict[str, Shape]:
    own = _shapes_of("language.", config, rows)
    if config.tie_embeddings:
        del own[HEAD]
    return own


@lru_cache
def _names_and_shapes(config: Any, *arguments: Any) -> Mapping[str, Shape]:
    """Of what config.build(*arguments) makes. Cached: a tower takes half a second to make."""
    with torch.device("meta"):
        module: nn.Module = config.build(*arguments)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _shapes_of(prefix: str, config: Any, *arguments: Any) -> dict[str, Shape]:
    try:
        own = _names_and_shapes(config, *arguments)
    except ValueError as error:  # a width that does not fit the heads
        raise UserError(f"the shapes of {prefix}* make no model: {error}") from error
    return {prefix + name: shape for name, shape in own.items()}


def _made(shapes: Shapes, config: Any, **settings: Any) -> Any:
    """A config, or a sentence that tells the file whose sizes contradict one another."""
    try:
        return config(**settings)
    except ValueError as error:
        raise UserError(f"the shapes in {shapes.where} make no model: {error}") from error
