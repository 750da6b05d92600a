"""Modulated deformable convolution, every backend, against a loop and a plain convolution."""

import math

import pytest
import torch
import torch.nn.functional as F

from odvla.ops import backends, weighted_bags
from odvla.ops.deformable_conv import ModulatedDeformConv, modulated_deform_conv


def inputs(dtype=torch.float32, *, size=(5, 7), out=(5, 7), seed=0):
    """x, offset, mask, weight."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    offset = 1.5 * randn(2, 18, *out)
    return randn(2, 3, *size), offset, randn(2, 9, *out).sigmoid(), randn(4, 3, 3, 3)


def read_by_hand(channel_map, y, x):
    """Bilinear value at a place in pixels; zero outside."""
    height, width = channel_map.shape
    total = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * channel_map[i, j].item()
    return total


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "out"), [(1, 1, 1, (5, 7)), (2, 2, 2, (3, 4))]
)
def test_it_equals_a_slow_loop(backend, device, stride, padding, dilation, out) -> None:
    x, offset, mask, weight = inputs(out=out)
    bias = torch.arange(4.0)
    result = modulated_deform_conv(
        *(part.to(device) for part in (x, offset, mask, weight, bias)),
        stride=stride,
        padding=padding,
        dilation=dilation,
    ).cpu()
    assert result.shape == (2, 4, *out)
    for row in range(out[0]):
        for column in range(out[1]):
            expected = bias.clone()
            for tap in range(9):
                dy, dx = offset[1, 2 * tap : 2 * tap + 2, row, column].tolist()
                y = row * stride - padding + (tap // 3) * dilation + dy
                at = column * stride - padding + (tap % 3) * dilation + dx
                for channel in range(3):
                    read = read_by_hand(x[1, channel], y, at)
                    read *= mask[1, tap, row, column].item()
                    expected += weight[:, channel, tap // 3, tap % 3] * read
            torch.testing.assert_close(result[1, :, row, column], expected, atol=1e-4, rtol=1e-4)


def test_without_offsets_it_is_a_convolution_with_its_gradients(backend, device, monkeypatch):
    monkeypatch.setattr(weighted_bags, "FORWARD_PIECE", 4 * 9 * 8)
    x, offset, mask, weight = (part.to(device) for part in inputs())
    x.requires_grad_()
    weight.requires_grad_()
    found = modulated_deform_conv(x, 0 * offset, 0 * mask + 1, weight, padding=1)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    target = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), target),
        torch.autograd.grad(expected, (x, weight), target),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gradients_equal_finite_differences(backend, device) -> None:
    if backend in backends.COMPILED:
        pytest.skip("finite differences need float64")
    leaves = [part.requires_grad_() for part in inputs(torch.float64, size=(3, 4), out=(3, 4))]
    assert torch.autograd.gradcheck(lambda *t: modulated_deform_conv(*t, padding=1), leaves)


def test_gradients_equal_grid_samples(backend, device) -> None:
    parts = [part.to(device) for part in inputs(size=(8, 16), out=(8, 16))]
    parts[1][:, :6] = parts[1][:, :6].round()  # on pixels' centres
    parts[1][:, :, 0] *= 10  # far outside

    def all_of_it():
        leaves = [part.detach().clone().requires_grad_() for part in parts]
        out = modulated_deform_conv(*leaves, padding=1)
        target = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        return out, *torch.autograd.grad(out, leaves, target)

    found = all_of_it()
    backends.use_backend("grid_sample")
    for ours, theirs in zip(found, all_of_it(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_maps_of_any_memory_format_give_the_same(backend, device) -> None:
    torch.manual_seed(0)
    layer = ModulatedDeformConv(6, 5).to(device)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    x = torch.randn(2, 6, 9, 8, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), layer(x), atol=1e-5, rtol=1e-4)
