"""The panoptic map head: scenes side by side as alone, tokens, quirks on and off, training."""

import math
from dataclasses import replace

import pytest
import torch

from odvla.encoders.protocol import fake_frames
from odvla.losses.perception import PerceptionLossConfig
from odvla.queries.panoptic_map import (
    PanopticMapConfig,
    attention_levels,
    cell_fractions,
    corners,
    in_cells,
    sine_positions,
)
from odvla.types import BevGrid, MapPredictions, MapTargets, SceneFeatures

GRID = BevGrid(-24.0, -20.0, 4.0, 10, 12)  # more columns than rows
DIM = 32
CONFIG = PanopticMapConfig(
    queries=20, encoder_layers=2, decoder_layers=2, hidden=32,
    thing_mask_layers=2, stuff_mask_layers=2, max_candidates=30,
)  # fmt: skip
FRAMES = fake_frames(3, (16, 16))


def lively(config, seed=1):
    """A module whose candidates are confident, and none of whose layers starts at zero."""
    torch.manual_seed(seed)
    module = config.build(DIM, GRID).eval()
    for branch in module.cls_branches:
        torch.nn.init.normal_(branch.weight, std=0.5)
        torch.nn.init.constant_(branch.bias, 0.0)
    for branch in (*module.reg_branches, *module.mask_reg_branches):
        torch.nn.init.normal_(branch[-1].weight, std=0.3)
    for layer in (*module.encoder, *module.decoder):
        attention = getattr(layer, "attention", None) or layer.cross_attention
        torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(attention.attention_weights.weight, std=0.1)
    for head in (module.thing_masks, module.stuff_masks):
        torch.nn.init.constant_(head.attnen.linear[0].bias, -1.0)  # thin masks
    return module


def features(seed=0, rows=3):
    generator = torch.Generator().manual_seed(seed)
    bev = torch.randn(rows, GRID.rows, GRID.columns, DIM, generator=generator)
    return SceneFeatures(levels=(), bev=bev, grid=GRID)


def parts(module, found):
    bev = found.bev.permute(0, 3, 1, 2)
    decoding = module.decode(bev)
    candidates = module.candidates(decoding)
    return decoding, candidates, module.draw(decoding, candidates)


@pytest.mark.parametrize("compat", ["none", "uniad"])
@torch.no_grad()
def test_scenes_side_by_side_give_what_each_gives_alone(compat):
    counts = set()
    for seed in (1, 2):
        module = lively(replace(CONFIG, compat=compat), seed)
        found = features(seed)
        together, state = module(found, FRAMES, None)
        assert state is None
        assert isinstance(together.predictions, MapPredictions)
        for row in range(3):
            one = SceneFeatures(levels=(), bev=found.bev[row : row + 1], grid=GRID)
            alone, _ = module(one, fake_frames(1, (16, 16)), None)
            counts.add(int(alone.mask.sum()))
            ours = together.feats[row][together.mask[row]]
            assert ours.shape == alone.feats[0].shape
            torch.testing.assert_close(ours, alone.feats[0], atol=1e-4, rtol=1e-4)
            assert (together.feats[row][~together.mask[row]] == 0).all()
            lanes = alone.predictions.lanes[0]
            assert torch.equal(together.predictions.lanes[row], lanes)
            assert torch.equal(together.predictions.kept[row], alone.predictions.kept[0])
            torch.testing.assert_close(
                together.predictions.layer_masks[0][row],
                alone.predictions.layer_masks[0][0],
                atol=1e-4,
                rtol=1e-4,
            )
    assert len(counts) > 1  # the scenes had different numbers of elements


@torch.no_grad()
def test_tokens_are_those_of_the_elements_on_the_map_unless_uniads_are_wanted():
    found = features()
    wrong = 0
    for compat in ("none", "uniad"):
        module = lively(replace(CONFIG, compat=compat, attention_levels=1))
        tokens, _ = module(found, FRAMES, None)
        _, candidates, drawing = parts(module, found)
        for row in range(3):
            final = candidates.scores[row] * _quality(drawing.things[row], compat) ** 2
            order = final.argsort(descending=True, stable=True).tolist()
            kept = tokens.predictions.kept[row]
            places = [place for place, index in enumerate(order) if kept[index]]
            assert places
            meant = [order[place] for place in places]
            rows = meant if compat == "none" else places
            wrong += compat == "uniad" and rows != meant
            expected = torch.cat(
                [drawing.thing_queries[row, rows], drawing.drivable_query[row, None]]
            )
            torch.testing.assert_close(tokens.feats[row][tokens.mask[row]], expected)
    assert wrong


def _quality(masks, compat):
    values = []
    for mask in masks:
        own = mask[mask > 0.5]
        mean = own.sum() / (len(own) + 1) if compat == "uniad" else own.mean().clamp(max=1)
        values.append(mean if len(own) else torch.zeros(()))
    return torch.stack(values)


