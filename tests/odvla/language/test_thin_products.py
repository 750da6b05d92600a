"""Linear layers turned around give what they gave, and only where they should be."""

import pytest
import torch
from torch import nn

from odvla.language.thin_products import MOST_ROWS, thin_products, turned_product


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 5), (MOST_ROWS,), (MOST_ROWS + 1,), (0,), ()])
def test_the_product_is_the_layers(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=bias).double()  # to tell rounding from mistakes
    x = torch.randn(*shape, 48, dtype=torch.float64)
    found = turned_product(layer, x)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-14)
    assert found.is_contiguous()


def test_large_layers_are_turned_around_and_come_back():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    x = torch.randn(3, 512)
    usual = model(x)
    with thin_products(model):
        assert ["forward" in vars(layer) for layer in model] == [True, False, False]
        torch.testing.assert_close(model(x), usual)
    assert not any("forward" in vars(layer) for layer in model)
    torch.testing.assert_close(model(x), usual, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stopped"), thin_products(model):
        raise RuntimeError("stopped")
    assert not any("forward" in vars(layer) for layer in model)


class Adapted(nn.Linear):
    """Computes something else than its weight says."""


@pytest.mark.parametrize("why", ["one thread", "bf16", "autocast", "a kind of its own"])
def test_where_nothing_is_gained_nothing_is_changed(why):
    layer = (Adapted if why == "a kind of its own" else nn.Linear)(512, 512)
    if why == "one thread":
        torch.set_num_threads(1)
    if why == "bf16":
        layer.bfloat16()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
        thin_products(nn.Sequential(layer)),
    ):
        assert "forward" not in vars(layer)
