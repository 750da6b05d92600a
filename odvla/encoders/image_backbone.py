"""A few-layer convolutional image backbone and its feature pyramid.

GroupNorm throughout: it keeps no running statistics, so freezing the backbone freezes all of it,
and a row's features do not depend on the other rows of its batch.

Shape legend: I images, C channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ImageNet's pixel statistics (RGB, 0..255), so that pretrained weights could follow.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
GROUP_SIZE = 8  # channels a GroupNorm group


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """Images [..., h, w] with zeros at the bottom and right, to multiples of so many pixels."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))


@dataclass(frozen=True)
class ImageBackboneConfig:
    """A stem at stride 2 and one stage for each of the strides 4, 8, 16, ..."""

    widths: tuple[int, ...] = (16, 24, 48, 64)  # channels of the stem and of each stage
    blocks: tuple[int, ...] = (0, 1, 1)  # residual blocks of each stage

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            ValueError: widths and blocks do not fit, or a width is no multiple of GROUP_SIZE.
        """
        if len(self.widths) != len(self.blocks) + 1:
            raise ValueError(
                f"image backbone: widths {self.widths} must have one entry more than blocks "
                f"{self.blocks}"
            )
        if any(width % GROUP_SIZE for width in self.widths):
            raise ValueError(
                f"image backbone: every width of {self.widths} must be a multiple of {GROUP_SIZE}"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the stages' outputs."""
        return self.widths[1:]

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the stages' outputs."""
        return tuple(4 * 2**stage for stage in range(len(self.blocks)))

    def build(self) -> ImageBackbone:
        """The backbone."""
        return ImageBackbone(self)


def conv(channels_in: int, channels_out: int, kernel: int = 3, **settings: object) -> nn.Module:
    """Convolution, GroupNorm and, unless act_cfg=None, ReLU."""
    # Imported late: mmcv takes as long to import as torch, and reading a config needs neither.
    from mmcv.cnn import ConvModule

    return ConvModule(
        channels_in,
        channels_out,
        kernel,
        padding=kernel // 2,
        norm_cfg={"type": "GN", "num_groups": channels_out // GROUP_SIZE},
        **settings,
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels)
        self.second = conv(channels, channels, act_cfg=None)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out as in."""
        return F.relu(x + self.second(self.first(x)))


class ImageBackbone(nn.Module):
    """uint8 images to feature maps at strides 4, 8, 16, ..."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ImageBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1))
        self.stem = conv(3, config.widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv(config.widths[stage], config.widths[stage + 1], stride=2),
                *(ResidualBlock(config.widths[stage + 1]) for _ in range(blocks)),
            )
            for stage, blocks in enumerate(config.blocks)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise and encode.

        Args:
            images: uint8 [I, 3, h, w], RGB.

        Returns:
            One map [I, C_s, ceil(h / s), ceil(w / s)] for each stride s.
        """
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        # Everything after follows this layout, which convolutions of a CPU want.
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


class FeaturePyramid(nn.Module):
    """FPN (Lin et al. 2017) without output convolutions.

    Args:
        channels: of the backbone's maps, fine to coarse.
        dim: channels of every output.
        outputs: which of the maps come out.
    """

    def __init__(self, channels: Sequence[int], dim: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.outputs = tuple(sorted(outputs))
        # Finer maps than the finest output are never used: they get no parameters.
        self.first = self.outputs[0]
        self.laterals = nn.ModuleList(conv(c, dim, 1, act_cfg=None) for c in channels[self.first :])

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [I, C_s, h_s, w_s] to the chosen ones as [I, dim, h_s, w_s], fine to coarse."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps[self.first :], strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            coarser = F.interpolate(merged[level + 1], merged[level].shape[-2:], mode="nearest")
            merged[level] = merged[level] + coarser
        return tuple(merged[index - self.first] for index in self.outputs)
