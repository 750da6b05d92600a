"""A sweep on a generated town: shared stages, resuming, failures, and every launcher."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.cli import main
from experiments.handoff import CARD, card_sha256
from experiments.pipeline import open_pipeline
from experiments.stage_run import FEATURES
from experiments.sweeps import work
from experiments.sweeps.graph import FAILED, plan_sweep
from experiments.sweeps.launchers.slurm import write_script
from experiments.sweeps.shared_stages import take_over
from experiments.sweeps.work import STATUS, run_task
from odvla.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
DECLARED = '''
from dataclasses import replace

from experiments.sweeps.definition import Axis, Sweep, settings
from experiments.tiny import smoke


def base():
    config = smoke()
    stages = config.stages
    return replace(
        config,
        town=None,
        pictures=0,
        log_model=False,
        run=("perception", "planning"),
        data=replace(
            config.data, version="v1.0-trainval", image_size=(64, 36), train_scenes=1
        ),
        stages=replace(
            stages,
            perception=replace(stages.perception, steps=2, checkpoint_every=1),
            planning=replace(
                stages.planning, steps=2, checkpoint_every=1, feature_cache=True, ablations=()
            ),
        ),
    )


def planning_steps() -> Sweep:
    """Steps of stage 3."""
    return Sweep("planning_steps", base, (settings("stages.planning.steps", 2, 3),))


def tongues() -> Sweep:
    """Points that see alike and speak differently: another prompt and language model."""
    narrow = ("model.language.hidden=16", "model.language.heads=2", "dialect.without=[command]")
    return Sweep("tongues", base, (Axis("language", {"one": (), "other": narrow}),))


def breaks() -> Sweep:
    """One of the points cannot read its data."""
    broken = {"whole": (), "broken": ("stages.planning.max_new_tokens=5000",)}
    return Sweep("breaks", base, (Axis("context", broken),))


def slow() -> Sweep:
    """Long enough to be interrupted."""
    seeing = replace(base(), run=("perception",))
    return Sweep("slow", seeing, (settings("stages.perception.steps", 12),))
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory, town_root):
    """A folder of runs with a finished sweep, planning_steps."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "my_sweeps.py").write_text(DECLARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert sweep("planning_steps", town_root) == 0
        sys.modules.pop("my_sweeps", None)
    return folder / "runs"


@pytest.fixture
def declared(tmp_path, monkeypatch):
    (tmp_path / "my_sweeps.py").write_text(DECLARED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    yield tmp_path
    sys.modules.pop("my_sweeps", None)


def sweep(name, town_root, *more):
    return main(["sweep", f"my_sweeps:{name}", "--data", str(town_root), "--runs", "runs", *more])


def cards(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"stages/*/*/{CARD}")}


def test_what_points_share_is_trained_once_and_a_rerun_does_nothing(declared, finished, town_root):
    shutil.copytree(finished, "runs")
    folder = declared / "runs" / "planning_steps"
    made = cards(folder)
    assert sorted(path.parent.name for path in made) == ["perception", "planning", "planning"]
    manifest = json.loads((folder / "sweep.json").read_text())
    for point in manifest["points"]:
        results = folder / "points" / point["id"]
        numbers = json.loads((results / "results.json").read_text())
        assert numbers["planning"]["planning"]["OpenDriveVLA"]["samples"] > 0
        assert (results / "perception" / CARD).is_file()  # `predict` and --from find it here
    assert sweep("planning_steps", town_root) == 0
    assert cards(folder) == made


def test_points_that_differ_in_language_alone_share_perception(declared, town_root):
    assert sweep("tongues", town_root) == 0
    folder = declared / "runs" / "tongues"
    made = sorted(path.parent.name for path in cards(folder))
    assert made == ["perception", "planning", "planning"]
    assert len(list(folder.glob("vocabulary-*"))) == 2
    manifest = json.loads((folder / "sweep.json").read_text())
    for point in manifest["points"]:
        folder_of_point = folder / "points" / point["id"]
        card = json.loads((folder_of_point / "planning" / CARD).read_text())
        assert card["parent_stage"] == "perception"
        assert (folder_of_point / "results.json").is_file()


