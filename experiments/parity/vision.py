"""Cases a, b and the operation of f: backbone, feature pyramid, BEV encoder."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parity.golden import Check, Golden, under
from odvla.encoders.bev_motion import turn_bev
from odvla.encoders.bevformer import BEVFormer, BEVFormerConfig
from odvla.encoders.bevformer_layers import BEVFormerLayer
from odvla.encoders.protocol import EncoderState
from odvla.encoders.resnet import FPN, ResNet, ResNetConfig
from odvla.ops.deformable_attention import deformable_attention
from odvla.ops.deformable_conv import modulated_deform_conv
from odvla.types import Cameras, Frames
from odvla.weight_names import to_odvla


def resnet_config(facts: dict[str, Any]) -> ResNetConfig:
    """Our settings for the reference's `img_backbone`."""
    return ResNetConfig(
        depth=facts["depth"],
        base_channels=facts["base_channels"],
        stages=tuple(facts["out_indices"]),
        deformable_stages=tuple(n for n, dcn in enumerate(facts["stage_with_dcn"]) if dcn),
    )


@dataclass(frozen=True)
class Maps:
    """Stands where a backbone would, for cases that start from its maps."""

    channels: tuple[int, ...]

    def build(self) -> nn.Module:
        """Nothing to compute."""
        return nn.Identity()


def bevformer_config(
    transformer: dict[str, Any], bev: list[int], backbone: Any, dim: int
) -> BEVFormerConfig:
    """Our settings for the reference's `PerceptionTransformer`."""
    encoder = transformer["encoder"]
    layer = encoder["transformerlayers"]
    temporal, spatial = layer["attn_cfgs"]
    points = spatial["deformable_attention"]
    return BEVFormerConfig(
        backbone=backbone,
        dim=dim,
        rows=bev[0],
        columns=bev[1],
        range_m=tuple(encoder["pc_range"]),
        cameras=transformer["num_cams"],
        levels=points["num_levels"],
        layers=encoder["num_layers"],
        heads=points.get("num_heads", 8),
        hidden=layer["feedforward_channels"],
        heights=encoder["num_points_in_pillar"],
        spatial_points=points["num_points"],
        temporal_points=temporal.get("num_points", 4),
        compat="uniad",
        rotate_center=tuple(transformer.get("rotate_center", (100, 100))),
    )


def load_encoder(encoder: BEVFormer, weights: dict[str, Tensor]) -> None:
    """Fill an encoder from a reference state dict; what it does not have is left out."""
    own = under(to_odvla(weights), "encoder.")
    names = encoder.state_dict().keys()
    encoder.load_state_dict({name: own[name] for name in names})
    encoder.eval()


def still_frames(images: Tensor, lidar_to_image: Tensor, can_bus: Tensor, *, start: bool) -> Frames:
    """One row of Frames from what the reference is given: a single matrix for each camera.

    Args:
        images: uint8 [1, N, 3, h, w].
        lidar_to_image: float64 [N, 4, 4].
        can_bus: [18], prepared.
        start: a scene starts.
    """
    cameras = len(lidar_to_image)
    intrinsics = torch.eye(3).expand(1, cameras, 3, 3)
    return Frames(
        images=images,
        cameras=Cameras(intrinsics, lidar_to_image.float()[None]),
        lidar_to_global=torch.eye(4, dtype=torch.float64)[None],
        timestamp_s=torch.zeros(1, dtype=torch.float64),
        can_bus=can_bus[None],
        scene_start=torch.tensor([start]),
        sample_tokens=("recorded",),
    )


