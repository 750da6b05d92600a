"""Plans by regression: what is shown is read, what is hidden is not, a few plans are learned."""

from dataclasses import replace

import pytest
import torch

from odvla.encoders.deformable_bev import DeformableBEVConfig
from odvla.encoders.image_backbone import ImageBackboneConfig
from odvla.encoders.vision_patches import VisionPatchesConfig
from odvla.errors import UserError
from odvla.fake_batch import fake_batch, fake_ego, fake_tokenizer
from odvla.language.causal_lm import LanguageConfig
from odvla.language.talk_rows import talk_rows
from odvla.losses.collision import CollisionLossConfig
from odvla.planner import PlannerConfig
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.rows import rows_of
from odvla.types import BevGrid, TrafficTargets
from odvla.vla import VLAConfig
from stages.planning import PlanningStageConfig
from stages.regression import RegressionLossConfig

GRID = BevGrid(-32.0, -32.0, 8.0, 8, 8)
SIZE = (48, 32)
TOKENIZER = fake_tokenizer(vocab_size=320)
CONFIG = VLAConfig(
    encoder=DeformableBEVConfig(
        backbone=ImageBackboneConfig(widths=(8, 8, 8, 8)),
        dim=8,
        rows=GRID.rows,
        columns=GRID.columns,
        cell_m=GRID.cell_m,
        layers=1,
        heads=1,
    ),
    queries=(
        SceneSamplerConfig(source="bev", rows=2, columns=2),
        AgentQueriesConfig(queries=4, carried=4, max_tokens=8, layers=1, heads=1),
    ),
    language=LanguageConfig(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=32),
    planner=PlannerConfig(dim=32, layers=2, heads=2, intermediate=32),
)
REGRESSION = PlanningStageConfig(actions="regression")


def model(**changes):
    torch.manual_seed(0)
    return replace(CONFIG, planner=replace(CONFIG.planner, **changes)).build(TOKENIZER)


def batch(rows=4, **settings):
    return fake_batch(TOKENIZER, rows=rows, image_size=SIZE, grid=GRID, **settings)


def plans(vla, given, **settings):
    with torch.no_grad():
        return vla.eval().regress(given, **settings).waypoints


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_a_few_plans_are_learned_by_heart(distance):
    vla, given = model(dropout=0.0), batch(rows=6)
    # Each command asks for a path of its own, at a speed of its own; a step is not known.
    curve = torch.tensor([2.0, -2.0, 0.0])[given.ego.command][:, None]
    t = torch.arange(1, 7) / 6
    ahead = (3 + 4 * torch.rand(6, generator=torch.Generator().manual_seed(1)))[:, None]
    waypoints = torch.stack([curve * t**2, ahead * 6 * t], -1)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[0, 4:] = False
    waypoints[0, 4:] = float("nan")  # what is not known must not count
    given = replace(given, plan=replace(given.plan, waypoints=waypoints, mask=mask))
    loss = RegressionLossConfig(distance)
    stage = replace(REGRESSION, regression=loss).build(vla)
    optimiser = torch.optim.AdamW(vla.planner.parameters(), lr=3e-3)
    with torch.no_grad():
        seen, _ = vla.eval().perceive(given.clip)
    losses = []
    for _ in range(200):
        gaps = (vla.regress(given, seen=seen).waypoints - waypoints)[mask]
        error = torch.linalg.vector_norm(gaps, int(distance[1]), -1).mean()
        losses.append(float(error.detach()))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    last = stage.loss_of(given, None)
    assert last.loss.requires_grad
    assert losses[0] > 5
    assert last.loss.item() < 0.1 * losses[0]
    assert last.loss.item() == pytest.approx(losses[-1], rel=0.5)  # the same loss, a step later
    assert last.weight == int(mask.sum())
    last.loss.backward()
    assert all(p.grad.isfinite().all() for p in vla.planner.parameters() if p.grad is not None)


