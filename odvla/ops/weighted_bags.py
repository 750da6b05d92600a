"""Bilinear sampling as weighted bags of rows: the formulation that is fastest on a CPU.

A map whose channels stand together is a table of rows. A bilinear sample is the sum of four rows,
the weighted sum of many samples is a longer such sum, and torch's embedding_bag computes just that:
"weigh these rows and add them up", without ever writing down what was read. So no array of samples
exists, neither forward nor backward; places are turned into rows and weights piece by piece, in
pieces that stay in a core's cache. docs/ops.md has the measurements.

What is unusual: the corner that would lie outside gets weight zero without a mask. The upper left
corner is held inside the map, and each corner's weight is the hat max(0, 1 - distance), which is
zero for every place the corner does not belong to. So the four rows always are r, r + 1,
r + width and r + width + 1.

Shape legend: B rows, Q queries, A heads, L levels, P points, E channels a head, T = P samples of a
bag, C channels in, O out, K taps, S places, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Samples treated at once: forward so few that their rows and weights stay in a core's cache,
# backward more, because a piece visits the whole map when it adds up the gradient of its rows.
FORWARD_PIECE, BACKWARD_PIECE = 1 << 16, 1 << 20


@dataclass
class Corners:
    """The four pixels around places [..., T], and their shares."""

    row: Tensor  # int32 [..., T], of the upper left pixel
    dx: tuple[Tensor, Tensor]  # [..., T] pixels from the left and from the right corner
    dy: tuple[Tensor, Tensor]  # from the upper and from the lower one
    steps: tuple[int, int, int, int]  # from `row` to the four, in the order of `shares`

    @classmethod
    def around(cls, x: Tensor, y: Tensor, height: int, width: int) -> Corners:
        """Corners of places in pixels from the first one's centre; x and y are used up."""
        assert min(height, width) > 1
        left = x.floor().clamp_(0, width - 2)
        top = y.floor().clamp_(0, height - 2)
        # Whole numbers up to 2^24 are exact in float32. The second clamp is for places that are no
        # numbers at all: they make the result NaN, as they should, and not the row a wild address.
        row = (top * width).add_(left).to(torch.int32).clamp_(0, height * width - width - 2)
        dx, dy = x.sub_(left), y.sub_(top)
        return cls(row, (dx, dx - 1), (dy, dy - 1), (0, 1, width, width + 1))

    def shares(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights left, right, upper, lower [..., T]: those of a corner are a product of two."""
        x0, x1, y0, y1 = (d.abs().neg_().add_(1).clamp_(min=0) for d in (*self.dx, *self.dy))
        return x0, x1, y0, y1

    def slopes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How the four shares change a pixel; on a pixel, towards larger x and y."""
        x0, x1, y0, y1 = (_slope(d) for d in (*self.dx, *self.dy))
        return x0, x1, y0, y1


def _slope(d: Tensor) -> Tensor:
    """Of the hat max(0, 1 - |d|)."""
    rising, falling = (d >= -1) & (d < 0), (d >= 0) & (d < 1)
    return rising.to(d.dtype) - falling.to(d.dtype)


def _products(x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
    """Of the shares of four corners: [..., 4, T]."""
    return torch.stack([y0 * x0, y0 * x1, y1 * x0, y1 * x1], -2)


def _rows(row: Tensor, steps: Sequence[int]) -> Tensor:
    """Rows of the four corners: [..., 4, T]."""
    return torch.stack([row + step if step else row for step in steps], -2)


def _bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: table [R, E], rows and weights [..., 4, T] -> [bags, E]."""
    rows, weights = rows.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2)
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


def _weights_gradient(table: Tensor, rows: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `_bags` for the weights [..., 4, T]: products of grad [bags, E] with rows."""
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        return torch.autograd.grad(_bags(table, rows, leaf), leaf, grad)[0]


def _table_gradient(
    corners: Corners, shares: Tensor, grad: Tensor, rows: int, scale: int
) -> Tensor:
    """Gradient of `_bags` for the table: [rows, E].

    It is a bag again: a row of the table gathers the gradients of all bags that read it. Sorting
    the samples by row finds them. One sort serves all four corners, whose rows differ by a
    constant; only where the table is much longer than the list of samples, one walk over the table
    instead of four is worth a longer sort.

    Args:
        corners: of the samples, row [bags, T].
        shares: of all samples [bags, 4, T].
        grad: [bags, E].
        rows: of the table.
        scale: rows a pixel.
    """
    steps = [step * scale for step in corners.steps]
    index, parts = corners.row, shares.unbind(1)
    if rows > index.numel():
        index, steps, parts = _rows(index, steps).flatten(1), [0], (shares.flatten(1),)
    samples = index.shape[1]
    ordered, order = index.flatten().sort()
    counts = torch.bincount(ordered, minlength=rows)
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    bags = order.div(samples, rounding_mode="floor").to(torch.int32)
    total: Tensor | None = None
    for step, part in zip(steps, parts, strict=True):
        read = F.embedding_bag(
            bags, grad, starts, per_sample_weights=part.flatten()[order], mode="sum"
        )
        if total is None:
            total = read
        else:
            total[step:] += read[: rows - step]
    assert total is not None
    return total


def _two_at_least(value: Tensor) -> Tensor:
    """A map [..., h, w] with a border of zeros where it has one row or column only."""
    height, width = value.shape[-2:]
    if min(height, width) > 1:
        return value  # a padding of nothing would copy
    return F.pad(value, (0, int(width == 1), 0, int(height == 1)))


# -- deformable attention -------------------------------------------------------------------------


def attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """See odvla.ops.deformable_attention: float32 or float64."""
    return _Attention.apply(locations, weights, *values)


def _table(value: Tensor, heads: int) -> Tensor:
    """A map [A * E, h, w] as rows [h * w * A, E]; no copy where channels stand together."""
    # A row must lie together in memory, or embedding_bag takes its slow way.
    return _two_at_least(value).permute(1, 2, 0).contiguous().view(-1, len(value) // heads)


def _sizes(value: Tensor) -> tuple[int, int]:
    height, width = value.shape[-2:]
    return max(height, 2), max(width, 2)


def _attention_corners(locations: Tensor, value: Tensor) -> Corners:
    """Corners [q, A, P] of places [q, A, P, 2] in a map, as rows of `_table`."""
    height, width = value.shape[-2:]
    x, y = locations[..., 0].mul(width).sub_(0.5), locations[..., 1].mul(height).sub_(0.5)
    corners = Corners.around(x, y, *_sizes(value))
    heads = locations.shape[1]
    head = torch.arange(heads, dtype=torch.int32, device=x.device).unsqueeze(-1)
    corners.row.mul_(heads).add_(head)
    return corners


class _Attention(torch.autograd.Function):
    """Keeps its inputs and nothing else; see the module's head."""

    @staticmethod
    def forward(ctx: Any, locations: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(locations, weights, *values)
        batch, queries, heads, _, points = weights.shape
        out = weights.new_empty(batch, queries, values[0].shape[1])
        piece = max(1, FORWARD_PIECE // (heads * points))
        for row in range(batch):
            tables = [_table(value[row], heads) for value in values]
            for start in range(0, queries, piece):
                part = slice(start, start + piece)
                total: Tensor | None = None
                for level, (value, table) in enumerate(zip(values, tables, strict=True)):
                    corners = _attention_corners(locations[row, part, :, level], value)
                    x0, x1, y0, y1 = corners.shares()
                    weight = weights[row, part, :, level]
                    shares = _products(x0, x1, y0.mul_(weight), y1.mul_(weight))
                    steps = [step * heads for step in corners.steps]
                    read = _bags(table, _rows(corners.row, steps), shares)
                    total = read if total is None else total.add_(read)
                assert total is not None
                out[row, part] = total.view(-1, out.shape[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        locations, weights, *values = ctx.saved_tensors
        to_places, to_weights, *to_values = ctx.needs_input_grad
        batch, queries, heads, _, points = weights.shape
        grad_locations = torch.empty_like(locations) if to_places else None
        grad_weights = torch.empty_like(weights) if to_weights else None
        grad_values = [
            torch.zeros_like(value) if wanted else None
            for value, wanted in zip(values, to_values, strict=True)
        ]
        piece = max(1, BACKWARD_PIECE // (heads * points))
        for row in range(batch):
            for level, value in enumerate(values):
                table = _table(value[row], heads)
                total = torch.zeros_like(table) if to_values[level] else None
                for start in range(0, queries, piece):
                    at = (row, slice(start, start + piece), slice(None), level)
                    found = _attention_gradients(
                        table, value, locations[at], weights[at], grad[row, at[1]], ctx
                    )
                    if grad_locations is not None:
                        grad_locations[at] = found[0]
                    if grad_weights is not None:
                        grad_weights[at] = found[1]
                    if total is not None:
                        total += found[2]
                given = grad_values[level]
                if given is not None and total is not None:
                    height, width = value.shape[-2:]
                    maps = total.view(*_sizes(value), -1).permute(2, 0, 1)
                    given[row] = maps[:, :height, :width]
        return grad_locations, grad_weights, *grad_values


def _attention_gradients(
    table: Tensor, value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for places [q, A, P, 2], weights [q, A, P] and the table."""
    heads, points = weights.shape[1:]
    by_head = grad.reshape(-1, table.shape[1])  # q * A, E
    corners = _attention_corners(locations, value)
    x0, x1, y0, y1 = corners.shares()
    steps = [step * heads for step in corners.steps]
    rows = _rows(corners.row, steps)
    shares = _products(x0, x1, y0, y1) * weights.unsqueeze(-2)
    nothing = grad.new_empty(0)
    to_places = to_weights = to_table = nothing
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        given = _weights_gradient(table, rows, shares, by_head).view(shares.shape)
        a, b, c, d = given.unbind(-2)  # upper left, upper right, lower left, lower right
        upper, lower = a * x0 + b * x1, c * x0 + d * x1
        to_weights = upper * y0 + lower * y1
        sx0, sx1, sy0, sy1 = corners.slopes()
        height, width = value.shape[-2:]
        to_x = ((a * y0 + c * y1) * sx0 + (b * y0 + d * y1) * sx1) * weights * width
        to_y = (upper * sy0 + lower * sy1) * weights * height
        to_places = torch.stack([to_x, to_y], -1)
    if any(ctx.needs_input_grad[2:]):
        corners.row = corners.row.view(-1, points)
        to_table = _table_gradient(
            corners, shares.view(-1, 4, points), by_head.contiguous(), len(table), heads
        )
    return to_places, to_weights, to_table


# -- modulated deformable convolution --------------------------------------------------------------


def convolution(x: Tensor, y_at: Tensor, x_at: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Convolve with taps at given places.

    Args:
        x: [B, C, h, w], float32 or float64.
        y_at: [B, S, K] pixels, S places of the output.
        x_at: [B, S, K].
        mask: [B, S, K].
        weight: [O, C, kernel rows, kernel columns].

    Returns:
        [B, S, O].
    """
    return _Convolution.apply(x, y_at, x_at, mask, weight)


def _kernel(weight: Tensor) -> Tensor:
    """[O, K * C]; no copy where channels stand together."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


class _Convolution(torch.autograd.Function):
    """What the taps read exists for a few thousand places at a time, then meets the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y_at: Tensor, x_at: Tensor, mask: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, y_at, x_at, mask, weight)
        kernel, size = _kernel(weight), _sizes(x)
        batch, places, taps = mask.shape
        out = x.new_empty(batch, places, len(weight))
        piece = max(1, FORWARD_PIECE // (4 * taps))
        for row in range(batch):
            table = _table(x[row], 1)
            for start in range(0, places, piece):
                at = (row, slice(start, start + piece))
                columns, _, _ = _columns(table, y_at[at], x_at[at], mask[at], size)
                torch.mm(columns.view(-1, kernel.shape[1]), kernel.T, out=out[at])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, y_at, x_at, mask, weight = ctx.saved_tensors
        kernel, (height, width) = _kernel(weight), _sizes(x)
        to_kernel = torch.zeros_like(kernel)
        to_x, to_mask = torch.zeros_like(x), torch.empty_like(mask)
        to_y_at, to_x_at = torch.empty_like(y_at), torch.empty_like(x_at)
        for row in range(len(x)):
            table = _table(x[row], 1)
            share = mask[row].unsqueeze(-1)
            columns, corners, rows = _columns(
                table, y_at[row], x_at[row], mask[row], (height, width)
            )
            to_kernel.addmm_(grad[row].T, columns.view(-1, kernel.shape[1]))
            del columns
            read = (grad[row] @ kernel).view(-1, table.shape[1])  # S * K, C
            x0, x1, y0, y1 = corners.shares()
            shares = _products(x0, x1, y0, y1) * share.unsqueeze(-1)
            given = _weights_gradient(table, rows, shares, read).view(shares.shape)
            a, b, c, d = given.unbind(-2)
            upper, lower = a * x0 + b * x1, c * x0 + d * x1
            sx0, sx1, sy0, sy1 = corners.slopes()
            to_mask[row] = (upper * y0 + lower * y1).squeeze(-1)
            across = ((a * y0 + c * y1) * sx0 + (b * y0 + d * y1) * sx1) * share
            to_x_at[row] = across.squeeze(-1)
            to_y_at[row] = ((upper * sy0 + lower * sy1) * share).squeeze(-1)
            corners.row = corners.row.view(-1, 1)
            to_table = _table_gradient(corners, shares.view(-1, 4, 1), read, len(table), 1)
            maps = to_table.view(height, width, -1).permute(2, 0, 1)
            to_x[row] = maps[:, : x.shape[2], : x.shape[3]]
        to_weight = to_kernel.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return to_x, to_y_at, to_x_at, to_mask, to_weight


def _columns(
    table: Tensor, y_at: Tensor, x_at: Tensor, mask: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Corners, Tensor]:
    """What taps read [S * K, C]; corners of places [S, K, 1] and their rows [S, K, 4, 1]."""
    corners = Corners.around(x_at.unsqueeze(-1).clone(), y_at.unsqueeze(-1).clone(), *size)
    x0, x1, y0, y1 = corners.shares()
    rows = _rows(corners.row, corners.steps)
    shares = _products(x0, x1, y0, y1) * mask[..., None, None]
    return _bags(table, rows, shares), corners, rows
