"""Modulated deformable convolution (DCNv2, Zhu et al. 2019): a convolution whose taps wander.

Shape legend: B images, C channels in, O channels out, K taps (kernel rows x columns, row by row),
H x W pixels in, h x w pixels out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odvla.ops.backends import PURE, backend_for


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
        [B, O, h, w], computed in float32 where autocast would have made it less, since sampling
        places in half precision would be several pixels off.

    Raises:
        UserError: the chosen backend cannot run on this device.
    """
    rows, columns = offset.shape[-2:]
    numbers = mask[0].numel() * x.shape[1]
    backend = backend_for(x, offset, mask, weight, numbers=numbers)
    with torch.autocast(x.device.type, enabled=False):
        full = torch.promote_types(torch.float32, x.dtype)
        parts = (x.to(full), offset.to(full), mask.to(full), weight.to(full))
        if backend in PURE.values():
            y_at, x_at = tap_places(parts[1], weight.shape[-2:], stride, padding, dilation)
            by_place = parts[2].flatten(2).transpose(1, 2).contiguous()  # B, h * w, K
            out = backend.convolution(parts[0], y_at, x_at, by_place, parts[3])
            out = out.unflatten(1, (rows, columns))  # B, h, w, O
        else:
            out = backend.convolution(*parts, stride, padding, dilation).permute(0, 2, 3, 1)
        if bias is not None:
            out = out + bias.to(full)
        out = out.permute(0, 3, 1, 2)
    return out.to(x.dtype)


def tap_places(
    offset: Tensor, kernel: Sequence[int], stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Where every tap reads, in pixels.

    Args:
        offset: [B, 2 * K, h, w].
        kernel: its rows and columns.
        stride: see modulated_deform_conv, as padding and dilation.
        padding: in pixels.
        dilation: in pixels.

    Returns:
        y and x, each [B, h * w, K].
    """
    rows, columns = offset.shape[-2:]

    def places(length: int, step: int, start: int = 0) -> Tensor:
        return torch.arange(length, device=offset.device, dtype=offset.dtype) * step + start

    dy, dx = offset.unflatten(1, (-1, 2)).permute(2, 0, 3, 4, 1).contiguous()  # B, h, w, K
    tap_y = places(kernel[0], dilation).repeat_interleave(kernel[1])
    tap_x = places(kernel[1], dilation).repeat(kernel[0])
    y = dy + (places(rows, stride, -padding).view(-1, 1, 1) + tap_y)
    x = dx + (places(columns, stride, -padding).view(-1, 1) + tap_x)
    return y.flatten(1, 2), x.flatten(1, 2)


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
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another kernel of the same shape, and a bias [O]."""
        offset, mask = self.conv_offset(x).split([2 * self.KERNEL**2, self.KERNEL**2], 1)
        return modulated_deform_conv(
            x,
            offset,
            mask.sigmoid(),
            weight,
            bias,
            stride=self.stride,
            padding=self.dilation,
            dilation=self.dilation,
        )
