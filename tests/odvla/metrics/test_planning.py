"""Planning scores against the reference's recorded arrays and against a slow loop."""

import json

import numpy as np
import pytest

from odvla.metrics.planning import (
    ProtocolCard,
    box_collisions,
    ego_box_cells,
    l2_per_step,
    score_plans,
)


@pytest.fixture
def golden(shared):
    arrays = np.load(shared / "golden" / "h_planning_metric.npz")
    totals = json.loads((shared / "golden" / "h_planning_metric.json").read_text())
    return arrays, totals


def test_ego_box_covers_the_reference_cells(golden):
    arrays, _ = golden
    rows, columns = ego_box_cells()
    assert set(zip(rows, columns, strict=True)) == set(
        zip(arrays["ego_box_rows"], arrays["ego_box_cols"], strict=True)
    )


@pytest.mark.parametrize(
    ("convention", "table"), [("value_at_t", "uniad"), ("mean_up_to_t", "stp3")]
)
def test_scores_equal_the_reference(golden, convention, table):
    arrays, totals = golden
    mask = arrays["mask"][..., 0] > 0
    scores = score_plans(
        arrays["pred"],
        arrays["gt"],
        mask,
        arrays["occupancy"],
        ProtocolCard(l2=convention, samples="all_samples"),
    )
    for second, l2, collision in zip((1, 2, 3), scores.l2_m, scores.collision_percent, strict=True):
        assert l2 == pytest.approx(totals[table][f"L2_{second}s"], rel=1e-5)
        assert collision == pytest.approx(100 * totals[table][f"obj_box_col_{second}s"], rel=1e-5)
    assert scores.l2_average_m == pytest.approx(totals[table]["L2_avg"], rel=1e-5)


def test_driven_collisions_equal_the_reference(golden):
    arrays, _ = golden
    np.testing.assert_array_equal(
        box_collisions(arrays["gt"], arrays["occupancy"]), arrays["gt_box_coll"]
    )


def test_collision_agrees_with_a_slow_loop():
    rng = np.random.default_rng(0)
    plans = rng.uniform(-30, 30, (5, 6, 2))
    occupancy = rng.random((5, 6, 200, 200)) < 0.01
    rows, columns = ego_box_cells()
    fast = box_collisions(plans, occupancy)
    for sample in range(5):
        for step in range(6):
            x, y = plans[sample, step]
            hit = False
            for row, column in zip(rows, columns, strict=True):
                r = min(max(int(np.float32(y) / np.float32(0.5) + row), 0), 199)
                c = min(max(int(-np.float32(x) / np.float32(0.5) + column), 0), 199)
                hit = hit or bool(occupancy[sample, step, r, c])
            assert fast[sample, step] == hit


def test_a_car_ahead_is_hit_and_a_car_beside_is_not():
    plans = np.zeros((1, 6, 2))
    plans[0, :, 1] = np.arange(1, 7) * 5.0
    occupancy = np.zeros((1, 6, 200, 200), bool)
    row = round((30.0 + 49.75) / 0.5)
    occupancy[0, :, row, 99] = True  # 30 m ahead: reached at the sixth step only
    occupancy[0, :, 100, 110] = True  # 5 m to the left
    assert box_collisions(plans, occupancy)[0].tolist() == [False] * 5 + [True]


def test_masked_steps_do_not_dilute_the_mean():
    driven = np.zeros((2, 6, 2))
    predicted = np.ones((2, 6, 2)) * [3.0, 4.0]
    mask = np.array([[True] * 6, [True] * 2 + [False] * 4])
    empty = np.zeros((2, 6, 200, 200), bool)
    fair = score_plans(predicted, driven, mask, empty, ProtocolCard(l2="value_at_t"))
    assert fair.l2_m == (5.0, 5.0, 5.0)
    reference = score_plans(
        predicted, driven, mask, empty, ProtocolCard(l2="value_at_t", samples="all_samples")
    )
    assert reference.l2_m == (5.0, 2.5, 2.5)
    assert l2_per_step(predicted, driven).shape == (2, 6)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"predicted must be \[samples, 6, 2\], got \[2, 5, 2\]"):
        l2_per_step(np.zeros((2, 5, 2)), np.zeros((2, 6, 2)))
