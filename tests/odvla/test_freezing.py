"""What a FreezePlan freezes, and that it stays so."""

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from odvla.freezing import FreezePlan, frozen_modules, frozen_tensors, set_modes


class Model(nn.Module):
    """Two parts with running statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"backbone": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "neck": nn.Linear(3, 3)}
        )
        self.head = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3), nn.Dropout(0.9))


def test_what_no_pattern_names_is_frozen():
    model = Model()
    chosen = FreezePlan(("encoder.*",), but_not=("encoder.backbone.*",)).apply(model)
    assert chosen == {"encoder.neck.weight", "encoder.neck.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == chosen
    # A second plan does not depend on the first.
    assert FreezePlan(("head.*",)).apply(model) == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize(
    "plan",
    [
        FreezePlan(("encoder.*", "hed.*")),
        FreezePlan(("*",), but_not=("backbone.*",)),
        FreezePlan(("head.*",), but_not=("*",)),
    ],
)
def test_a_pattern_that_matches_nothing_and_a_plan_that_trains_nothing_are_errors(plan):
    with pytest.raises(UserError, match=r"matches no parameter|trains nothing"):
        plan.apply(Model())


def test_frozen_statistics_rest_and_trained_ones_move():
    model = Model()
    FreezePlan(("encoder.neck.*", "head.*")).apply(model)
    assert [name for name, _ in frozen_modules(model)] == ["encoder.backbone"]
    names = frozen_tensors(model)
    assert "encoder.backbone.1.running_mean" in names
    assert not any(name.startswith("head") for name in names)
    before = {name: model.state_dict()[name].clone() for name in names}
    inputs = torch.randn(64, 3) * 3 + 1
    expected = nn.functional.batch_norm(  # with the statistics it has, not the batch's
        model.encoder["backbone"][0](inputs), torch.zeros(3), torch.ones(3)
    )
    seen = model.encoder["backbone"](inputs)
    torch.testing.assert_close(seen, expected)
    model.head(model.encoder["neck"](seen))
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert model.head[0].running_mean.abs().sum() > 0
    model.train()
    set_modes(model)
    assert not model.encoder["backbone"][1].training
    assert model.head[2].training


def test_a_frozen_layer_inside_a_trained_part_rests_too():
    model = Model()
    FreezePlan(("*",), but_not=("encoder.backbone.1.*",)).apply(model)
    assert [name for name, _ in frozen_modules(model)] == ["encoder.backbone.1"]
    assert model.encoder["backbone"].training
    assert not model.encoder["backbone"][1].training
