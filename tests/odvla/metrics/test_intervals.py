"""Bootstrap over scenes and paired tests, against closed forms and simulation."""

import numpy as np
import pytest

from odvla.metrics.intervals import (
    bootstrap,
    bootstrap_steps,
    paired_by_sample,
    paired_test,
)


def scenes_of(groups, size):
    return [f"scene-{group}" for group in range(groups) for _ in range(size)]


def test_frames_of_a_scene_are_not_independent():
    """Frames that repeat their scene's value carry no more than one frame does."""
    rng = np.random.default_rng(0)
    level = rng.normal(5, 1, 60)
    counted = np.ones(60 * 40, bool)
    whole = bootstrap(np.repeat(level, 40), counted, scenes_of(60, 40))
    expected = 1.96 * level.std() / np.sqrt(60)
    assert whole.value == pytest.approx(level.mean())
    assert whole.high - whole.value == pytest.approx(expected, rel=0.1)
    naive = bootstrap(np.repeat(level, 40), counted, [str(i) for i in range(60 * 40)])
    assert naive.high - naive.low < 0.2 * (whole.high - whole.low)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 5) + rng.normal(0, 1, 200)
        found = bootstrap(values, np.ones(200, bool), scenes_of(40, 5))
        hits += found.low <= 0 <= found.high
    assert 0.88 < hits / 200 <= 1.0


def test_samples_that_do_not_count_do_not_count():
    values = np.array([1.0, 3.0, 99.0, 99.0])
    counted = np.array([True, True, False, False])
    assert bootstrap(values, counted, ["a", "a", "a", "b"]).value == 2.0
    with pytest.raises(ValueError, match="no sample counts"):
        bootstrap(values, np.zeros(4, bool), ["a"] * 4)
    with pytest.raises(ValueError, match="4 values, 4 flags and 3 scenes"):
        bootstrap(values, counted, ["a"] * 3)


def test_a_paired_test_sees_what_an_unpaired_one_would_not():
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.normal(5, 3, 30), 10)
    better = hard - 0.2 + rng.normal(0, 0.1, 300)
    found = paired_test(hard, better, np.ones(300, bool), scenes_of(30, 10))
    assert found.difference.high < 0
    assert found.p_value < 0.001
    same = paired_test(hard, hard + rng.normal(0, 1, 300), np.ones(300, bool), scenes_of(30, 10))
    assert same.p_value > 0.05


def test_few_scenes_are_tested_exactly():
    # All differences positive in 3 scenes: 2 of the 8 patterns of signs are as extreme.
    found = paired_test(np.zeros(3), np.array([1.0, 2.0, 3.0]), np.ones(3, bool), ["a", "b", "c"])
    assert found.p_value == 2 / 8
    nothing = paired_test(np.zeros(3), np.zeros(3), np.ones(3, bool), ["a", "b", "c"])
    assert nothing.p_value == 1.0


def test_an_interval_is_of_the_number_that_is_printed():
    """Later steps are recorded for fewer samples, and off by more: means of means are less."""
    generator = np.random.default_rng(0)
    scenes = [f"scene {number // 10}" for number in range(300)]
    values = np.arange(1.0, 7.0) ** 2 + generator.normal(0, 0.1, (300, 6))
    counted = np.arange(6)[None] < np.tile([6, 6, 6, 6, 5, 4, 3, 2, 1, 0], 30)[:, None]
    steps = np.array([values[counted[:, step], step].mean() for step in range(6)])
    found = bootstrap_steps(values, counted, scenes, lambda means: means[..., [1, 3, 5]].mean(-1))
    assert found.value == pytest.approx(steps[[1, 3, 5]].mean())
    assert found.low <= found.value <= found.high
    # The same weights in a slow loop.
    weights = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 2000)
    slow = []
    for weight in weights[:200]:
        rows = np.repeat(np.arange(300), np.repeat(weight, 10))
        means = [values[rows][counted[rows][:, step], step].mean() for step in (1, 3, 5)]
        slow.append(np.mean(means))
    again = bootstrap_steps(values, counted, scenes, lambda means: means[..., 5])
    assert again.low < again.value < again.high
    assert abs(np.quantile(slow, 0.025) - found.low) < 0.01
    with pytest.raises(ValueError, match="no step counts"):
        bootstrap_steps(values, np.zeros_like(counted), scenes, lambda means: means[..., 5])


def test_a_step_that_nothing_counts_at_is_unknown():
    values, scenes = np.tile(np.arange(1.0, 7.0), (4, 1)), ["a", "a", "b", "b"]
    counted = np.array([[True, True, False, False, False, False]] * 3 + [[True] * 3 + [False] * 3])
    found = bootstrap_steps(values, counted, scenes, lambda m: np.nanmean(m[..., :4], -1))
    assert found.value == 2.0
    assert (found.low, found.high) == (1.5, 2.0)  # without scene b the third step is lost
    never = bootstrap_steps(values, counted, scenes, lambda means: means[..., 5])
    assert np.isnan([never.value, never.low, never.high]).all()
    sometimes = bootstrap_steps(values, counted, scenes, lambda means: means[..., 2])
    assert (sometimes.value, sometimes.low, sometimes.high) == (3.0, 3.0, 3.0)


def test_planners_are_paired_on_the_samples_that_both_have():
    first = {"a": 1.0, "b": 2.0, "c": 4.0, "only here": 9.0}
    second = {"only there": 9.0, "c": 3.0, "b": 2.5, "a": 0.0}
    scene_of = {"a": "s", "b": "s", "c": "t", "only here": "u"}
    found = paired_by_sample(first, second, scene_of)
    expected = paired_test(
        np.array([1.0, 2.0, 4.0]), np.array([0.0, 2.5, 3.0]), np.ones(3, bool), ["s", "s", "t"]
    )
    assert found == expected
    assert found.difference.value == pytest.approx(-0.5)
    assert paired_by_sample(first, {"d": 1.0}, scene_of) is None
