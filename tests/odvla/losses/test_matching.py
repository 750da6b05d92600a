"""Matching against brute force, losses against their formulas."""

import itertools
import math

import pytest
import torch

from odvla.losses.matching import (
    dice_loss,
    focal_cost,
    focal_loss,
    gaussian_focal_loss,
    hungarian,
)


@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (3, 3), (3, 5), (4, 0)])
def test_it_is_as_cheap_as_the_best_permutation(queries: int, targets: int) -> None:
    generator = torch.Generator().manual_seed(queries * 10 + targets)
    cost = torch.randn(4, queries, targets, generator=generator)
    everyone = torch.ones(4, queries, dtype=torch.bool)
    wanted = torch.ones(4, targets, dtype=torch.bool)
    matches = hungarian(cost, everyone, wanted)
    for row in range(4):
        mine = matches.row == row
        pairs = list(zip(matches.query[mine].tolist(), matches.target[mine].tolist(), strict=True))
        count = min(queries, targets)
        assert len(pairs) == len({q for q, _ in pairs}) == len({t for _, t in pairs}) == count
        best = min(
            sum(cost[row, q, t].item() for q, t in zip(some, others, strict=True))
            for some in itertools.permutations(range(queries), count)
            for others in itertools.combinations(range(targets), count)
        )
        assert math.isclose(sum(cost[row, q, t].item() for q, t in pairs), best, abs_tol=1e-5)


def test_masked_queries_and_targets_stay_out_and_nan_costs_do_no_harm() -> None:
    cost = torch.zeros(1, 3, 3)
    cost[0, 0] = -100  # the cheapest query is not free
    cost[0, 1, 1] = float("nan")
    free = torch.tensor([[False, True, True]])
    wanted = torch.tensor([[True, True, False]])
    matches = hungarian(cost, free, wanted)
    assert sorted(zip(matches.query.tolist(), matches.target.tolist(), strict=True)) == [
        (1, 0),
        (2, 1),
    ]


def test_focal_loss_follows_its_formula() -> None:
    logit, alpha, gamma = 0.7, 0.25, 2.0
    p = 1 / (1 + math.exp(-logit))
    positive = -alpha * (1 - p) ** gamma * math.log(p)
    negative = -(1 - alpha) * p**gamma * math.log(1 - p)
    logits = torch.tensor([logit, logit])
    result = focal_loss(logits, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result, torch.tensor([positive, negative]))
    torch.testing.assert_close(focal_cost(logits[:1]), torch.tensor([positive - negative]))


def test_gaussian_focal_loss_forgives_near_a_peak() -> None:
    logits = torch.zeros(3)
    peak, near, far = gaussian_focal_loss(logits, torch.tensor([1.0, 0.5, 0.0])).tolist()
    assert math.isclose(peak, 0.25 * math.log(2), abs_tol=1e-6)
    assert math.isclose(far, 0.25 * math.log(2), abs_tol=1e-6)
    assert math.isclose(near, 0.5**4 * far, abs_tol=1e-6)


def test_dice_is_zero_for_the_same_mask_and_one_for_a_disjoint_one() -> None:
    target = torch.zeros(100)
    target[:40] = 1
    same = dice_loss((target - 0.5) * 100, target)
    other = dice_loss((0.5 - target) * 100, target)
    assert same.item() < 1e-3
    assert other.item() > 0.98