@torch.no_grad()
def test_predictions_say_the_same_as_masks_and_scores():
    module = lively(CONFIG)
    found = features()
    tokens, _ = module(found, FRAMES, None)
    predicted = tokens.predictions
    _, candidates, drawing = parts(module, found)
    assert torch.equal(predicted.layer_masks[-1] > 0, drawing.things > 0.5)
    assert torch.equal(predicted.drivable > 0, drawing.drivable > 0.5)
    # The candidate's class against "no object" alone is its sigmoid score.
    label = candidates.labels.unsqueeze(-1)
    odds = predicted.layer_logits[-1].gather(2, label)[..., 0] - predicted.layer_logits[-1][..., -1]
    torch.testing.assert_close(odds.sigmoid(), candidates.scores)
    assert torch.equal(predicted.labels, candidates.labels)
    lanes = torch.zeros_like(predicted.lanes)
    for row, index in predicted.kept.nonzero().tolist():
        lanes[row, candidates.labels[row, index]] |= drawing.things[row, index] > 0.5
    assert torch.equal(predicted.lanes.any(1), lanes.any(1))
    assert (candidates.scores.diff(dim=1) <= 0).all()
    assert predicted.decoding.memory.shape == (3, 120, DIM)


@torch.no_grad()
def test_the_stride_quirk_needs_four_levels_of_weights_and_changes_the_numbers():
    quirky = lively(replace(CONFIG, compat="uniad"))
    assert attention_levels(quirky.state_dict()) == 4
    plain = lively(replace(CONFIG, compat="uniad", attention_levels=1))
    assert attention_levels(plain.state_dict()) == 1
    assert PanopticMapConfig().stored_levels == 1
    assert PanopticMapConfig(compat="uniad").stored_levels == 4
    # Give the plain module the first level's weights of the other: a sane reading of the same
    # checkpoint, but not what it was trained as.
    weights = quirky.state_dict()
    for name, tensor in weights.items():
        if "sampling_offsets" in name or "attention_weights" in name:
            last = 2 if "sampling_offsets" in name else 1
            by_level = tensor.unflatten(0, (CONFIG.heads, 4, CONFIG.points * last))
            weights[name] = by_level[:, 0].flatten(0, 1)
    plain.load_state_dict(weights)
    bev = features().bev.permute(0, 3, 1, 2)
    ours, theirs = quirky.decode(bev).memory, plain.decode(bev).memory
    assert (ours - theirs).abs().max() > 0.1
    with pytest.raises(ValueError, match="is not of 7 heads"):
        attention_levels(weights, heads=7)
    with pytest.raises(ValueError, match="with 0 rows"):
        attention_levels({})


@torch.no_grad()
def test_no_element_at_all_leaves_the_drivable_area():
    module = lively(CONFIG)
    for branch in module.cls_branches:
        torch.nn.init.constant_(branch.bias, -50.0)
    tokens, _ = module(features(), FRAMES, None)
    assert tokens.feats.shape == (3, 1, DIM)
    assert tokens.mask.tolist() == [[True]] * 3
    assert not tokens.predictions.lanes.any()


def test_positions_are_detrs_cell_by_cell():
    size, dim = (3, 5), 8
    ours = sine_positions(dim, size).unflatten(0, size)
    for row in range(3):
        for column in range(5):
            expected = []
            for place, cells in ((row, 3), (column, 5)):
                at = (place + 0.5) / (cells + 1e-6) * 2 * math.pi
                for wave in range(dim // 4):
                    angle = at / 10000 ** (2 * wave / (dim // 2))
                    expected += [math.sin(angle), math.cos(angle)]
            assert ours[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_x_runs_along_columns():
    size = (10, 12)
    centres = cell_fractions(size).unflatten(0, size)
    assert centres[3, 7].tolist() == pytest.approx([7.5 / 12, 3.5 / 10])
    box = in_cells(corners(torch.tensor([0.5, 0.25, 0.25, 0.1])), size)
    assert box.tolist() == pytest.approx([4.5, 2.0, 7.5, 3.0])
    assert in_cells(torch.tensor([0.5, 0.5]), size).tolist() == [6.0, 5.0]


@torch.no_grad()
def test_boxes_of_candidates_stay_on_the_map():
    module = lively(CONFIG)
    _, candidates, _ = parts(module, features())
    assert (candidates.boxes >= 0).all()
    assert (candidates.boxes[..., 0::2] <= GRID.columns).all()
    assert (candidates.boxes[..., 1::2] <= GRID.rows).all()
    assert (candidates.boxes[..., 2] > GRID.rows).any()  # x may be larger than y ever is


def test_the_losses_of_plain_map_queries_work_with_it_too():
    module = lively(CONFIG)
    tokens, _ = module(features(), FRAMES, None)
    masks = torch.zeros(3, 2, *module.size, dtype=torch.bool)
    masks[:, 0, 2], masks[:, 1, :, 5] = True, True
    targets = MapTargets(
        masks, torch.tensor([[0, 2]] * 3), torch.ones(3, 2, dtype=torch.bool), masks.any(1)
    )
    criterion = PerceptionLossConfig().build(GRID)
    losses = criterion((), (), tokens.predictions, targets)
    assert losses.keys() == {"map_class", "map_mask", "map_dice", "drivable"}
    sum(losses.values()).backward()
    for module_part in (
        module.encoder,
        module.decoder,
        module.cls_branches[-1],
        module.thing_masks,
    ):
        assert any(p.grad is not None and p.grad.any() for p in module_part.parameters())


def test_bad_sizes_and_missing_features_are_named():
    with pytest.raises(ValueError, match=r"map\.heads=8 and 4 must divide the encoder's dim 36"):
        CONFIG.build(36, GRID)
    with pytest.raises(ValueError, match="map queries need the feature 'bev'"):
        CONFIG.build(DIM, None)
    with pytest.raises(ValueError, match="map queries need the feature 'bev'"):
        lively(CONFIG)(SceneFeatures(levels=()), FRAMES, None)