def test_what_another_sweep_has_trained_is_taken_over(declared, finished, town_root, capsys):
    shutil.copytree(finished, "runs")
    assert sweep("tongues", town_root) == 0
    # Both have the point of two steps of planning; the one of another language is tongues' own.
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept ")]
    assert [line.split()[1].split("-")[0] for line in kept] == ["perception", "planning"]
    one, other = (declared / "runs" / name for name in ("planning_steps", "tongues"))
    for line in kept:
        task, stage = line.split()[1], line.split()[1].split("-")[0]
        mine, theirs = (runs / "stages" / task / stage for runs in (other, one))
        assert (mine / "vla.safetensors").samefile(theirs / "vla.safetensors")
        assert card_sha256(mine) == card_sha256(theirs)
        assert not (mine / CARD).samefile(theirs / CARD)
    assert len(list(other.glob("points/*/results.json"))) == 2
    assert len(list((declared / "runs" / FEATURES).iterdir())) == 1  # of both, too
    assert not list(declared.glob(f"runs/*/**/{FEATURES}"))


def test_a_stage_is_not_taken_over_damaged_or_from_another_parent(declared, finished, town_root):
    from experiments.find import find_sweep

    shutil.copytree(finished, "runs")
    name, runs = "my_sweeps:tongues", Path("runs")
    plan = plan_sweep(find_sweep(name), name, runs, data_root=str(town_root))
    perception, planning = plan.stage_tasks(plan.points[0])
    theirs = runs / "planning_steps" / "stages" / perception.id / "perception"
    weights = (theirs / "vla.safetensors").read_bytes()

    (theirs / "vla.safetensors").write_bytes(weights[:-1])
    assert take_over(plan, runs) == {}  # and planning not without what it was trained from

    (theirs / "vla.safetensors").write_bytes(weights)
    run_task(plan, runs, perception)  # trained here: the same weights, on another occasion
    card = plan.stage_folder(perception) / CARD
    card.write_text(json.dumps(json.loads(card.read_text()) | {"seconds": -1.0}))
    assert take_over(plan, runs) == {}
    assert not plan.is_done(planning)


def test_what_an_experiment_has_trained_is_taken_over(declared, town_root):
    from experiments.find import find_sweep

    runs, name = Path("runs"), "my_sweeps:tongues"
    plan = plan_sweep(find_sweep(name), name, runs, data_root=str(town_root))
    mine, other = plan.points
    # As `fit` has it: the point's settings under a name of its own.
    pipeline = open_pipeline(replace(mine.config, name="by_hand"), runs, progress=False)
    pipeline.fit()
    perception, planning = plan.stage_tasks(mine)
    taken = take_over(plan, runs)
    assert taken == {
        perception.id: runs / "by_hand" / "perception",
        planning.id: runs / "by_hand" / "planning",
    }
    assert plan.is_done(perception)
    assert plan.is_done(planning)
    assert not plan.is_done(plan.stage_tasks(other)[-1])  # it speaks otherwise

    # What the card says is believed only as far as it goes.
    for key in ("stage_hash", "data_fingerprint", "tokenizer_sha256"):
        shutil.rmtree(plan.folder / "stages")
        card = runs / "by_hand" / "planning" / CARD
        text = card.read_text()
        card.write_text(json.dumps(json.loads(text) | {key: "0" * 64}))
        assert list(take_over(plan, runs)) == [perception.id]
        card.write_text(text)


def test_points_that_start_from_other_weights_share_no_stage(declared, town_root):
    from experiments.find import find_sweep
    from experiments.sweeps.definition import Axis

    for index in range(2):
        save_file({"encoder.x": torch.full((2,), float(index))}, f"{index}.safetensors")
    starts = {
        "nothing": (),
        "0": ("init.weights=0.safetensors",),
        "1": ("init.weights=1.safetensors",),
    }
    both = replace(find_sweep("my_sweeps:tongues"), axes=(Axis("start", starts),))
    plan = plan_sweep(both, "x", Path("runs"), data_root=str(town_root))
    chains = [[task.id for task in plan.stage_tasks(point)] for point in plan.points]
    assert len({task for chain in chains for task in chain}) == 6


