"""Choice of a backend, and the adapters to other libraries against their documented contracts.

The libraries are stood in for by functions written from their documentation, not from our adapters:
they check every layout they are documented to get, and compute the result in a way of their own.
"""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from odvla.errors import UserError
from odvla.ops import backends, compiled, grid_sampling
from odvla.ops.deformable_attention import deformable_attention
from odvla.ops.deformable_conv import modulated_deform_conv


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice made yet; none found out before stays."""
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.delenv("ODVLA_OPS", raising=False)
    backends._load.cache_clear()
    backends._fastest_compiled.cache_clear()
    yield
    backends._load.cache_clear()
    backends._fastest_compiled.cache_clear()


def gather_samples(value, sizes, starts, locations):
    """[B, Q, A, L, P, E] by explicit rows of value [B, S, A, E]: no grid_sample."""
    parts = []
    for level, (height, width) in enumerate(sizes.tolist()):
        x = locations[:, :, :, level, :, 0] * width - 0.5
        y = locations[:, :, :, level, :, 1] * height - 0.5
        total = 0
        for i in (y.floor(), y.floor() + 1):
            for j in (x.floor(), x.floor() + 1):
                inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                place = int(starts[level]) + i.clamp(0, height - 1) * width + j.clamp(0, width - 1)
                b = torch.arange(len(value)).view(-1, 1, 1, 1)
                a = torch.arange(value.shape[2]).view(1, 1, -1, 1)
                read = value[b, place.long(), a]
                share = (1 - (y - i).abs()) * (1 - (x - j).abs()) * inside
                total = total + read * share.unsqueeze(-1)
        parts.append(total)
    return torch.stack(parts, 3)


class DocumentedMMCV:
    """mmcv 2.2: MultiScaleDeformableAttnFunction.apply and modulated_deform_conv2d."""

    @staticmethod
    def apply(value, spatial_shapes, level_start_index, locations, weights, im2col_step):
        batch, keys, heads, _ = value.shape
        levels = len(spatial_shapes)
        assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
        assert spatial_shapes.shape == (levels, 2)
        assert int(spatial_shapes.prod(1).sum()) == keys
        assert locations.shape == (*weights.shape, 2)
        assert locations.shape[2:4] == (heads, levels)
        assert batch % min(batch, im2col_step) == 0
        for tensor in (value, locations, weights):
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float32
        samples = gather_samples(value, spatial_shapes, level_start_index, locations)
        return (samples * weights.unsqueeze(-1)).sum((3, 4)).flatten(2)

    @staticmethod
    def convolve(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
        assert (groups, deform_groups, bias) == (1, 1, None)
        assert all(tensor.is_contiguous() for tensor in (x, offset, mask, weight))
        return unfolded_convolution(x, offset, mask, weight, stride, padding, dilation)


def unfolded_convolution(x, offset, mask, weight, stride, padding, dilation):
    """Tap by tap with gathered samples."""
    batch, _, height, width = x.shape
    taps = weight.shape[2] * weight.shape[3]
    rows, columns = offset.shape[-2:]
    # Documented order of offset: y, then x, of one tap after the other.
    y, at = offset.view(batch, taps, 2, rows, columns).unbind(2)
    tap = torch.arange(taps)
    y = y + (tap // weight.shape[3] * dilation - padding).view(-1, 1, 1)
    y = y + (torch.arange(rows) * stride).view(-1, 1)
    at = at + (tap % weight.shape[3] * dilation - padding).view(-1, 1, 1)
    at = at + torch.arange(columns) * stride
    place = torch.stack([(at + 0.5) / width, (y + 0.5) / height], -1)  # B, K, h, w, 2
    locations = place.flatten(2, 3).transpose(1, 2)[:, :, None, None]  # B, h*w, 1, 1, K, 2
    value = x.flatten(2).transpose(1, 2).unsqueeze(2)
    samples = gather_samples(value, torch.tensor([[height, width]]), torch.tensor([0]), locations)
    samples = samples[:, :, 0, 0] * mask.flatten(2).transpose(1, 2).unsqueeze(-1)  # B, h*w, K, C
    out = torch.einsum("bskc,ock->bos", samples, weight.flatten(2))
    return out.view(batch, -1, rows, columns)


def stand_in(monkeypatch, name):
    """Put the documented library where an import finds it."""
    modules = {}
    if name == "mmcv":
        for path in ("mmcv", "mmcv._ext", "mmcv.ops"):
            modules[path] = types.ModuleType(path)
        attention = types.ModuleType("mmcv.ops.multi_scale_deform_attn")
        attention.MultiScaleDeformableAttnFunction = DocumentedMMCV
        convolution = types.ModuleType("mmcv.ops.modulated_deform_conv")
        convolution.modulated_deform_conv2d = DocumentedMMCV.convolve
        modules |= {attention.__name__: attention, convolution.__name__: convolution}
    else:

        def msda(value, shapes, starts, locations, weights, /):
            assert weights.shape == (*locations.shape[:3], locations[0, 0, 0, ..., 0].numel())
            samples = gather_samples(value, shapes, starts, locations)
            read = samples.flatten(3, 4) * weights.unsqueeze(-1)
            return read.sum(3)

        def deform_conv2d(
            input,
            offset,
            weight,
            bias=None,
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
            mask=None,
        ):
            assert bias is None
            return unfolded_convolution(
                input, offset, mask, weight, stride[0], padding[0], dilation[0]
            )

        for path in ("deformops", "deformops.integrations"):
            modules[path] = types.ModuleType(path)
        registry = types.ModuleType("deformops.registry")
        registry.msda = msda
        torchvision = types.ModuleType("deformops.integrations.torchvision")
        torchvision.deform_conv2d = deform_conv2d
        modules |= {registry.__name__: registry, torchvision.__name__: torchvision}
    for path, module in modules.items():
        module.__spec__ = importlib.util.spec_from_loader(path, None)
        monkeypatch.setitem(sys.modules, path, module)


@pytest.mark.parametrize("name", list(backends.COMPILED))
def test_an_adapter_hands_over_what_the_library_documents(monkeypatch, name):
    stand_in(monkeypatch, name)
    assert name in backends.available_backends()
    ops = backends._load(name)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 8, h, w, generator=generator) for h, w in ((5, 6), (2, 3))]
    locations = torch.rand(3, 7, 4, 2, 3, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(3, 7, 4, 2, 3, generator=generator)
    expected = grid_sampling.attention(values, locations, weights)
    # Views, as the layers pass them.
    found = ops.attention(
        [value.to(memory_format=torch.channels_last) for value in values], locations, weights
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    x = torch.randn(2, 3, 7, 8, generator=generator)
    offset, mask = torch.randn(2, 18, 3, 4, generator=generator), torch.rand(2, 9, 3, 4)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    backends.use_backend("grid_sample")
    expected = modulated_deform_conv(x, offset, mask, weight, stride=2, padding=2, dilation=2)
    found = ops.convolution(x, offset, mask, weight, 2, 2, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_on_a_gpu_the_compiled_backend_that_is_there_is_taken(monkeypatch):
    # "meta" stands for any device that is not the CPU.
    elsewhere = torch.zeros(1, device="meta")
    installed = backends._is_installed
    monkeypatch.setattr(backends, "_is_installed", lambda name: False)
    assert backends.backend_for(elsewhere, numbers=1 << 20) is grid_sampling
    backends._fastest_compiled.cache_clear()
    stand_in(monkeypatch, "deformops")
    monkeypatch.setattr(backends, "_is_installed", lambda name: name == "deformops")
    assert isinstance(backends.backend_for(elsewhere, numbers=5), compiled.DeformopsOps)
    backends._fastest_compiled.cache_clear()
    stand_in(monkeypatch, "mmcv")
    monkeypatch.setattr(backends, "_is_installed", installed)
    assert isinstance(backends.backend_for(elsewhere, numbers=5), compiled.MMCVOps)
    assert backends.describe_backend(torch.device("cpu")).endswith("(auto, cpu)")


def test_a_library_that_does_not_load_is_named_and_done_without(monkeypatch, caplog):
    stand_in(monkeypatch, "mmcv")
    monkeypatch.setitem(sys.modules, "mmcv.ops.modulated_deform_conv", types.ModuleType("broken"))
    monkeypatch.setattr(backends, "_is_installed", lambda name: name == "mmcv")
    assert backends.backend_for(torch.zeros(1, device="meta"), numbers=5) is grid_sampling
    assert "mmcv does not load" in caplog.text
    with pytest.raises(UserError, match="ODVLA_OPS=mmcv: mmcv does not load"):
        backends.use_backend("mmcv")


def test_a_compiled_backend_that_computes_something_else_is_refused(monkeypatch):
    stand_in(monkeypatch, "deformops")
    wrong = sys.modules["deformops.registry"]
    right = wrong.msda
    wrong.msda = lambda value, shapes, starts, locations, weights: right(
        value, shapes, starts, locations.flip(-1), weights
    )
    backends.use_backend("deformops")
    monkeypatch.setattr(backends, "_usable", lambda name, device: backends._load(name))
    with pytest.raises(UserError, match="differs from torch's"):
        backends.describe_backend(torch.device("cpu"))


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("ODVLA_OPS", "grid_sample")
    assert backends.chosen_backend() == "grid_sample"
    assert backends.backend_for(torch.zeros(1), numbers=1 << 30) is grid_sampling
    assert (
        backends.describe_backend(torch.device("cpu")) == "deformable ops: grid_sample (ODVLA_OPS)"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fast", "ODVLA_OPS must be one of auto, bags, grid_sample, mmcv, deformops, not 'fast'"),
        ("deformops", "ODVLA_OPS=deformops needs deformops, which is not installed"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(monkeypatch, name, sentence):
    monkeypatch.setattr(backends, "_is_installed", lambda library: False)
    monkeypatch.setenv("ODVLA_OPS", name)
    with pytest.raises(UserError, match=f"^{sentence}$"):
        backends.chosen_backend()


def test_a_backend_for_gpus_is_refused_on_a_cpu(monkeypatch):
    stand_in(monkeypatch, "mmcv")
    backends.use_backend("mmcv")
    value = torch.zeros(1, 2, 3, 3)
    with pytest.raises(UserError, match="ODVLA_OPS=mmcv works on GPUs only"):
        deformable_attention([value], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))


def test_auto_takes_bags_where_much_is_read():
    x, bags = torch.zeros(1), backends.PURE["bags"]
    trained = torch.zeros(1, requires_grad=True)
    assert backends.backend_for(x, numbers=1 << 18) is bags
    assert backends.backend_for(x, numbers=(1 << 18) - 1) is grid_sampling
    assert backends.backend_for(x, trained, numbers=1 << 18) is grid_sampling
    assert backends.backend_for(x, trained, numbers=1 << 20) is bags
    with torch.no_grad():
        assert backends.backend_for(trained, numbers=1 << 18) is bags


def test_the_stand_in_convolution_is_a_convolution_without_offsets():
    x, weight = torch.randn(1, 2, 4, 5), torch.randn(3, 2, 3, 3)
    zero, one = torch.zeros(1, 18, 4, 5), torch.ones(1, 9, 4, 5)
    found = unfolded_convolution(x, zero, one, weight, 1, 1, 1)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), atol=1e-5, rtol=1e-4)