def test_rows_are_apart_and_a_row_that_fills_up_teaches_nothing():
    vla, given = model(), batch(rows=3)
    together = plans(vla, given)
    for row in range(3):
        place = torch.tensor([row])
        alone = replace(given, ego=rows_of(given.ego, place), clip=(rows_of(given.clip[0], place),))
        torch.testing.assert_close(plans(vla, alone)[0], together[row], rtol=1e-4, atol=1e-4)
    stage = REGRESSION.build(vla)
    part = replace(given, valid=torch.tensor([True, False, False]))
    assert stage.loss_of(part, None).weight == 6
    nothing = stage.loss_of(replace(given, valid=torch.zeros(3, dtype=torch.bool)), None)
    assert (nothing.loss.item(), nothing.weight) == (0.0, 0)
    nothing.loss.backward()  # a distributed run steps all the same


def test_command_ego_state_and_view_are_all_read():
    vla, given = model(), batch()
    told = plans(vla, given)
    other = fake_ego(4, 9)
    turned = replace(given.ego, command=(given.ego.command + 1) % 3)
    assert not torch.allclose(plans(vla, replace(given, ego=turned)), told)
    faster = replace(other, command=given.ego.command)
    assert not torch.allclose(plans(vla, replace(given, ego=faster)), told)
    assert not torch.allclose(plans(vla, given, blind=True), told)
    deaf = model(ego_state=False)
    assert torch.equal(plans(deaf, replace(given, ego=faster)), plans(deaf, given))


def test_what_is_hidden_is_not_read():
    hidden = replace(CONFIG, hidden_streams=("scene", "track", "map"))
    torch.manual_seed(0)
    vla, given = hidden.build(TOKENIZER), batch()
    assert torch.equal(plans(vla, given), plans(vla, given, blind=True))


def test_remembered_tokens_do_for_a_planner_that_reads_tokens_alone():
    vla, given = model(reads=("scene", "track")), batch()
    with torch.no_grad():
        seen, _ = vla.eval().perceive(given.clip)
    kept = replace(seen, features=None)
    assert torch.equal(plans(vla, given, seen=kept), plans(vla, given))
    with pytest.raises(UserError, match="remembered tokens do not hold"):
        plans(model(), given, seen=kept)
    remembering = replace(REGRESSION, remember_tokens=True)
    remembering.build(vla)
    with pytest.raises(UserError, match=r"remember_tokens=false.*model\.planner\.reads=\[scene"):
        remembering.build(model())


def test_mistakes_are_named():
    with pytest.raises(
        UserError, match=r"reads must be some of bev, scene, track, map, language, not \('x'"
    ):
        PlannerConfig(reads=("x",))
    with pytest.raises(UserError, match=r"dim 30 must be a multiple of planner\.heads 4"):
        PlannerConfig(dim=30)
    with pytest.raises(UserError, match="reads names 'map', which this model does not make"):
        model(reads=("map",))
    patches = replace(CONFIG, encoder=VisionPatchesConfig(), queries=(SceneSamplerConfig(),))
    with pytest.raises(UserError, match="reads names 'bev', which this model does not make"):
        patches.build(TOKENIZER)
    with pytest.raises(UserError, match=r"set model\.planner\.dim=64"):
        REGRESSION.build(replace(CONFIG, planner=None).build(TOKENIZER))
    with pytest.raises(UserError, match="distance is l1 or l2, not 'l3'"):
        RegressionLossConfig("l3")
    with pytest.raises(UserError, match=r"regresses one plan, not planning\.samples=3"):
        replace(REGRESSION, samples=3)


def hearing(**changes):
    return model(reads=("language",), ego_state=False, dropout=0.0, **changes)


def test_the_language_model_s_state_is_the_one_that_its_first_word_comes_from():
    vla, given = hearing().eval(), batch(rows=3)
    with torch.no_grad():
        seen, _ = vla.perceive(given.clip)
        states, asked = vla._heard(given, seen)
        first = vla.language.head(states[:, 0]).argmax(-1)
    written = vla.generate(given, seen=seen, max_new_tokens=1, grammar=None)
    assert asked.all()
    texts = [texts[0] for texts in written.texts]
    assert texts == [vla.tokenizer.decode([token]) for token in first.tolist()]