def test_points_are_the_same_wherever_their_data_lies(declared, town_root, tmp_path):
    from experiments.find import find_sweep
    from experiments.sweeps.definition import Axis

    (tmp_path / "there").symlink_to(town_root)
    roots = Axis("root", {"usual": (), "own": (f"data.root={town_root}",)})
    both = replace(find_sweep("my_sweeps:planning_steps"), axes=(roots,))
    plans = [
        plan_sweep(both, "x", Path("runs"), data_root=root) for root in ("there", str(town_root))
    ]
    assert plans[0].tasks[-1].id == plans[1].tasks[-1].id
    assert [point.id for point in plans[0].points] == [point.id for point in plans[1].points]
    assert [point.config.data.root for point in plans[0].points] == ["there", str(town_root)]


def test_a_dry_run_makes_nothing_and_names_tasks_as_the_sweep_does(declared, town_root, capsys):
    from experiments.find import find_sweep

    assert sweep("planning_steps", town_root, "--dry-run") == 0
    assert "does not hold the data yet" not in capsys.readouterr().out
    assert main(["sweep", "stages_table", "--data", "nowhere", "--dry-run"]) == 0
    assert re.search(r"nowhere/\S+ does not hold the data yet", capsys.readouterr().out)
    assert {path.name for path in declared.iterdir()} <= {"my_sweeps.py", "__pycache__"}
    name = "my_sweeps:planning_steps"
    dry, real = (
        plan_sweep(find_sweep(name), name, Path("runs"), data_root=str(town_root), dry_run=dry)
        for dry in (True, False)
    )
    assert (dry.tasks, dry.vocabularies, dry.missing) == (real.tasks, real.vocabularies, ())


def test_another_base_is_refused_in_the_same_folder(declared, town_root, capsys):
    assert sweep("planning_steps", town_root, "--dry-run") == 0
    (declared / "runs" / "planning_steps").mkdir(parents=True, exist_ok=True)
    from experiments.find import find_sweep
    from experiments.sweeps.definition import base_of
    from experiments.sweeps.graph import write_manifest

    declaration = find_sweep("my_sweeps:planning_steps")
    plan = plan_sweep(
        declaration, "my_sweeps:planning_steps", Path("runs"), data_root=str(town_root)
    )
    write_manifest(plan, base_of(declaration))
    assert sweep("planning_steps", town_root, "--set", "data.eval_scenes=1") == 2
    said = capsys.readouterr().err
    assert "data.eval_scenes was 0 and is now 1" in said
    # How a result is computed may change.
    assert sweep("planning_steps", town_root, "--set", "data.num_workers=1", "--dry-run") == 0


def test_a_stage_that_cannot_keep_its_tokens_is_named_before_anything_runs(
    declared, town_root, capsys
):
    sees = "stages.planning.freeze.train=[queries.*,projectors.*,language.*]"
    assert sweep("planning_steps", town_root, "--set", sees) == 2
    said = capsys.readouterr().err
    assert "point '2, seed 0': stages.planning.remember_tokens needs frozen encoder" in said
    assert not list(declared.glob("runs/*/stages"))
    alone = ["fit", "my_sweeps:base", sees, "--data", str(town_root), "--runs", "runs"]
    assert main(alone) == 2
    assert "stages.planning.remember_tokens needs frozen" in capsys.readouterr().err
    assert not list(declared.glob(f"runs/**/{CARD}"))


def test_a_failed_point_is_recorded_and_the_others_go_on(
    declared, finished, town_root, capsys, monkeypatch
):
    shutil.copytree(finished, "runs")  # of which the whole point's stages are taken over
    # Workers are told where the data lies; points must not be others for that.
    monkeypatch.setenv("ODVLA_DATA", str(town_root))
    where = ["--runs", "runs", "--launcher", "processes", "--workers", "2"]
    assert main(["sweep", "my_sweeps:breaks", *where]) == 1
    folder = declared / "runs" / "breaks"
    broken = list(folder.glob(f"stages/*/{FAILED}"))
    assert len(broken) == 1
    assert "positions" in json.loads(broken[0].read_text())["error"]
    assert len(list(folder.glob("points/*/results.json"))) == 1
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143), RuntimeError("broken")])
def test_a_task_that_was_stopped_has_not_failed(stop, declared, town_root, monkeypatch):
    from experiments.find import find_sweep

    name = "my_sweeps:planning_steps"
    plan = plan_sweep(find_sweep(name), name, Path("runs"), data_root=str(town_root))
    task = next(task for task in plan.tasks if task.kind == "perception")

    def train(*_):
        raise stop

    monkeypatch.setattr(work, "_train", train)
    with pytest.raises(type(stop)):
        run_task(plan, declared / "runs", task)
    failed = isinstance(stop, RuntimeError)
    assert (plan.task_folder(task) / FAILED).is_file() == failed
    assert (plan.task_folder(task) / STATUS).is_file() != failed  # how far it came stays known


