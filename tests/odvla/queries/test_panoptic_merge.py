"""Merging against a slow loop over one scene's candidates, cells as sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odvla.queries.panoptic_merge import MergeRules, merge, quality

CLASSES = 3


def by_hand(masks, scores, labels, compat):
    """One scene: places in order, kept places, cells each got, final scores."""
    final = []
    for mask, score in zip(masks, scores, strict=True):
        covered = mask[mask > 0.5]
        if compat == "uniad":
            mean = covered.sum() / (len(covered) + 1)
        else:
            mean = min(covered.mean(), torch.tensor(1.0)) if len(covered) else torch.tensor(0.0)
        final.append(float(score * mean**2))
    order = sorted(range(len(masks)), key=lambda index: -final[index])
    taken, got = set(), []
    for index in order:
        own = {tuple(cell) for cell in (masks[index] > 0.5).nonzero().tolist()}
        if final[index] < 0.1 or not own or len(own & taken) / len(own) > 0.4:
            got.append(None)
            continue
        got.append(own - taken)
        if compat == "none" or labels[index] > 0:
            taken |= own
    return order, got, [final[index] for index in order]


def random_candidates(seed, rows=3, count=12, size=(5, 6)):
    """Blobs of cells with values around the threshold, some above 1, some candidates empty."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(rows, count, 2, 1, 1, generator=generator) * torch.tensor(size).view(
        2, 1, 1
    )
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    near = (torch.stack([y, x]) - corner).abs().amax(2) < 1.6
    values = torch.rand(rows, count, *size, generator=generator) * 1.4
    masks = torch.where(near, values, values * 0.3)
    scores = torch.rand(rows, count, generator=generator)
    return masks, scores, torch.randint(0, CLASSES, (rows, count), generator=generator)


@pytest.mark.parametrize("compat", ["none", "uniad"])
@given(st.integers(0, 10_000))
@settings(max_examples=40)
def test_it_is_the_loop_for_every_scene_at_once(compat, seed):
    masks, scores, labels = random_candidates(seed)
    merged = merge(masks, scores, labels, MergeRules(compat=compat))
    for row in range(len(masks)):
        order, got, final = by_hand(masks[row], scores[row], labels[row], compat)
        assert merged.order[row].tolist() == order
        assert merged.scores[row].tolist() == pytest.approx(final, abs=1e-6)
        assert merged.kept[row].tolist() == [cells is not None for cells in got]
        for place, cells in enumerate(got):
            own = {tuple(cell) for cell in merged.cells[row, place].nonzero().tolist()}
            assert own == (cells or set())
        lanes = merged.lanes(CLASSES)[row]
        for label in range(CLASSES):
            own = {tuple(cell) for cell in lanes[label].nonzero().tolist()}
            parts = (
                cells
                for place, cells in enumerate(got)
                if cells and labels[row, order[place]] == label
            )
            assert own == set().union(*parts)


def test_the_random_scenes_reach_every_branch():
    kept = {"none": 0, "uniad": 0}
    differ = 0
    for seed in range(20):
        masks, scores, labels = random_candidates(seed)
        found = {c: merge(masks, scores, labels, MergeRules(compat=c)) for c in kept}
        for compat, merged in found.items():
            assert not merged.kept.all()
            kept[compat] += int(merged.kept.sum())
        differ += not torch.equal(found["none"].lanes(3), found["uniad"].lanes(3))
    assert min(kept.values()) > 20
    assert differ > 10


def test_dividers_block_nobody_with_uniads_rules_only():
    square = torch.zeros(4, 4)
    square[:2] = 0.9
    masks = square.expand(1, 2, -1, -1)
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 0]])
    both = merge(masks, scores, labels, MergeRules(compat="uniad"))
    assert both.kept.tolist() == [[True, True]]
    one = merge(masks, scores, labels, MergeRules())
    assert one.kept.tolist() == [[True, False]]
    crossing = merge(masks, scores, torch.tensor([[1, 0]]), MergeRules(compat="uniad"))
    assert crossing.kept.tolist() == [[True, False]]


def test_quality_of_a_small_or_overfull_mask():
    masks = torch.zeros(3, 2, 2)
    masks[0, 0, 0] = 0.8  # one cell
    masks[1] = 3.0  # values above 1
    assert quality(masks, MergeRules()).tolist() == pytest.approx([0.8, 1.0, 0.0])
    uniad = quality(masks, MergeRules(compat="uniad"))
    assert uniad.tolist() == pytest.approx([0.4, 12 / 5, 0.0])


def test_a_given_order_is_served_as_it_is():
    masks, scores, labels = random_candidates(3, rows=1)
    order = torch.arange(masks.shape[1]).flip(0)[None]
    merged = merge(masks, scores, labels, MergeRules(), order)
    assert torch.equal(merged.order, order)
    assert torch.equal(merged.labels, labels.flip(1))
