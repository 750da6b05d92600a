"""Deformable attention against a loop that interpolates by hand."""

import math

import torch

from odvla.ops.deformable_attention import bilinear, deformable_attention, ring_offsets


def read_by_hand(channel_map: torch.Tensor, x: float, y: float) -> float:
    """Bilinear value of one channel [h, w] at a fraction of its size; zero outside."""
    height, width = channel_map.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * channel_map[i, j].item()
    return total


def test_it_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, queries, heads, points, each = 2, 5, 2, 3, 3
    values = [
        torch.randn(batch, heads * each, height, width, generator=generator)
        for height, width in ((4, 7), (3, 2))
    ]
    # some points outside, on the border, and in the middle
    locations = torch.rand(batch, queries, heads, 2, points, 2, generator=generator) * 1.4 - 0.2
    locations[0, 0, 0, 0, 0] = torch.tensor([0.0, 1.0])
    weights = torch.rand(batch, queries, heads, 2, points, generator=generator)
    result = deformable_attention(values, locations, weights)
    assert result.shape == (batch, queries, heads * each)
    for b in range(batch):
        for q in range(queries):
            for channel in range(heads * each):
                head = channel // each
                expected = sum(
                    weights[b, q, head, level, p].item()
                    * read_by_hand(
                        values[level][b, channel], *locations[b, q, head, level, p].tolist()
                    )
                    for level in range(2)
                    for p in range(points)
                )
                assert math.isclose(result[b, q, channel].item(), expected, abs_tol=1e-5)


def test_gradients_reach_values_places_and_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    place = torch.rand(1, 2, 2, 1, 2, 2, dtype=torch.float64, generator=generator) * 0.6 + 0.2
    weight = torch.rand(1, 2, 2, 1, 2, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda v, p, w: deformable_attention([v], p, w),
        (value, place.requires_grad_(), weight.requires_grad_()),
    )


def test_bilinear_reads_cell_centres_exactly() -> None:
    value = torch.arange(12.0).view(1, 1, 3, 4)
    place = torch.tensor([[[2.5 / 4, 1.5 / 3], [1.0, 1.0], [2.0, 0.5]]])
    read = bilinear(value, place)[0, :, 0]
    assert read.tolist() == [6.0, 11 / 4, 0.0]


def test_ring_offsets_point_every_head_its_own_way() -> None:
    ring = ring_offsets(4, 2)
    assert ring.shape == (4, 2, 2)
    torch.testing.assert_close(ring[0, 1], torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(ring[2], -ring[0], atol=1e-6, rtol=0)
