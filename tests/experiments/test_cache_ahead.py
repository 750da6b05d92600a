"""The verb `cache` fills what the stage then learns from; the switch retrains nothing."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

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


def tokens_in(runs):
    """Every tensor of the one cache, by name; a name that lies in two files is an error."""
    (folder,) = (runs / FEATURES).iterdir()
    found = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def as_torchrun_starts_it(rank, arguments, told):
    os.environ |= {"TORCHELASTIC_RUN_ID": "a", "RANK": str(rank), "WORLD_SIZE": "2"}
    rank_zero_only.rank = rank  # as Lightning finds it in the environment when it is imported
    with (told / str(rank)).open("w") as out, redirect_stdout(out):
        assert main(arguments) == 0


def test_processes_of_torchrun_share_out_what_one_makes(arguments, tmp_path, in_processes):
    rest = [argument for argument in arguments if not argument.startswith("run=")]
    places = [*rest, "run=[alignment]", "data.train_scenes=2", "data.alignment.eval_batch_size=1"]
    two = [*("cache", *places), *("--runs", str(tmp_path / "two"))]
    assert in_processes(2, as_torchrun_starts_it, two, tmp_path) == [0, 0]
    said = [(tmp_path / rank).read_text() for rank in "01"]
    assert [text.count(" MB, in ") for text in said] == [1, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits depend on it
    assert main(["cache", *places, "--runs", str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    one, two = tokens_in(tmp_path / "one"), tokens_in(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
