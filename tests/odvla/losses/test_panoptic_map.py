"""Losses of the map head: batches against scenes alone, empty frames, gradients, learning."""

from dataclasses import replace

import pytest
import torch

from odvla.encoders.protocol import fake_frames
from odvla.losses.panoptic_map import MatchCosts, PanopticMapLossConfig, ThingTargets, soft_dice
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.rows import rows_of
from odvla.types import BevGrid, MapPredictions, MapTargets, SceneFeatures

GRID = BevGrid(-12.0, -10.0, 2.0, 10, 12)
DIM = 16
CONFIG = PanopticMapConfig(
    queries=12, encoder_layers=1, decoder_layers=3, hidden=16, heads=4, mask_heads=4, points=2,
    thing_mask_layers=2, stuff_mask_layers=2, max_candidates=12, dropout=0.0,
)  # fmt: skip
KINDS = {"map_class", "map_box", "map_iou", "map_mask", "drivable_class", "drivable_mask"}


def build(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    module = config.build(DIM, GRID)
    for branch in (*module.reg_branches, *module.mask_reg_branches):
        torch.nn.init.normal_(branch[-1].weight, std=0.3)  # so that gradients pass it
    for layer in module.encoder:
        torch.nn.init.normal_(layer.attention.attention_weights.weight, std=0.3)
    return module


def features(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bev = torch.randn(rows, GRID.rows, GRID.columns, DIM, generator=generator)
    return SceneFeatures(levels=(), bev=bev, grid=GRID)


def targets(counts, seed=0):
    """Rows with so many elements each, the drivable area only where there are any."""
    generator = torch.Generator().manual_seed(seed)
    most = max(counts)
    masks = torch.zeros(len(counts), most, GRID.rows, GRID.columns, dtype=torch.bool)
    drivable = torch.zeros(len(counts), GRID.rows, GRID.columns, dtype=torch.bool)
    for row, count in enumerate(counts):
        for element in range(count):
            y, x = torch.randint(0, 7, (2,), generator=generator).tolist()
            h, w = torch.randint(1, 4, (2,), generator=generator).tolist()
            masks[row, element, y : y + h, x : x + w] = True
        drivable[row] = masks[row].any(0)
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    used = torch.arange(most) < torch.tensor(counts)[:, None]
    return MapTargets(masks, labels, used, drivable)


def decode(module, found):
    return module.decode(found.bev.permute(0, 3, 1, 2))


def terms_of(module, criterion, found, wanted):
    things = ThingTargets.of(wanted, far_edge=criterion.config.compat == "none")
    return criterion.terms(module, decode(module, found), things, wanted.drivable)


@pytest.mark.parametrize("compat", ["none", "uniad"])
def test_a_batch_is_its_scenes_weighted_by_their_elements(compat):
    module = build(replace(CONFIG, compat=compat, attention_levels=1))
    criterion = PanopticMapLossConfig(
        compat=compat, mask_layer_cls=0.5, mask_layer_box=0.5, filter_rounds=2
    ).build()
    found, wanted = features(3), targets([4, 0, 2])
    together = terms_of(module, criterion, found, wanted)
    sums = dict.fromkeys(together, 0.0)
    for row, count in enumerate([4, 0, 2]):
        index = torch.tensor([row])
        alone = terms_of(module, criterion, rows_of(found, index), rows_of(wanted, index))
        # Alone, things weigh count / (count + 1), both counts at least 1.
        positives = max(count, 1)
        for name, term in alone.items():
            share = 1 / (positives + 1) if "stuff" in name else positives / (positives + 1)
            number = 1 if "stuff" in name else positives
            sums[name] += term.item() / share * number
    # Together there are 6 things and 2 drivable areas.
    for name, term in together.items():
        share, number = (2 / 8, 2) if "stuff" in name else (6 / 8, 6)
        assert term.item() == pytest.approx(sums[name] / number * share, rel=1e-4), name


def test_every_parameter_learns_but_those_that_uniad_multiplies_by_zero():
    module = build()
    criterion = PanopticMapLossConfig().build()
    tokens, _ = module(features(2), fake_frames(2, (16, 16)), None)
    losses = criterion(module, tokens.predictions, targets([3, 2]))
    assert losses.keys() == KINDS
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    still = {name for name, p in module.named_parameters() if not p.grad.any()}
    idle = ("mask_reg_branches.", "thing_branches.")
    assert still == {name for name, _ in module.named_parameters() if name.startswith(idle)}
    module.zero_grad()
    every = PanopticMapLossConfig(mask_layer_cls=1.0, mask_layer_box=1.0).build()
    tokens, _ = module(features(2), fake_frames(2, (16, 16)), None)
    torch.stack(list(every(module, tokens.predictions, targets([3, 2])).values())).sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3]])
