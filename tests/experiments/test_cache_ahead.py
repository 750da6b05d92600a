"""The verb `cache` fills what the stage then learns from; the switch retrains nothing."""

import json
from dataclasses import replace

import pytest

from experiments.cache_ahead import cache_ahead, caching_stages
from experiments.cli import main
from experiments.handoff import CARD
from experiments.pipeline import open_pipeline
from experiments.stage_run import FEATURES
from experiments.tiny import smoke, tiny
from odvla.errors import UserError

SIZES = (
    "town=null",
    "data.image_size=[64,36]",
    "data.train_scenes=1",
    "data.interaction.eval_frames_stride=10",
    "stages.perception.steps=1",
    "stages.interaction.steps=3",
    "pictures=0",
)


def loss_of(runs, name):
    return json.loads((runs / name / "interaction" / CARD).read_text())["metrics"]


@pytest.fixture(scope="module")
def arguments(town_root):
    version = next(town_root.glob("v1.0-*")).name
    run = "run=[perception,interaction]"
    return ["smoke", "--data", str(town_root), f"data.version={version}", run, *SIZES]


def test_a_cache_is_made_ahead_and_learned_from(arguments, town_root, tmp_path, capsys):
    runs = tmp_path / "runs"
    places = [*arguments, "--runs", str(runs)]
    assert main(["cache", *places]) == 2
    assert "is not finished; fit that stage first" in " ".join(capsys.readouterr().err.split())
    assert main(["fit", *places]) == 0
    without = loss_of(runs, "smoke")
    capsys.readouterr()
    assert main(["cache", *places, "--stage", "interaction"]) == 0
    said = capsys.readouterr().out
    (folder,) = (runs / FEATURES).iterdir()
    assert str(folder) in said
    assert " key-frames, " in said
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    # Another name, the same stages: everything is trained again, this time from the cache.
    on = ["name=cached", "stages.interaction.feature_cache=true"]
    assert main(["fit", *places, *on]) == 0
    assert loss_of(runs, "cached") == without
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == shards
    assert main(["cache", *places, "--stage", "perception"]) == 2
    assert "cannot learn from a cache, only interaction" in capsys.readouterr().err


def test_the_switch_is_no_other_experiment():
    base = tiny()
    stage = replace(base.stages.alignment, feature_cache=True)
    cached = replace(base, stages=replace(base.stages, alignment=stage))
    assert cached.stage_hash("alignment") == base.stage_hash("alignment")
    assert caching_stages(base) == ["alignment", "instruction", "interaction", "planning"]


def test_a_stage_that_trains_its_encoder_is_refused(town_root, tmp_path):
    base = smoke()
    planning = replace(base.stages.planning, freeze=type(base.stages.planning)().freeze)
    config = replace(
        base,
        town=None,
        run=("planning",),
        data=replace(
            base.data,
            root=str(town_root),
            version=next(town_root.glob("v1.0-*")).name,
            image_size=(64, 36),
        ),
        stages=replace(base.stages, planning=planning),
    )
    pipeline = open_pipeline(config, tmp_path, progress=False)
    with pytest.raises(UserError, match=r"stages\.planning\.feature_cache needs frozen"):
        cache_ahead(pipeline)
