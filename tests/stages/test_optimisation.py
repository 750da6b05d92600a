"""Parameter groups and learning rates."""

import math

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from stages.optimisation import COMPONENTS, OptimiserConfig, parameter_groups, trained_counts


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
    assert {group.component for group in groups} == set(COMPONENTS)
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
