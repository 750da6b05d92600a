"""ResNet as UniAD uses it: caffe style, frozen BatchNorm, deformable convolutions in late stages.

"Caffe style" means that a bottleneck's stride sits on its first 1x1 convolution, that pixels are
BGR with only the mean subtracted, and nothing is divided by a standard deviation. Names of
parameters are those of torchvision's and mmdet's ResNet.

Shape legend: I images, C channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odvla.encoders.image_backbone import padded
from odvla.ops.deformable_conv import ModulatedDeformConv

# Caffe's ImageNet mean (BGR, 0..255).
PIXEL_MEAN_BGR = (103.53, 116.28, 123.675)
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4
# A BatchNorm with frozen statistics normalises nothing. Where no weights are loaded, its scales
# start so that activations stay of the order of 1: pixels by their spread, residual branches small.
PIXEL_SPREAD = 60.0
RESIDUAL_START = 0.2
MULTIPLE = 32  # images are padded at the bottom and right to a multiple of this


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet; the defaults are UniAD's."""

    depth: int = 101
    base_channels: int = 64
    stages: tuple[int, ...] = (1, 2, 3)  # whose outputs come out, counted from 0 (stride 4)
    deformable_stages: tuple[int, ...] = (2, 3)
    # Recompute activations in the backward pass: a fifth of the memory for a third more time.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: naming the setting.
        """
        if self.depth not in BLOCKS:
            raise ValueError(f"backbone.depth must be one of {sorted(BLOCKS)}, not {self.depth}")
        for name in ("stages", "deformable_stages"):
            if any(stage not in range(4) for stage in getattr(self, name)):
                raise ValueError(f"backbone.{name} must be some of 0..3, not {getattr(self, name)}")
        if not self.stages:
            raise ValueError("backbone.stages must name at least one stage")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return tuple(self.base_channels * EXPANSION * 2**stage for stage in self.stages)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each output."""
        return tuple(4 * 2**stage for stage in self.stages)

    def build(self) -> ResNet:
        """The backbone."""
        return ResNet(self)


class FrozenStatisticsBatchNorm(nn.BatchNorm2d):
    """BatchNorm that is never in training mode: its statistics are part of the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.training = False  # as modules are built in training mode

    def train(self, mode: bool = True) -> FrozenStatisticsBatchNorm:
        """Stay in evaluation mode."""
        return super().train(False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut; the stride is on the first."""

    def __init__(self, channels_in: int, channels: int, stride: int, *, deformable: bool) -> None:
        super().__init__()
        out = channels * EXPANSION
        self.conv1 = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        self.bn1 = FrozenStatisticsBatchNorm(channels)
        self.conv2: nn.Module = (
            ModulatedDeformConv(channels, channels)
            if deformable
            else nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        )
        self.bn2 = FrozenStatisticsBatchNorm(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = FrozenStatisticsBatchNorm(out)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(channels_in, out, 1, stride, bias=False), FrozenStatisticsBatchNorm(out)
            )
            if stride > 1 or channels_in != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[I, C, h, w] to [I, 4 * channels, h / stride, w / stride]."""
        shortcut = x
        if self.downsample is not None:
            shortcut = normed(self.downsample[0], self.downsample[1], x)
        x = normed(self.conv1, self.bn1, x).relu_()
        x = normed(self.conv2, self.bn2, x).relu_()
        return normed(self.conv3, self.bn3, x).add_(shortcut).relu_()


def normed(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolution and frozen normalisation, [I, C, h, w] to [I, O, h', w'].

    Where nothing is learned, the normalisation goes into the kernel: one walk over the map less for
    every convolution, a tenth of the backbone's time on a CPU.
    """
    if torch.is_grad_enabled():
        return norm(conv(x))
    assert isinstance(conv, nn.Conv2d | ModulatedDeformConv)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    if isinstance(conv, ModulatedDeformConv):
        return conv.convolve(x, weight, bias)
    return conv._conv_forward(x, weight, bias)


class ResNet(nn.Module):
    """uint8 images to feature maps; see the module's head."""

    pixel_mean: Tensor

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        base = config.base_channels
        self.register_buffer(
            "pixel_mean", torch.tensor(PIXEL_MEAN_BGR).view(3, 1, 1), persistent=False
        )
        self.conv1 = nn.Conv2d(3, base, 7, 2, padding=3, bias=False)
        self.bn1 = FrozenStatisticsBatchNorm(base)
        channels = base
        for stage in range(max(config.stages) + 1):
            blocks = []
            for block in range(BLOCKS[config.depth][stage]):
                stride = 2 if block == 0 and stage > 0 else 1
                deformable = stage in config.deformable_stages
                blocks.append(Bottleneck(channels, base * 2**stage, stride, deformable=deformable))
                channels = base * 2**stage * EXPANSION
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, RESIDUAL_START)
        nn.init.constant_(self.bn1.weight, 1 / PIXEL_SPREAD)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise, pad and encode.

        Args:
            images: uint8 [I, 3, h, w], RGB.

        Returns:
            One map [I, C_s, h_s, w_s] for each chosen stage, of the padded image.
        """
        return self.encode(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB [I, 3, h, w] to what `encode` takes: BGR less the mean, zeros as padding."""
        pixels = images.flip(1).float() - self.pixel_mean
        return padded(pixels, MULTIPLE)

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode what `normalise` made: [I, 3, h, w] with h and w multiples of 32."""
        if pixels.device.type == "cpu":
            # There, convolutions are a third faster so, and deformable ones need no transposition.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(normed(self.conv1, self.bn1, pixels).relu_(), 3, 2, padding=1)
        maps = []
        for stage in range(max(self.config.stages) + 1):
            for block in getattr(self, f"layer{stage + 1}"):
                x = checkpoint(block, x, use_reentrant=False) if self._recompute(x) else block(x)
            if stage in self.config.stages:
                maps.append(x)
        return tuple(maps)

    def _recompute(self, x: Tensor) -> bool:
        trains = x.requires_grad or any(p.requires_grad for p in self.parameters())
        return self.config.checkpoint and torch.is_grad_enabled() and trains


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width after padding."""
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017) with extra levels, each a stride-2 convolution of the last.

    Args:
        channels: of the backbone's maps, fine to coarse.
        dim: channels of every output.
        outputs: levels that come out; those beyond the maps' are made from the coarsest one.
    """

    def __init__(self, channels: Sequence[int], dim: int, outputs: int = 4) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, 1 if level < len(channels) else 2, padding=1)
            for level in range(outputs)
        )
        for module in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [I, C_s, h_s, w_s] to `outputs` maps [I, dim, ...], fine to coarse."""
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            coarser = F.interpolate(merged[level + 1], merged[level].shape[-2:], mode="nearest")
            merged[level] = merged[level] + coarser
        out = [layer(x) for layer, x in zip(self.fpn_convs, merged, strict=False)]
        for level in range(len(merged), len(self.fpn_convs)):
            # mmdet's relu_before_extra_convs spares the first extra level.
            source = out[-1] if level == len(merged) else out[-1].relu()
            out.append(self.fpn_convs[level](source))
        return tuple(out)
