"""Planning scores against the reference's recorded arrays, a slow loop and closed forms."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from odvla.errors import UserError
from odvla.metrics.collisions import FIELD_RASTER, Traffic, box_hits
from odvla.metrics.planning import PlanningMetric
from odvla.metrics.protocol import PRESETS, ProtocolCard, protocols_of, refuse_to_mix

EMPTY = torch.zeros(1, 6, 200, 200, dtype=torch.bool)


def scored(predicted, driven, mask, card, raster=None):
    metric = PlanningMetric(card)
    traffic = Traffic(raster=EMPTY.expand(len(predicted), -1, -1, -1) if raster is None else raster)
    names = [f"sample-{number:04d}" for number in range(len(predicted))]
    metric.update(names, predicted, driven, mask, traffic)
    return metric


@pytest.fixture
def golden(shared):
    arrays = np.load(shared / "golden" / "h_planning_metric.npz")
    totals = json.loads((shared / "golden" / "h_planning_metric.json").read_text())
    return {name: torch.from_numpy(arrays[name]) for name in arrays}, totals


def test_ego_box_covers_the_reference_cells(golden):
    arrays, _ = golden
    rows, columns = FIELD_RASTER.ego_cells()
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == set(
        zip(arrays["ego_box_rows"].tolist(), arrays["ego_box_cols"].tolist(), strict=True)
    )


@pytest.mark.parametrize("shape", ["box", "point"])
@pytest.mark.parametrize(
    ("preset", "table"), [("opendrivevla_uniad", "uniad"), ("opendrivevla_stp3", "stp3")]
)
def test_samples_and_totals_equal_the_reference(golden, preset, table, shape):
    arrays, totals = golden
    mask = arrays["mask"][..., 0] > 0
    card = replace(PRESETS[preset], shape=shape)
    metric = scored(arrays["pred"], arrays["gt"], mask, card, arrays["occupancy"] > 0)
    found, scores = metric.samples(), metric.scores()
    name = "obj_box_col" if shape == "box" else "obj_col"
    torch.testing.assert_close((found.l2_m * mask).float(), arrays["L2"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.hits, arrays[name] > 0)
    assert torch.equal(found.driven_hits, arrays["gt_box_coll"])
    assert scores.driven_collisions == totals["gt_collision_count"]
    assert scores.l2_steps_m == pytest.approx(totals["per_timestep"]["L2"], rel=1e-5)
    assert scores.collision_steps == pytest.approx(totals["per_timestep"][name], rel=1e-5)
    numbers = scores.as_dict()
    for end in ("1s", "2s", "3s", "avg"):
        l2 = numbers["l2_avg_m" if end == "avg" else f"l2_{end}_m"]
        assert l2 == pytest.approx(totals[table][f"L2_{end}"], rel=1e-5)
        expected = totals[table][f"{name}_{end}"]
        assert numbers[f"{shape}_collision_{end}"] == pytest.approx(expected, rel=1e-5)


def test_collision_agrees_with_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    plans = torch.rand(5, 6, 2, generator=generator) * 60 - 30
    raster = torch.rand(5, 6, 200, 200, generator=generator) < 0.01
    cells = list(zip(*(t.tolist() for t in FIELD_RASTER.ego_cells()), strict=True))
    fast = box_hits(plans, raster)
    for sample in range(5):
        for step in range(6):
            x, y = plans[sample, step].numpy()
            hit = False
            for row, column in cells:
                r = min(max(int(np.float32(y) / np.float32(0.5) + row), 0), 199)
                c = min(max(int(-np.float32(x) / np.float32(0.5) + column), 0), 199)
                hit = hit or bool(raster[sample, step, r, c])
            assert fast[sample, step] == hit


def test_a_car_ahead_is_hit_and_a_car_beside_is_not():
    plans = torch.zeros(1, 6, 2)
    plans[0, :, 1] = torch.arange(1, 7) * 5.0
    raster = EMPTY.clone()
    raster[0, :, round((30.0 + 49.75) / 0.5), 99] = True  # reached at the sixth step only
    raster[0, :, 100, 110] = True  # 5 m to the left
    assert box_hits(plans, raster)[0].tolist() == [False] * 5 + [True]


def test_sample_policies_treat_missing_steps_in_three_ways():
    driven = torch.zeros(2, 6, 2)
    predicted = torch.tensor([3.0, 4.0]).expand(2, 6, 2)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    found = {
        policy: scored(
            predicted, driven, mask, ProtocolCard(l2="value_at_t", samples=policy)
        ).scores()
        for policy in ("valid_steps", "reference", "complete_only")
    }
    assert found["valid_steps"].l2_m == (5.0, 5.0, 5.0)
    assert found["reference"].l2_m == (5.0, 2.5, 2.5)
    assert found["complete_only"].l2_m == (5.0, 5.0, 5.0)
    assert [found[p].samples for p in ("valid_steps", "reference", "complete_only")] == [2, 2, 1]
    nobody = torch.zeros(2, 6, dtype=torch.bool)
    card = ProtocolCard(l2="value_at_t", samples="complete_only")
    metric = scored(predicted, driven, nobody, card)
    with pytest.raises(ValueError, match="no sample counts under the policy 'complete_only'"):
        metric.scores()


@pytest.mark.parametrize("recorded", [1, 2, 4, 6])
def test_a_number_without_a_recorded_step_is_unknown_and_in_no_average(recorded):
    driven = torch.zeros(1, 6, 2)
    mask = torch.arange(6)[None] < recorded
    found = {
        (policy, rule): scored(
            driven + torch.tensor([1.0, 0.0]),
            driven,
            mask,
            ProtocolCard(l2=rule, collision=rule, samples=policy),
        ).scores()
        for policy in ("valid_steps", "reference")
        for rule in ("value_at_t", "mean_up_to_t")
    }
    nan = float("nan")
    known = recorded // 2
    at_t = found["valid_steps", "value_at_t"]
    np.testing.assert_array_equal(at_t.l2_m, [1.0] * known + [nan] * (3 - known))
    np.testing.assert_array_equal(at_t.collision, [0.0] * known + [nan] * (3 - known))
    np.testing.assert_array_equal(at_t.l2_average_m, 1.0 if known else nan)
    np.testing.assert_array_equal(at_t.collision_average, 0.0 if known else nan)
    np.testing.assert_array_equal(at_t.l2_steps_m, [1.0] * recorded + [nan] * (6 - recorded))
    up_to_t = found["valid_steps", "mean_up_to_t"]
    assert up_to_t.l2_m == (1.0, 1.0, 1.0)
    assert up_to_t.l2_average_m == 1.0
    # The reference divides by all samples, recorded or not.
    assert found["reference", "value_at_t"].l2_m == (1.0,) * known + (0.0,) * (3 - known)


def test_a_hit_is_counted_at_t_up_to_t_or_ever_since():
    plans = torch.zeros(1, 6, 2)
    plans[0, :, 1] = torch.arange(1, 7) * 5.0
    raster = EMPTY.clone()
    raster[0, 0, round((5.0 + 49.75) / 0.5), 99] = True  # at the first step only
    mask = torch.ones(1, 6, dtype=torch.bool)
    found = {
        rule: scored(
            plans,
            plans + 20.0,
            mask,
            ProtocolCard(l2="value_at_t", collision=rule),
            raster,
        )
        .scores()
        .collision
        for rule in ("value_at_t", "mean_up_to_t", "any_up_to_t")
    }
    assert found["value_at_t"] == (0.0, 0.0, 0.0)
    assert found["mean_up_to_t"] == pytest.approx((1 / 2, 1 / 4, 1 / 6))
    assert found["any_up_to_t"] == (1.0, 1.0, 1.0)


def test_a_plan_is_no_worse_than_the_path_that_was_driven():
    plans = torch.zeros(1, 6, 2)
    everywhere = torch.ones_like(EMPTY)
    mask = torch.ones(1, 6, dtype=torch.bool)
    scores = scored(plans, plans, mask, PRESETS["uniad"], everywhere).scores()
    assert scores.collision == (0.0, 0.0, 0.0)
    assert scores.driven_collisions == 1


def test_order_and_repetition_of_samples_change_nothing():
    generator = torch.Generator().manual_seed(1)
    plans, driven = (torch.randn(7, 6, 2, generator=generator) * 9 for _ in range(2))
    mask = torch.rand(7, 6, generator=generator) > 0.2
    raster = torch.rand(7, 6, 200, 200, generator=generator) < 0.02
    names = [f"token-{number}" for number in range(7)]
    whole = PlanningMetric(PRESETS["uniad"])
    whole.update(names, plans, driven, mask, Traffic(raster))
    parts = PlanningMetric(PRESETS["uniad"])
    for rows in ([6, 2], [0, 1, 6], [5, 4, 3]):  # token-6 comes twice
        parts.update(
            [names[r] for r in rows], plans[rows], driven[rows], mask[rows], Traffic(raster[rows])
        )
    assert parts.compute() == whole.compute()
    parts.update(["token-0"], plans[:1] + 1, driven[:1], mask[:1], Traffic(raster[:1]))
    with pytest.raises(ValueError, match="'token-0' was scored twice, differently"):
        parts.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_what_cannot_be_scored_is_named():
    mask = torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"predicted must be \[samples, 6, 2\], got \[2, 5, 2\]"):
        scored(torch.zeros(2, 5, 2), torch.zeros(2, 6, 2), mask, PRESETS["uniad"])
    with pytest.raises(ValueError, match="predicted plans must be finite"):
        scored(torch.full((2, 6, 2), torch.nan), torch.zeros(2, 6, 2), mask, PRESETS["uniad"])
    with pytest.raises(ValueError, match="no sample was added"):
        PlanningMetric(PRESETS["uniad"]).compute()


def test_cards_are_told_apart_and_their_results_not_mixed():
    assert list(protocols_of(["opendrivevla", "uniad"])) == [
        "opendrivevla_uniad",
        "opendrivevla_stp3",
        "uniad",
    ]
    with pytest.raises(UserError, match="no protocol 'unid'; there are odvla_stp3"):
        protocols_of(["unid"])
    told = replace(PRESETS["uniad"], ego_status="used")
    refuse_to_mix([("a", PRESETS["uniad"]), ("b", told)])
    with pytest.raises(UserError, match=r"a and b .* cannot be compared: l2 \(value_at_t \| mean"):
        refuse_to_mix([("a", PRESETS["uniad"]), ("b", PRESETS["stp3"])])
    card = PRESETS["sparsedrive"]
    assert ProtocolCard.from_dict(card.as_dict(), "x") == card
    with pytest.raises(UserError, match=r"results\.json has no whole protocol card"):
        ProtocolCard.from_dict({"l2": "value_at_t"}, "results.json")