def test_the_answer_is_not_looked_at():
    vla, given = hearing(), batch()
    places = torch.arange(given.talk.input_ids.shape[1])
    answer = given.talk.mask & (places >= given.talk.prompt_length[:, None])
    assert answer.any()
    other = torch.where(answer, 5, given.talk.input_ids)
    changed = replace(given, talk=replace(given.talk, input_ids=other))
    assert torch.equal(plans(vla, changed), plans(vla, given))


def test_heard_through_the_language_model_all_is_read():
    vla, given = hearing(), batch()
    told = plans(vla, given)
    assert not torch.allclose(plans(vla, given, blind=True), told)
    others = batch(seed=1)  # its requests tell another ego state
    asked = replace(given, talk=others.talk, ego=replace(others.ego, command=given.ego.command))
    assert not torch.allclose(plans(vla, asked), told)
    # Rows need not stand in order, and one that is not asked about hears nothing.
    turned = replace(given, talk=talk_rows(given.talk, torch.tensor([2, 0, 1])))
    some = vla.regress(turned)
    assert some.asked.tolist() == [True, True, True, False]
    torch.testing.assert_close(some.waypoints[:3], told[:3], rtol=1e-4, atol=1e-4)
    silent = vla.regress(replace(given, talk=None))
    assert not silent.asked.any()
    torch.testing.assert_close(silent.waypoints[3], some.waypoints[3], rtol=1e-4, atol=1e-4)
    twice = replace(given, talk=talk_rows(given.talk, torch.tensor([0, 0])))
    with pytest.raises(UserError, match="need one request a key-frame"):
        vla.regress(twice)


def test_the_loss_goes_back_through_the_language_model():
    vla, given = hearing(), batch()
    stage = REGRESSION.build(vla)
    found = stage.loss_of(given, None)
    assert found.weight == 24
    assert found.parts == {}
    found.loss.backward()
    reached = {name for name, p in vla.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("planner.inputs.language", "language.model", "projectors.scene", "encoder."):
        assert any(name.startswith(part) for name in reached), part
    # Rows without a request, and rows that fill up, do not count.
    less = replace(given, talk=talk_rows(given.talk, torch.tensor([0, 1])))
    less = replace(less, valid=torch.tensor([True, False, True, True]))
    assert stage.loss_of(less, None).weight == 6


def test_a_stage_may_read_less_than_the_planner_can():
    vla = model(reads=("scene", "track", "language"), dropout=0.0)
    given = batch()
    tokens = replace(REGRESSION, planner_reads=("scene", "track")).build(vla)
    heard = replace(REGRESSION, planner_reads=("language",)).build(vla)
    for stage, reached, left in (
        (tokens, "planner.inputs.scene", "language."),
        (heard, "language.", "planner.inputs.scene"),
    ):
        vla.zero_grad()
        stage.loss_of(given, None).loss.backward()
        names = {name for name, p in vla.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(name.startswith(reached) for name in names)
        assert not any(name.startswith(left) for name in names)
    with pytest.raises(
        UserError, match=r"planner_reads names 'bev', but .* scene, track, language"
    ):
        replace(REGRESSION, planner_reads=("bev",)).build(vla)


def test_collisions_cost_what_the_setting_says():
    vla, given = model(dropout=0.0), batch()
    plain = REGRESSION.build(vla).loss_of(given, None)
    collision = CollisionLossConfig(weight=2.5)
    stage = replace(REGRESSION, regression=RegressionLossConfig(collision=collision)).build(vla)
    # Others stand wherever the car would go.
    planned = vla.regress(given).waypoints.detach()
    boxes = torch.cat([planned, torch.tensor([1.9, 4.5, 1.5]).expand(4, 6, 3)], -1)
    steps, mask = torch.arange(6).expand(4, 6), torch.ones(4, 6, dtype=torch.bool)
    crowded = replace(given, traffic=TrafficTargets(boxes, steps, mask))
    found = stage.loss_of(crowded, None)
    assert found.parts["distance"] == plain.loss
    assert found.parts["collision"] > 20  # square metres, of six boxes
    torch.testing.assert_close(found.loss, plain.loss + 2.5 * found.parts["collision"])
    with pytest.raises(UserError, match=r"set data\.planning\.targets=\[traffic\]"):
        stage.loss_of(replace(given, traffic=None), None)
