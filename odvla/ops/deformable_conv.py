"""Modulated deformable convolution (DCNv2, Zhu et al. 2019): a convolution whose taps wander.

Shape legend: B images, C channels in, O channels out, K taps (kernel rows x columns, row by row),
H x W pixels in, h x w pixels out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulated_deform_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolve with taps moved by `offset` and weighted by `mask`.

    Args:
        x: [B, C, H, W]; what lies outside counts as zero.
        offset: [B, 2 * K, h, w] pixels, (dy, dx) of one tap after the other.
        mask: [B, K, h, w].
        weight: [O, C, kernel rows, kernel columns].
        bias: [O].
        stride: in both directions.
        padding: on all sides.
        dilation: distance of neighbouring taps.

    Returns:
        [B, O, h, w]; in float32 where autocast would have made it less, since sampling places in
        half precision would be several pixels off.
    """
    with torch.autocast(x.device.type, enabled=False):
        columns = _sample(
            x.float(), offset.float(), mask.float(), weight, stride, padding, dilation
        )
        out = weight.float().flatten(1) @ columns  # B, O, h * w
    out = out.unflatten(-1, tuple(offset.shape[-2:])).to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype).view(-1, 1, 1)


def _sample(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """What every tap reads: [B, C * K, h * w]."""
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[-2:]
    out_rows, out_columns = offset.shape[-2:]
    taps = rows * columns

    def places(length: int) -> Tensor:
        return torch.arange(length, device=x.device, dtype=x.dtype)

    tap_y, tap_x = torch.meshgrid(places(rows), places(columns), indexing="ij")
    dy, dx = offset.view(batch, taps, 2, out_rows, out_columns).unbind(2)
    start_y = (places(out_rows) * stride - padding).view(1, 1, -1, 1)
    start_x = (places(out_columns) * stride - padding).view(1, 1, 1, -1)
    y = start_y + (tap_y * dilation).view(1, -1, 1, 1) + dy  # B, K, h, w
    x_at = start_x + (tap_x * dilation).view(1, -1, 1, 1) + dx
    # grid_sample counts from the outer edge of the first pixel (-1) to that of the last (1).
    grid = torch.stack([(2 * x_at + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    sampled = F.grid_sample(
        x, grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    sampled = sampled.view(batch, channels, taps, -1) * mask.view(batch, 1, taps, -1)
    return sampled.flatten(1, 2)


class ModulatedDeformConv(nn.Module):
    """A 3x3 DCNv2 layer that predicts its own offsets and mask; it starts as a plain convolution.

    Parameter names are mmcv's: `weight`, `conv_offset.weight`, `conv_offset.bias`.

    Args:
        channels_in: C.
        channels_out: O.
        stride: in both directions.
        dilation: distance of neighbouring taps.
    """

    KERNEL = 3

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        kernel = self.KERNEL
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel))
        self.conv_offset = nn.Conv2d(
            channels_in,
            3 * kernel * kernel,
            kernel,
            stride=stride,
            padding=dilation,
            dilation=dilation,
        )
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, O, h, w]."""
        offset, mask = self.conv_offset(x).split([2 * self.KERNEL**2, self.KERNEL**2], 1)
        return modulated_deform_conv(
            x,
            offset,
            mask.sigmoid(),
            self.weight,
            stride=self.stride,
            padding=self.dilation,
            dilation=self.dilation,
        )