def backbone(golden: Golden, stem: str) -> Iterator[Check]:
    """Case a: ResNet, FPN, one deformable bottleneck, one deformable convolution."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    net = resnet_config(facts["img_backbone"]).build().eval()
    weights = to_odvla(golden.weights)
    net.load_state_dict(under(weights, "encoder.backbone."))
    neck = facts["img_neck"]
    fpn = FPN(net.config.channels, neck["out_channels"], neck["num_outs"])
    fpn.load_state_dict(under(weights, "encoder.neck."))
    maps = net.encode(given["in/img"])
    for number, level in enumerate(maps):
        yield Check(f"backbone_{number}", level, given[f"out/backbone_{number}"])
    for number, level in enumerate(fpn(maps)):
        yield Check(f"fpn_{number}", level, given[f"out/fpn_{number}"])
    yield from _bottleneck(net, given)
    yield Check(
        "dcn_y",
        modulated_deform_conv(
            given["in/dcn_x"],
            given["in/dcn_offset"],
            given["in/dcn_mask"],
            given["in/dcn_weight"],
            given["in/dcn_bias"],
            padding=1,
        ),
        given["out/dcn_y"],
    )


def _bottleneck(net: ResNet, given: dict[str, Tensor]) -> Iterator[Check]:
    """Every recorded block, `layer<stage>_<block>`."""
    for name in given:
        if not name.startswith("in/layer"):
            continue
        label = name.removeprefix("in/").removesuffix("_x")
        stage, block = label.split("_")
        bottleneck = getattr(net, stage)[int(block)]
        x = given[name]
        yield Check(f"{label}_y", bottleneck(x), given[f"out/{label}_y"])
        inner = bottleneck.bn1(bottleneck.conv1(x)).relu()
        raw = bottleneck.conv2.conv_offset(inner)
        yield Check(f"{label}_conv_offset_raw", raw, given[f"out/{label}_conv_offset_raw"])


def bev_encoder(golden: Golden, stem: str) -> Iterator[Check]:
    """Case b: the BEV encoder on two consecutive frames, with everything in between."""
    given, facts = golden.tensors(stem), golden.facts(stem)
    channels = facts.get("backbone_channels") or tuple(
        golden.weights[name].shape[1]
        for name in sorted(golden.weights)
        if name.startswith("img_neck.lateral_convs.") and name.endswith(".weight")
    )
    config = bevformer_config(facts["cfg"], facts["bev"], Maps(channels), facts["embed_dims"])
    encoder = config.build()
    load_encoder(encoder, golden.weights)
    height, width = facts["image_hw"]
    images = torch.zeros(1, config.cameras, 3, height, width, dtype=torch.uint8)
    state = None
    frame = 0
    while f"in/f{frame}/can_bus" in given:
        inputs, wanted = under(given, f"in/f{frame}/"), under(given, f"out/f{frame}/")
        frames = still_frames(images, inputs["lidar2img"], inputs["can_bus"], start=state is None)
        levels = [inputs[f"feat{level}"] for level in range(config.levels)]
        bev = yield from _bev_frame(encoder, levels, frames, state, wanted, f"f{frame}/")
        state = EncoderState(
            bev.unflatten(1, (config.rows, config.columns)),
            frames.lidar_to_global,
            torch.ones(1, dtype=torch.bool),
        )
        frame += 1


def _bev_frame(
    encoder: BEVFormer,
    levels: list[Tensor],
    frames: Frames,
    state: EncoderState | None,
    wanted: dict[str, Tensor],
    name: str,
) -> Generator[Check, None, Tensor]:
    """Checks of one frame; returns its BEV [1, Q, C]."""
    bev, shared = encoder.prepare(levels, frames, state)
    rows, columns = shared.size
    yield Check(f"{name}bev_query", bev, wanted["enc_bev_query_in"].transpose(0, 1))
    positions = shared.positions.transpose(1, 2).unflatten(2, (rows, columns))
    yield Check(f"{name}bev_pos", positions, wanted["bev_pos"])
    seen = shared.seen
    visible = wanted["bev_mask"][:, 0]
    yield Check(f"{name}bev_mask", seen.visible[0].to(visible.dtype), visible, "index")
    # A point behind a camera projects to anywhere: only the visible ones are used.
    chosen = visible.bool()
    places = wanted["reference_points_cam"][:, 0]
    yield Check(f"{name}reference_points_cam", seen.uv[0][chosen], places[chosen])
    yield Check(f"{name}hybrid_ref_2d", shared.at[0], wanted["hybrid_ref_2d"][:, :, 0])
    yield Check(f"{name}feat_flatten", shared.image[0], wanted["enc_feat_flatten"][:, :, 0])
    shift = shared.at[0, 0] - encoder.centres
    yield Check(f"{name}shift", shift[:1], wanted["shift"])
    if "prev_bev_rotated" in wanted:
        assert shared.previous is not None
        turned = wanted["prev_bev_rotated"].transpose(0, 1)
        assert shared.previous is not None
        yield Check(f"{name}prev_bev_rotated", shared.previous, turned)
    for number, layer in enumerate(encoder.layers):
        assert isinstance(layer, BEVFormerLayer)
        past = layer.attend_past(bev, shared)
        if f"layer{number}_tsa_out" in wanted:
            yield Check(f"{name}layer{number}_tsa", past, wanted[f"layer{number}_tsa_out"])
        image = layer.spatial_attention(layer.norms[0](past), shared.image, shared.sizes, seen)
        yield Check(f"{name}layer{number}_sca", image, wanted[f"layer{number}_sca_out"])
        bev = layer(bev, shared)
        yield Check(f"{name}layer{number}", bev, wanted[f"layer{number}_out"])
    yield Check(f"{name}bev_embed", bev, wanted["bev_embed"])
    return bev


def rotation(golden: Golden, stem: str) -> Iterator[Check]:
    """Case b_rotate_unit: turning a BEV."""
    given = golden.tensors(stem)
    for name, wanted in given.items():
        kind, _, degrees = name.removeprefix("out/").partition("_")
        if not name.startswith("out/"):
            continue
        if kind == "small":
            bev = given["in/small"][None]
        else:
            # A map whose value says which cell it was.
            rows, columns = wanted.shape[-2:]
            bev = 1 + torch.arange(rows * columns).float().view(1, 1, rows, columns)
        turned = turn_bev(bev, torch.tensor([float(degrees)]))[0]
        yield Check(f"{kind}_{degrees}", turned.to(wanted.dtype), wanted, "index")


def attention_unit(golden: Golden, stem: str) -> Iterator[Check]:
    """Case f_msda_unit: deformable attention, also where the weights are for too many levels."""
    given = golden.tensors(stem)
    for name in sorted({key.split("/")[0] for key in given}):
        case = under(given, f"{name}/")
        value, sizes = case["in/value"], [tuple(s) for s in case["in/spatial_shapes"].tolist()]
        batch, _, heads, _ = value.shape
        parts = value.flatten(2).transpose(1, 2).split([h * w for h, w in sizes], 2)
        maps = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        where, weights = case["in/locations_xy"], case["in/weights"]
        queries, points = where.shape[1], where.shape[4]
        if where.shape[3] != len(sizes):
            # The compiled op walks through the buffers with the stride of the levels there are.
            entries = queries * heads * len(sizes) * points
            shape = (batch, queries, heads, len(sizes), points)
            where = where.flatten(1)[:, : entries * 2].reshape(*shape, 2)
            weights = weights.flatten(1)[:, :entries].reshape(shape)
        yield Check(name, deformable_attention(maps, where, weights), case["out"])
