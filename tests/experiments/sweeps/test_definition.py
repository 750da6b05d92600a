"""What a sweep declares, and what it must not."""

from dataclasses import replace

import pytest

from experiments.sweeps.definition import Axis, Sweep, base_of, points_of, settings
from experiments.tiny import smoke
from odvla.errors import UserError

STEPS = settings("stages.planning.steps", 3, 2)


def points(*axes, seeds=(0,), base=smoke):
    sweep = Sweep("s", base, axes, seeds)
    return points_of(sweep, base_of(sweep))


def test_points_are_all_combinations_and_the_base_stands_first():
    widths = settings("model.encoder.dim", 16, 24)
    found = points(STEPS, widths, seeds=(0, 7))
    assert len(found) == len({point.id for point in found}) == 8
    assert found[0].labels == ("3", "16")
    assert [p.config.seed for p in found[:2]] == [0, 7]
    assert found[0].config == replace(smoke(), name=found[0].config.name)
    last = found[-1].config
    assert (last.stages.planning.steps, last.model.encoder.dim, last.seed) == (2, 24, 7)


def test_an_id_hangs_on_what_is_computed_and_on_nothing_else():
    base = smoke()
    again = replace(base, name="other", data=replace(base.data, num_workers=1))
    assert points(STEPS)[1].id == points(STEPS, base=again)[1].id
    changed = replace(base, seed=base.seed, data=replace(base.data, eval_scenes=1))
    assert points(STEPS)[1].id != points(STEPS, base=changed)[1].id


def test_a_value_may_be_a_function():
    def narrow(config):
        return replace(config, model=replace(config.model, object_match_m=1.0))

    found = points(Axis("match", {"wide": (), "narrow": narrow}))
    assert [p.config.model.object_match_m for p in found] == [50.0, 1.0]


@pytest.mark.parametrize(
    ("axes", "seeds", "message"),
    [
        ((settings("stages.planing.steps", 1),), (0,), "did you mean 'planning'"),
        ((settings("stages.planning.steps", "many"),), (0,), "must be a whole number"),
        ((STEPS, Axis("b", {"x": ("stages.planning.steps=1",)})), (0,), "both change"),
        ((STEPS, STEPS), (0,), "two axes of one name"),
        ((settings("seed", 1, 2),), (0,), "list seeds in `seeds`"),
        ((settings("stages.planning.steps", 3, "3 "),), (0,), "are the same experiment"),
        ((Axis("none", {"no": lambda config: None}),), (0,), "not an ExperimentConfig"),
        ((STEPS,), (1, 1), "each of them once"),
        ((), (0,), "has no axes"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(axes, seeds, message):
    with pytest.raises(UserError, match=message) as caught:
        points(*axes, seeds=seeds)
    assert "\n" not in str(caught.value)
