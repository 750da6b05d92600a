"""The perception criterion: who is matched with whom, and that learning lowers every loss."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from odvla import geometry
from odvla.encoders.deformable_bev import DeformableBEVConfig
from odvla.encoders.image_backbone import ImageBackboneConfig
from odvla.encoders.protocol import fake_frames
from odvla.losses.perception import PerceptionLossConfig, heat_targets
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.map import MapQueriesConfig
from odvla.types import AgentPredictions, AgentTargets, BevGrid, MapTargets

GRID = BevGrid(-32.0, -32.0, 4.0, 16, 16)


def targets(xy: Tensor, track_ids: Tensor, labels: Tensor | None = None) -> AgentTargets:
    """Cars at xy [B, A, 2]."""
    batch, agents = track_ids.shape
    boxes = torch.zeros(batch, agents, 9)
    boxes[..., :2] = xy
    boxes[..., 3:6] = torch.tensor([1.9, 4.6, 1.7])
    return AgentTargets(
        boxes=boxes,
        labels=torch.zeros_like(track_ids) if labels is None else labels,
        track_ids=track_ids,
        mask=torch.ones_like(track_ids, dtype=torch.bool),
        future=torch.zeros(batch, agents, 6, 2),
        future_mask=torch.zeros(batch, agents, 6, dtype=torch.bool),
    )


def predictions(xy: Tensor, carried_from: Tensor, mask: Tensor | None = None) -> AgentPredictions:
    """Queries at xy [B, Q, 2] without an opinion about classes."""
    boxes = torch.zeros(*xy.shape[:2], 9)
    boxes[..., :2] = xy
    boxes[..., 3:6] = 1
    return AgentPredictions(
        layer_logits=(torch.zeros(*xy.shape[:2], 10),),
        layer_boxes=(boxes,),
        track_ids=torch.full_like(carried_from, -1),
        carried_from=carried_from,
        mask=mask,
    )


def test_a_carried_query_keeps_its_instance_even_where_another_is_nearer() -> None:
    criterion = PerceptionLossConfig().build(GRID)
    first = predictions(
        torch.tensor([[[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]]]), torch.full((1, 3), -1)
    )
    matches, bound = criterion.match(
        first, targets(torch.tensor([[[10.0, 1.0], [0.0, 1.0]]]), torch.tensor([[7, 8]])), None
    )
    assert bound.tolist() == [[8, 7, -1]]
    assert set(zip(matches.query.tolist(), matches.target.tolist(), strict=True)) == {
        (0, 1),
        (1, 0),
    }
    # Query 2 carries instance 7 (it was query 1), query 3 a query that was nobody (2).
    second = predictions(
        torch.tensor([[[10.0, 0.0], [0.0, 0.0], [30.0, 0.0], [5.0, 5.0]]]),
        torch.tensor([[-1, -1, 1, 2]]),
    )
    now = targets(torch.tensor([[[10.0, 0.0], [0.0, 0.0], [5.0, 5.5]]]), torch.tensor([[7, 8, 9]]))
    matches, bound = criterion.match(second, now, bound)
    pairs = dict(zip(matches.query.tolist(), matches.target.tolist(), strict=True))
    assert pairs == {2: 0, 1: 1, 3: 2}
    assert bound.tolist() == [[-1, 8, 7, 9]]
    # Instance 7 is not annotated now: its query is background, and remembers it.
    third = predictions(torch.zeros(1, 1, 2), torch.tensor([[2]]))
    matches, bound = criterion.match(
        third, targets(torch.zeros(1, 1, 2), torch.tensor([[9]])), bound
    )
    assert matches.row.tolist() == []
    assert bound.tolist() == [[7]]


def test_empty_slots_and_far_away_queries_are_never_matched() -> None:
    criterion = PerceptionLossConfig().build(GRID)
    slots = predictions(
        torch.tensor([[[0.0, 0.0], [7.0, 0.0], [0.0, 21.0]]]),
        torch.full((1, 3), -1),
        torch.tensor([[False, True, True]]),
    )
    two = targets(torch.tensor([[[0.0, 0.0], [0.0, 30.0]]]), torch.tensor([[1, 2]]))
    matches, bound = criterion.match(slots, two, None)
    assert matches.query.tolist() == [1]
    assert bound.tolist() == [[-1, 1, -1]]


def test_heat_peaks_on_the_cell_of_the_centre_and_nowhere_for_padding() -> None:
    xy = torch.tensor([[[-30.0, 30.0], [1.0, 1.0], [500.0, 0.0], [9.0, 9.0]]])
    agents = targets(xy, torch.arange(4)[None], torch.tensor([[0, 8, 0, 3]]))
    agents = replace(agents, mask=torch.tensor([[True, True, True, False]]))
    heat = heat_targets(agents, GRID, 10, 0.7)
    assert (heat == 1).nonzero().tolist() == [[0, 0, 15, 0], [0, 8, 8, 8]]
    assert heat[0, 3].max() == 0
    assert 0.3 < heat[0, 8, 8, 9] < 0.4  # exp(-1 / (2 * 0.49))


def test_perfect_boxes_cost_nothing_and_zero_weights_turn_losses_off() -> None:
    xy = torch.tensor([[[3.0, 4.0], [-9.0, 2.0]]])
    agents = targets(xy, torch.tensor([[1, 2]]))
    seen = predictions(xy, torch.full((1, 2), -1))
    seen = replace(seen, layer_boxes=(agents.boxes.clone(),))
    losses = PerceptionLossConfig(agent_class=0).build(GRID)((seen,), (agents,), None, None)
    assert losses.keys() == {"agent_box"}  # there is no heatmap, and no cell proposes a box
    assert losses["agent_box"].item() < 1e-6


def test_what_is_missing_costs_nothing() -> None:
    xy = torch.tensor([[[3.0, 4.0], [-9.0, 2.0]]])
    agents = targets(xy, torch.tensor([[1, 2]]))
    seen = predictions(xy, torch.full((1, 2), -1))
    heat = torch.zeros(1, 10, GRID.rows, GRID.columns)
    criterion = PerceptionLossConfig().build(GRID)
    found = criterion((replace(seen, heatmap=heat),), (agents,), None, None)
    assert found.keys() == {"heatmap", "agent_class", "agent_box"}
    assert criterion((seen,), (), None, None) == {}


def test_cells_propose_the_boxes_of_agents_on_and_beside_them() -> None:
    xy = torch.tensor([[[3.0, 5.0], [-31.0, 31.0]]])  # cells (8, 9) and the corner (0, 15)
    agents = targets(xy, torch.tensor([[1, 2]]))
    code = geometry.box_code(agents.boxes)[0]
    cells = torch.zeros(1, 10, 16, 16)
    cells[0, :, 8:11, 7:10] = code[0, :, None, None]
    cells[0, :, 14:, :2] = code[1, :, None, None]
    seen = replace(predictions(xy, torch.full((1, 2), -1)), cell_codes=cells)
    criterion = PerceptionLossConfig(cell_box=1.0).build(GRID)
    assert criterion((seen,), (agents,), None, None)["cell_box"].item() == 0
    cells[0, 0, 9, 8] += 3  # 3 m off in the centre cell; two agents, weights 1 + 8 / 4
    off = criterion((seen,), (agents,), None, None)["cell_box"].item()
    assert abs(off - 3 / 2 / 3) < 1e-6


def test_losses_fall_on_one_tiny_clip_and_tracks_come_alive() -> None:
    torch.manual_seed(0)
    encoder = DeformableBEVConfig(
        backbone=ImageBackboneConfig(widths=(8, 8, 16, 16), blocks=(0, 1, 0)),
        dim=16, cell_m=4.0, rows=16, columns=16, heads=2, layers=1,
    ).build()  # fmt: skip
    agents = AgentQueriesConfig(queries=6, carried=4, layers=1, heads=2).build(16, encoder.grid)
    elements = MapQueriesConfig(queries=4, layers=1, heads=2).build(16, encoder.grid)
    criterion = PerceptionLossConfig().build(GRID)
    parts = nn.ModuleList([encoder, agents, elements])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=5e-3)
    frames = fake_frames(2, (80, 45)), fake_frames(2, (80, 45), step=1)
    to_now = geometry.relative_transform(frames[0].lidar_to_global, frames[1].lidar_to_global)
    first = targets(torch.tensor([[[5.0, 9.0], [-11.0, 3.0]]] * 2), torch.tensor([[1, 2], [3, 4]]))
    second = replace(first, boxes=geometry.transform_boxes(to_now, first.boxes))
    masks = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
    masks[:, 0, :, 4] = True
    masks[:, 1, 3] = True
    on_map = MapTargets(
        masks, torch.tensor([[0, 2]] * 2), torch.ones(2, 2, dtype=torch.bool), masks.any(1)
    )
    history: list[dict[str, float]] = []
    for _ in range(40):
        features, memory = encoder(frames[0], None)
        before, tracks = agents(features, frames[0], None)
        features, _ = encoder(frames[1], memory)
        now, tracks = agents(features, frames[1], tracks)
        drawn, _ = elements(features, frames[1], None)
        losses = criterion(
            (before.predictions, now.predictions), (first, second), drawn.predictions, on_map
        )
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    still = [n for n, p in parts.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    for name in ("heatmap", "agent_class", "agent_box", "map_class", "map_mask", "drivable"):
        assert history[-1][name] < 0.7 * history[0][name], name
    assert sum(history[-1].values()) < 0.5 * sum(history[0].values())
    assert tracks.mask.any(1).all()