def test_frames_without_any_element_give_finite_losses(counts):
    module = build()
    criterion = PanopticMapLossConfig().build()
    tokens, _ = module(features(len(counts)), fake_frames(len(counts), (16, 16)), None)
    losses = criterion(module, tokens.predictions, targets(counts))
    assert all(loss.isfinite() for loss in losses.values())
    if not any(counts):
        # Nothing is there: queries shall say so, boxes and masks have nothing to learn.
        assert losses["map_class"] > 0
        assert losses["drivable_class"] > 0
        for name in ("map_box", "map_iou", "map_mask", "drivable_mask"):
            assert losses[name] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert module.query_embedding.weight.grad.any()


def test_padding_and_elements_without_a_cell_do_not_count():
    module = build()
    criterion = PanopticMapLossConfig().build()
    found, wanted = features(1), targets([3])
    expected = terms_of(module, criterion, found, wanted)
    blank = torch.zeros_like(wanted.masks[:, :1])
    more = MapTargets(
        torch.cat([wanted.masks, ~blank, blank], 1),
        torch.cat([wanted.labels, wanted.labels[:, :2]], 1),
        torch.tensor([[True, True, True, False, True]]),  # padding; an element off the grid
        wanted.drivable,
    )
    for name, term in terms_of(module, criterion, found, more).items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_more_rounds_of_the_filter_keep_more_queries_but_the_same_first_matches():
    module = build()
    things = ThingTargets.of(targets([3, 5]), far_edge=True)
    decoding = decode(module, features(2))
    kept = []
    for rounds in (1, 2, 3):
        filtered = PanopticMapLossConfig(filter_rounds=rounds).build().filter(decoding, things)
        rows = [set(q[m].tolist()) for q, m in zip(filtered.query, filtered.mask, strict=True)]
        # Of the second scene's 12 queries, three rounds would want 15.
        assert [len(row) for row in rows] == [3 * rounds, min(5 * rounds, 12)]
        assert set(filtered.first.query[filtered.first.row == 0].tolist()) <= rows[0]
        kept.append(rows)
    assert all(a <= b <= c for a, b, c in zip(*kept, strict=True))
    with pytest.raises(ValueError, match="filter_rounds must be at least 1, not 0"):
        PanopticMapLossConfig(filter_rounds=0)


def test_masks_decide_who_is_who_where_they_are_asked():
    module = build()
    things = ThingTargets.of(targets([2]), far_edge=True)
    decoding = decode(module, features(1))
    config = PanopticMapLossConfig(masked=MatchCosts(0.0, 0.0, 0.0, 1.0))
    criterion = config.build()
    filtered = criterion.filter(decoding, things)
    painted = things.masks.flatten(2).flip(1)  # the first query paints the second element
    matches = criterion.match_masks(decoding, painted, things, filtered)
    assert dict(zip(matches.query.tolist(), matches.target.tolist(), strict=True)) == {0: 1, 1: 0}


def test_soft_dice_is_its_formula():
    values, target = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    expected = 1 - 2 * 2.5 / (4.25 + 2 + 2e-6)
    assert soft_dice(values, target).item() == pytest.approx(expected)
    assert soft_dice(target, target).item() == pytest.approx(0, abs=1e-5)


def test_predictions_of_another_module_are_refused():
    other = MapPredictions(
        (torch.zeros(1, 2, 4),), (torch.zeros(1, 2, 10, 12),), torch.zeros(1, 10, 12)
    )
    with pytest.raises(ValueError, match="need the predictions of PanopticMap"):
        PanopticMapLossConfig().build()(build(), other, targets([1]))


def test_bfloat16_is_near_and_trains():
    module = build()
    criterion = PanopticMapLossConfig().build()
    found, wanted, frames = features(2), targets([3, 2]), fake_frames(2, (16, 16))
    tokens, _ = module(found, frames, None)
    exact = criterion(module, tokens.predictions, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = module(found, frames, None)
        losses = criterion(module, tokens.predictions, wanted)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1), name
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_it_learns_two_scenes_by_heart():
    torch.manual_seed(0)
    module = CONFIG.build(DIM, GRID)
    criterion = PanopticMapLossConfig().build()
    found, wanted, frames = features(2), targets([3, 2], seed=4), fake_frames(2, (16, 16))
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    history = []
    for _ in range(80):
        tokens, _ = module(found, frames, None)
        losses = criterion(module, tokens.predictions, wanted)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in KINDS:
        assert history[-1][name] < 0.6 * history[0][name], name
    tokens, _ = module.eval()(found, frames, None)
    lanes = torch.zeros_like(tokens.predictions.lanes)
    for row, element in wanted.mask.nonzero().tolist():
        lanes[row, wanted.labels[row, element]] |= wanted.masks[row, element]
    both = (lanes & tokens.predictions.lanes).sum() / (lanes | tokens.predictions.lanes).sum()
    area = tokens.predictions.drivable > 0
    over = (area & wanted.drivable).sum() / (area | wanted.drivable).sum()
    assert both > 0.5
    assert over > 0.7
