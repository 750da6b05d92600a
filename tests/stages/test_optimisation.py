"""Parameter groups and learning rates."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from stages.optimisation import (
    COMPONENTS,
    Muon,
    MuonWithAdamW,
    OptimiserConfig,
    muon_weights,
    orthogonal,
    parameter_groups,
    trained_counts,
)
from stages.planning import PlanningStageConfig


def test_every_trainable_parameter_is_in_one_group(make_vla):
    vla = make_vla()
    frozen = vla.language.model.model.norm.weight
    frozen.requires_grad_(False)
    groups = parameter_groups(vla.named_parameters())
    grouped = [id(p) for group in groups for p in group.parameters]
    wanted = {id(p) for p in vla.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == wanted
    assert id(frozen) not in wanted
    # A model without a planner.
    assert {group.component for group in groups} == set(COMPONENTS) - {"planner"}
    assert all(p.ndim > 1 for group in groups if group.decays for p in group.parameters)
    counts = trained_counts(vla.named_parameters())
    assert sum(counts.values()) == sum(p.numel() for p in vla.parameters() if p.requires_grad)


def test_parameters_that_are_equal_in_value_are_not_lost():
    # Lightning's BaseFinetuning compares by value and drops such.
    twins = [(f"encoder.{i}", nn.Parameter(torch.ones(2, 2))) for i in range(4)]
    (group,) = parameter_groups(twins)
    assert len(group.parameters) == 4


def test_a_parameter_of_no_component_and_a_model_that_does_not_train_are_errors():
    stray = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"'decoder\.x'"):
        parameter_groups([("decoder.x", stray)])
    with pytest.raises(UserError, match="no parameter"):
        parameter_groups([("encoder.x", stray.requires_grad_(False))])


def test_the_rate_warms_up_follows_a_cosine_and_waits_for_its_start():
    config = OptimiserConfig(warmup=0.2, final_lr=0.1)
    rates = [config.factor(step, 20, 0) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert rates[20] == pytest.approx(0.1)
    late = [config.factor(step, 30, 10) for step in range(31)]
    assert late[:10] == [0.0] * 10
    assert late[10:] == pytest.approx(rates)
    constant = OptimiserConfig(schedule="constant", warmup=0.0)
    assert {constant.factor(step, 9, 0) for step in range(9)} == {1.0}
    with pytest.raises(UserError, match="warmup"):
        OptimiserConfig(warmup=2.0)


def test_muon_gets_the_matrices_of_the_language_layers_and_no_others(make_vla):
    vla = make_vla()
    names = muon_weights(vla, OptimiserConfig(muon=1.0))
    groups = parameter_groups(vla.named_parameters(), names)
    chosen = {id(p) for group in groups if group.muon for p in group.parameters}
    names = {name for name, p in vla.named_parameters() if id(p) in chosen}
    layers = [m for m in vla.language.model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert chosen == {id(layer.weight) for layer in layers}
    assert not any("embed" in name or "norm" in name for name in names)
    assert not muon_weights(vla, OptimiserConfig())
    assert not any(group.muon for group in parameter_groups(vla.named_parameters()))


def test_muon_gets_the_filters_and_matrices_of_the_components_that_are_named(make_vla):
    vla = make_vla()
    parts = ("backbone", "queries")
    names = muon_weights(vla, OptimiserConfig(muon=1.0, muon_components=parts))
    expected = {
        f"{place}.weight"
        for place, module in vla.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and place.startswith(("encoder.backbone.", "queries."))
    }
    assert names == expected
    assert any(vla.get_parameter(name).ndim == 4 for name in names)
    with pytest.raises(UserError, match="'neck' is none of"):
        OptimiserConfig(muon_components=("neck",))


def test_what_is_left_out_by_name_learns_by_adamw_and_a_pattern_of_nothing_is_named(make_vla):
    vla = make_vla()
    parts = ("queries", "language")
    names = muon_weights(vla, OptimiserConfig(muon=1.0, muon_components=parts))
    but_not = ("queries.track.heads.*", "*.mlp.*")
    some = OptimiserConfig(muon=1.0, muon_components=parts, muon_but_not=but_not)
    left = muon_weights(vla, some)
    gone = {n for n in names if n.startswith("queries.track.heads.") or ".mlp." in n}
    assert gone
    assert left == names - gone
    groups = parameter_groups(vla.named_parameters(), left)
    by_muon = [p for group in groups if group.muon for p in group.parameters]
    assert {id(p) for p in by_muon} == {id(vla.get_parameter(name)) for name in left}
    wrong = replace(some, muon_but_not=("encoder.*",))
    with pytest.raises(UserError, match=r"muon_but_not: 'encoder\.\*' matches nothing"):
        muon_weights(vla, wrong)


def test_a_filter_learns_as_the_matrix_of_its_rows():
    generator = torch.Generator().manual_seed(3)
    start, grads = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
    filters, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    for _ in range(2):
        for parameter, grad in ((filters, grads), (matrix, grads.flatten(1))):
            parameter.grad = grad
            Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.1}]).step()
    torch.testing.assert_close(filters.flatten(1), matrix)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_the_singular_values_alone_go_through_the_polynomial(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b, c = 3.4445, -4.775, 2.0315
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert ((values > 0.6) & (values < 1.3)).all()
    found = orthogonal(matrix)
    torch.testing.assert_close(found, (left * values @ right).float(), atol=1e-4, rtol=1e-4)


def test_matrices_of_one_shape_learn_together_as_they_do_alone():
    def learned(largest_stacked):
        generator = torch.Generator().manual_seed(4)
        shapes = [(4, 9), (6, 6), (9, 4), (4, 9), (4, 1, 3, 3), (3, 5), (12, 12), (12, 12)]
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimiser = Muon([{"params": weights, "lr": 0.1}], largest_stacked)
        for _ in range(2):
            optimiser.zero_grad()
            sum(((weight - 1) ** 3).sum() for weight in weights).backward()
            optimiser.step()
        return weights

    alone = learned(0)
    for largest_stacked in (100, 1000):  # the last two stay alone, or do not
        torch.testing.assert_close(learned(largest_stacked), alone)


def test_muon_on_a_cpu_is_torchs_to_the_rounding_of_bfloat16():
    def matrices():
        generator = torch.Generator().manual_seed(2)
        shapes = ((8, 24), (24, 8))
        return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]

    ours, theirs, start = matrices(), matrices(), matrices()
    settings = {"lr": 0.05, "weight_decay": 0.1}
    pair = (
        (ours, Muon([{"params": ours, **settings}])),
        (theirs, torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")),
    )
    for _ in range(3):
        for values, optimiser in pair:
            optimiser.zero_grad()
            sum((value**2).sum() for value in values).backward()
            optimiser.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        moved = (b - first).norm()
        assert 0 < (a - b).norm() < 0.02 * moved


def test_two_optimisers_in_one_step_as_they_do_alone():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 6), (4,), (5, 3))]

    def loss(values):
        return sum(((value - 1) ** 3).sum() for value in values)

    ours, alone = parameters(), parameters()
    groups = [
        {"params": [ours[0]], "lr": 0.1, "weight_decay": 0.01, "muon": True},
        {"params": ours[1:], "lr": 0.02, "weight_decay": 0.0, "muon": False},
    ]
    both = MuonWithAdamW(groups, (0.9, 0.98))
    muon = Muon([{"params": [alone[0]], "lr": 0.1, "weight_decay": 0.01}])
    adamw = torch.optim.AdamW(alone[1:], lr=0.02, weight_decay=0.0, betas=(0.9, 0.98))
    halve = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.5**step)
    for step in range(4):
        if step == 2:  # a new optimiser that continues
            state = both.state_dict()
            both = MuonWithAdamW(groups, (0.9, 0.98))
            both.load_state_dict(state)
            halve.optimizer = both
        both.zero_grad()
        loss(ours).backward()
        both.step()
        halve.step()
        for optimiser in (muon, adamw):
            optimiser.zero_grad()
        loss(alone).backward()
        for optimiser, rate in ((muon, 0.1), (adamw, 0.02)):
            optimiser.step()
            optimiser.param_groups[0]["lr"] = rate * 0.5 ** (step + 1)
    assert all(a.equal(b) for a, b in zip(ours, alone, strict=True))


def test_a_stage_with_muon_has_one_curve_for_each_group(make_vla, make_data, make_trainer):
    settings = OptimiserConfig(muon=5.0, warmup=0.0)
    config = PlanningStageConfig(optimiser=settings)
    stage = config.build(make_vla(), 2)
    made = stage.configure_optimizers()
    optimiser, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert len(scheduler.base_lrs) == len(optimiser.param_groups)
    for group, rate in zip(optimiser.param_groups, scheduler.base_lrs, strict=True):
        component = group["name"].split("/")[0]
        factor = 5.0 if group["muon"] else 1.0
        assert rate == getattr(settings.lr, component) * factor
        assert group["muon"] == group["name"].endswith("/muon")
    make_trainer(max_steps=2).fit(config.build(make_vla(), 2), make_data("plan"))


def test_a_negative_muon_rate_is_refused():
    with pytest.raises(UserError, match="muon"):
        OptimiserConfig(muon=-1.0)
