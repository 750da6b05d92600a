"""The sweeps that come with the toolkit: every point fits, and what can be shared is."""

from dataclasses import replace

import pytest

from experiments.ablations import actions_table, encoders_table
from experiments.sweeps.definition import base_of, points_of
from experiments.sweeps.graph import plan_sweep
from experiments.sweeps.validation import validate

ONE_SEED = {"seeds": (0,)}


@pytest.mark.parametrize("sweep", [actions_table, encoders_table])
def test_every_point_fits(sweep, town_root, tmp_path):
    declared = replace(sweep(), **ONE_SEED)
    plan = plan_sweep(declared, declared.name, tmp_path, (), str(town_root), progress=False)
    validate(plan)
    assert len(plan.points) == len(declared.axes[0].values)


def test_points_that_differ_in_the_form_of_plans_share_all_that_comes_before(town_root, tmp_path):
    declared = replace(actions_table(), **ONE_SEED)
    plan = plan_sweep(declared, declared.name, tmp_path, (), str(town_root), progress=False)
    assert len(set(plan.vocabularies.values())) == 1
    chains = [[task.id for task in plan.stage_tasks(point)] for point in plan.points]
    assert len({tuple(chain[:-1]) for chain in chains}) == 1
    assert len({chain[-1] for chain in chains}) == len(chains) == 6


def test_a_form_of_plans_writes_within_its_own_range():
    declared = actions_table()
    points = points_of(replace(declared, **ONE_SEED), base_of(declared))
    settings = {point.labels[0]: point.config.stages.planning for point in points}
    assert settings["waypoints"].x_range_m is None
    assert settings["changes of offsets"].x_range_m == (-6.0, 6.0)