def kill_once_begun(folder, killed, over):
    """Kill the process that trains a stage as soon as it has made a step."""
    while not over.is_set():
        for path in folder.glob(f"stages/*/{STATUS}"):
            try:
                status = json.loads(path.read_text())
            except (OSError, json.JSONDecodeError):
                continue
            if status.get("step", 0) >= 1:
                os.kill(status["pid"], signal.SIGKILL)
                killed.append(status["pid"])
                return
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["processes", "ray"])
def test_a_killed_worker_costs_an_attempt_and_nothing_else(
    launcher, declared, town_root, monkeypatch
):
    if launcher == "ray":
        ray = pytest.importorskip("ray")
        monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []
    over = threading.Event()  # however long a busy machine takes
    folder = declared / "runs" / "slow"
    watcher = threading.Thread(target=kill_once_begun, args=(folder, killed, over), daemon=True)
    watcher.start()
    try:
        arguments = ["--launcher", launcher, "--retries", "1", "--seed", "5"]
        assert sweep("slow", town_root, *arguments) == 0
    finally:
        over.set()
        if launcher == "ray":
            ray.shutdown()
    watcher.join()
    assert killed
    assert len(list(folder.glob("points/*/results.json"))) == 1
    manifest = json.loads((folder / "sweep.json").read_text())
    assert [point["seed"] for point in manifest["points"]] == [5]


def test_the_slurm_script_submits_each_task_once_in_the_right_order(declared, town_root):
    from experiments.find import find_sweep

    plan = plan_sweep(
        find_sweep("my_sweeps:planning_steps"), "x", Path("runs"), data_root=str(town_root)
    )
    command = ["python", "-m", "experiments.cli", "sweep-task", "x"]
    resources = replace(plan.sweep.resources, cpus=4, gpus=1)
    script = write_script(plan, command, resources, ["--partition=gpu"])
    # A pretended sbatch that runs the array at once, as SLURM would, and notes its arguments.
    bin_folder = declared / "bin"
    bin_folder.mkdir()
    fake = bin_folder / "sbatch"
    fake.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >> {declared}/sbatch.log\n'
        "for last; do :; done\n"
        'count=$(echo "$@" | sed -E "s/.*--array=1-([0-9]+).*/\\1/")\n'
        'for n in $(seq "$count"); do SLURM_ARRAY_TASK_ID=$n bash "$last" >/dev/null; done\n'
        f"wc -l < {declared}/sbatch.log\n"
    )
    python = bin_folder / "python"
    python.write_text(f'#!/bin/bash\necho "${{@: -1}}" >> {declared}/tasks.log\n')
    for path in (fake, python):
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(script)], env=environment, check=True, capture_output=True)
    order = (declared / "tasks.log").read_text().split()
    assert sorted(order) == sorted(task.id for task in plan.tasks)
    for task in plan.tasks:
        assert all(order.index(before) < order.index(task.id) for before in task.after)
    lines = (declared / "sbatch.log").read_text().splitlines()
    assert "--dependency" not in lines[0]
    assert "--dependency=afterany:1" in lines[1]
    assert all("--cpus-per-task=4" in line and "--gpus-per-task=1" in line for line in lines)
    assert all("--partition=gpu" in line for line in lines)


@pytest.mark.parametrize(
    ("launcher", "missing", "message"),
    [("slurm", None, "needs sbatch"), ("ray", "ray", "pip install 'odvla[ray]'")],
)
def test_a_missing_engine_is_named_before_anything_runs(
    launcher, missing, message, declared, town_root, capsys, monkeypatch
):
    if missing:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert sweep("planning_steps", town_root, "--launcher", launcher) == 2
    assert message in capsys.readouterr().err
    assert not (declared / "runs").exists()


def test_a_task_that_is_not_there_is_named(declared, town_root):
    from experiments.find import find_sweep

    plan = plan_sweep(
        find_sweep("my_sweeps:planning_steps"), "x", Path("runs"), data_root=str(town_root)
    )
    with pytest.raises(UserError, match="has no task 'perception-0'"):
        run_task(plan, Path("runs"), plan.task("perception-0"))
