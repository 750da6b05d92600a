"""Mask heads: against loops over heads and cells, cheap paths against plain ones."""

import pytest
import torch

from odvla.queries.mask_head import MaskAttention, MaskHead, MaskScores

DIM, HEADS = 16, 4


def inputs(queries, cells=11, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, queries, DIM, generator=generator)
    return query, torch.randn(rows, cells, DIM, generator=generator)


# With 4 heads of 16 channels, up to 5 queries are projected instead of the cells.
@pytest.mark.parametrize("queries", [1, 5, 6, 20])
@torch.no_grad()
def test_scores_and_masks_are_those_of_a_loop_over_heads_and_cells(queries):
    torch.manual_seed(queries)
    module = MaskScores(DIM, HEADS)
    query, memory = inputs(queries)
    scores, mask = module.scores(query, memory), module(query, memory)
    asked, key = module.q(query), module.k(memory)
    width = DIM // HEADS
    first, second = module.linear_l1[0], module.linear[0]
    for row in range(2):
        for q in range(queries):
            for cell in range(memory.shape[1]):
                own = torch.stack(
                    [
                        asked[row, q, part] @ key[row, cell, part] / width**0.5
                        for part in (slice(h * width, (h + 1) * width) for h in range(HEADS))
                    ]
                )
                torch.testing.assert_close(scores[row, :, q, cell], own, atol=1e-5, rtol=1e-5)
                value = second((first(own)).relu()).relu()
                torch.testing.assert_close(mask[row, q, cell], value[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 20])
@torch.no_grad()
def test_what_is_read_is_plain_attention_painted_or_not(queries):
    torch.manual_seed(queries)
    module = MaskAttention(DIM, HEADS)
    query, memory = inputs(queries)
    plain = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    plain.in_proj_weight.copy_(torch.cat([module.q.weight, module.k.weight, module.v.weight]))
    plain.in_proj_bias.copy_(torch.cat([module.q.bias, module.k.bias, module.v.bias]))
    plain.out_proj.load_state_dict(module.proj.state_dict())
    expected, _ = plain(query, memory, memory)
    painted, mask = module.attend(query, memory, paint=True)
    bare, none = module.attend(query, memory, paint=False)
    assert mask.shape == (2, queries, memory.shape[1])
    assert none is None
    torch.testing.assert_close(painted, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare, expected, atol=1e-5, rtol=1e-5)


def test_masks_between_the_layers_change_nothing_else():
    torch.manual_seed(0)
    head = MaskHead(DIM, HEADS, 3, self_attention=True)
    query, memory = inputs(6)
    positions = torch.randn(2, 6, DIM)
    some = head(memory, query, positions)
    every = head(memory, query, positions, paint_layers=True)
    assert some.layer_masks == ()
    assert len(every.layer_masks) == len(every.layer_queries) == 3
    torch.testing.assert_close(some.mask, every.mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.queries, every.queries, atol=1e-5, rtol=1e-5)


def test_positions_pile_up_from_layer_to_layer():
    torch.manual_seed(0)
    head = MaskHead(DIM, HEADS, 2)
    query, memory = inputs(3)
    positions = torch.randn(2, 3, DIM)
    x = query
    for block in head.blocks:
        x, _ = block(x + positions, memory, paint=False)
    torch.testing.assert_close(head(memory, query, positions).queries, x)


@pytest.mark.parametrize("seed", range(10))
def test_no_mask_starts_dead(seed):
    torch.manual_seed(seed)
    head = MaskHead(DIM, HEADS, 2)
    query, memory = inputs(4, cells=40, seed=seed)
    painted = head(memory, query, paint_layers=True)
    for mask in (painted.mask, *painted.layer_masks):
        assert (mask >= 0).all()
        assert (mask > 0).float().mean() > 0.5
