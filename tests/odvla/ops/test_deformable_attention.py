"""Deformable attention, every backend, against a loop that interpolates by hand."""

import math

import pytest
import torch

from odvla.ops import backends, weighted_bags
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


def inputs(dtype=torch.float32, *, sizes=((4, 7), (3, 2)), queries=5, batch=2, seed=0):
    """Maps, places (some outside, on the border, on a pixel's centre) and weights."""
    generator = torch.Generator().manual_seed(seed)
    heads, points, each = 2, 3, 3
    values = [
        torch.randn(batch, heads * each, height, width, generator=generator, dtype=dtype)
        for height, width in sizes
    ]
    shape = (batch, queries, heads, len(sizes), points)
    locations = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 1.4 - 0.2
    locations[0, 0, 0, 0, 0] = torch.tensor([0.0, 1.0])
    locations[0, 1, 0, 0, 0] = torch.tensor([1.5 / 7, 2.5 / 4])
    locations[0, 2, 0, 0, 0] = torch.tensor([-3.0, 40.0])
    return values, locations, torch.rand(shape, generator=generator, dtype=dtype)


def test_it_equals_a_slow_loop(backend, device) -> None:
    values, locations, weights = inputs()
    result = deformable_attention(
        [value.to(device) for value in values], locations.to(device), weights.to(device)
    ).cpu()
    batch, queries, _, levels, points = weights.shape
    assert result.shape == (batch, queries, 6)
    for b in range(batch):
        for q in range(queries):
            for channel in range(6):
                head = channel // 3
                expected = sum(
                    weights[b, q, head, level, p].item()
                    * read_by_hand(
                        values[level][b, channel], *locations[b, q, head, level, p].tolist()
                    )
                    for level in range(levels)
                    for p in range(points)
                )
                assert math.isclose(result[b, q, channel].item(), expected, abs_tol=1e-5)


def gradients(call, tensors):
    """Of a fixed random projection of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    generator = torch.Generator().manual_seed(9)
    target = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device)
    return torch.autograd.grad((out * target).sum(), leaves)


def test_gradients_equal_finite_differences(backend, device) -> None:
    if backend in backends.COMPILED:
        pytest.skip("finite differences need float64")
    values, locations, weights = inputs(torch.float64, queries=3)
    # Not on a pixel's centre, where the slope jumps.
    locations = locations + 0.01 * torch.rand(locations.shape, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*values, locations, weights)]
    assert torch.autograd.gradcheck(lambda *t: deformable_attention(t[:2], t[2], t[3]), leaves)


# Powers of two: there, centres of pixels are exact fractions.
@pytest.mark.parametrize("sizes", [((8, 16),), ((8, 4), (2, 2), (1, 4), (2, 1))])
def test_gradients_equal_grid_samples(backend, device, monkeypatch, sizes) -> None:
    """In pieces, too, and on pixels' centres, where only one side's slope can be right."""
    monkeypatch.setattr(weighted_bags, "FORWARD_PIECE", 20)
    monkeypatch.setattr(weighted_bags, "BACKWARD_PIECE", 100)
    values, locations, weights = inputs(sizes=sizes, queries=40)
    for level, (height, width) in enumerate(sizes):
        size = torch.tensor([width, height])
        pixels = (locations[:, 20:, :, level] * size).floor()
        if backend == "mmcv":
            # Its kernel takes a place exactly one pixel before the map for outside: no gradient
            # there, where torch gives that of the side towards the map.
            pixels = pixels.clamp(min=0)
        centres = (pixels + 0.5) / size
        locations[:, 20:, :, level] = centres
    tensors = [tensor.to(device) for tensor in (*values, locations, weights)]
    count = len(values)

    def call(*t):
        return deformable_attention(t[:count], t[count], t[count + 1])

    found, out = gradients(call, tensors), call(*tensors)
    backends.use_backend("grid_sample")
    torch.testing.assert_close(out, call(*tensors), atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(found, gradients(call, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_only_the_gradients_that_are_asked_for(backend, device) -> None:
    values, locations, weights = inputs()
    tensors = [tensor.to(device) for tensor in (*values, locations, weights)]

    def call(*t):
        return deformable_attention(t[:2], t[2], t[3])

    everything = gradients(call, tensors)
    for number in range(4):
        one = gradients(
            lambda t, n=number: call(*tensors[:n], t, *tensors[n + 1 :]), [tensors[number]]
        )
        torch.testing.assert_close(one[0], everything[number])


def test_half_precision_inputs_are_computed_in_full(backend, device) -> None:
    values, locations, weights = (
        inputs(queries=4)[0],
        *(part.to(device) for part in inputs(queries=4)[1:]),
    )
    halves = [value.to(device, torch.bfloat16) for value in values]
    with torch.autocast(device, torch.bfloat16):
        result = deformable_attention(halves, locations, weights)
    assert result.dtype == torch.float32
    expected = deformable_attention([value.float() for value in halves], locations, weights)
    torch.testing.assert_close(result, expected)


def test_places_that_are_no_numbers_give_no_numbers(backend, device) -> None:
    values, locations, weights = inputs()
    locations[1, 0, 0, 0, 0, 0] = math.nan
    result = deformable_attention(
        [value.to(device) for value in values], locations.to(device), weights.to(device)
    ).cpu()
    assert result[0].isfinite().all()
    assert result[1, 1:].isfinite().all()


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
