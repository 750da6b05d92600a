"""The pipeline on a generated town: stages in order, skipped, continued, handed over, tracked."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import mlflow
import pandas
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from experiments.pipeline import open_pipeline
from experiments.predict import predict
from experiments.report_tables import other_tables
from experiments.result_files import read_results
from experiments.stage_run import StageRun
from experiments.tiny import smoke
from experiments.tracking import EXPERIMENT
from experiments.tracking_store import store_uri
from odvla.errors import UserError
from odvla.weights import file_sha256

STAGES = ("perception", "interaction")


@pytest.fixture(scope="module")
def config(town_root):
    """Two stages of two steps; every query is a token, so that every agent finds one."""
    base = smoke()
    scene, agents, map_queries = base.model.queries
    return replace(
        base,
        town=None,
        run=STAGES,
        model=replace(
            base.model,
            queries=(scene, replace(agents, score_threshold=0.0), map_queries),
            object_match_m=1e6,
        ),
        data=replace(
            base.data,
            root=str(town_root),
            version=next(town_root.glob("v1.0-*")).name,
            image_size=(64, 36),
            train_scenes=1,
            interaction=replace(base.data.interaction, eval_frames_stride=10),
        ),
        stages=replace(
            base.stages,
            perception=replace(base.stages.perception, steps=2, checkpoint_every=1),
            interaction=replace(base.stages.interaction, steps=2, checkpoint_every=1),
        ),
    )


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("runs")
    pipeline = open_pipeline(config, folder, progress=False)
    pipeline.fit()
    pipeline.report(Console(quiet=True))
    return folder


def card(folder):
    return json.loads((folder / "card.json").read_text())


def trained(monkeypatch):
    """Names of the stages that are run from now on."""
    names = []
    plain = StageRun.run

    def run(self):
        names.append(self.stage)
        plain(self)

    monkeypatch.setattr(StageRun, "run", run)
    return names


def fit(config, runs, parent=None):
    pipeline = open_pipeline(config, runs, parent, progress=False)
    pipeline.fit()
    return pipeline


def test_a_run_leaves_cards_predictions_and_tables(config, runs):
    folder = runs / "smoke"
    first, second = (card(folder / stage) for stage in STAGES)
    assert second["parent_stage"] == "perception"
    assert first["parent_card_sha256"] is None
    assert set(first["trained"]) == {"backbone", "encoder", "queries"}
    assert set(second["trained"]) == {"projectors", "language"}
    assert second["frozen_before"] == second["frozen_after"] != {}
    assert {"train/loss", "val/loss"} <= set(second["metrics"])
    assert second["config"]["seed"] == config.seed
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(STAGES)
    assert "Agent forecasts" in (folder / "table.md").read_text()
    beside = {table.title: table for table in other_tables(read_results([folder]))}
    assert list(beside) == ["Detection", "Map, IoU (%)", "Agent forecasts"]
    forecasts = results["interaction"]["forecasts"]["OpenDriveVLA"]
    (name, cells), *_ = beside["Agent forecasts"].rows
    assert name == "smoke: OpenDriveVLA, all"
    assert cells[0] == forecasts["all"]["min_ade_m"]
    assert len(list((folder / "pictures").iterdir())) == 1
    assert not list(folder.rglob("*.ckpt"))
    assert not list(folder.rglob("*.partial*"))
    assert (runs / "mlflow.db").is_file()


def test_the_last_stage_is_a_model_of_mlflow(config, runs, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading puts the model's code there
    client = MlflowClient(tracking_uri=store_uri(runs))
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    (logged,) = client.search_logged_models([experiment.experiment_id])
    run = client.get_run(logged.source_run_id)
    assert run.info.run_name == "smoke"
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert (logged.name, logged.status) == ("interaction", "READY")
    assert logged.tags["card"] == file_sha256(runs / "smoke" / "interaction" / "card.json")

    model = mlflow.pyfunc.load_model(logged.artifact_location)
    assert model.metadata.signature.inputs.required_input_names() == ["sample_token"]
    records = (runs / "smoke" / "perception" / "predictions.jsonl").read_text().splitlines()
    tokens = [json.loads(records[index])["sample_token"] for index in (3, -1)]
    plans = model.predict(pandas.DataFrame({"sample_token": tokens}))
    answer = model.predict(
        pandas.DataFrame({"sample_token": tokens[:1], "question": ["What is ahead?"]})
    )
    picture = runs / "p.png"
    for token, waypoints in zip(tokens, plans["waypoints"], strict=True):
        said = predict(config, runs / "smoke", token, picture=picture)
        assert waypoints == said.waypoints
    said = predict(config, runs / "smoke", tokens[0], "What is ahead?", picture)
    assert answer["text"].tolist() == [said.text]
    assert answer["waypoints"].tolist() == [None]
    with pytest.raises(UserError, match="'nothing' is not in"):
        model.predict(pandas.DataFrame({"sample_token": ["nothing"]}))
    with pytest.raises(UserError, match="the data root elsewhere does not exist"):
        mlflow.pyfunc.load_model(logged.artifact_location, model_config={"data_root": "elsewhere"})
    # Evaluated again with the same weights, it is the same model.
    pipeline = open_pipeline(config, runs, progress=False)
    (runs / "smoke" / "evaluated.json").unlink()
    pipeline.report(Console(quiet=True))
    assert len(client.search_logged_models([experiment.experiment_id])) == 1


def test_a_finished_run_is_not_run_again(config, runs, monkeypatch):
    names = trained(monkeypatch)
    before = (runs / "smoke" / "table.md").stat().st_mtime_ns
    console = Console(record=True, quiet=True)
    fit(config, runs).report(console)
    assert names == []
    assert (runs / "smoke" / "table.md").stat().st_mtime_ns == before
    # A setting of the second stage concerns the second stage alone.
    later = replace(config.stages, interaction=replace(config.stages.interaction, steps=1))
    fit(replace(config, stages=later), runs)
    assert names == ["interaction"]
    fit(config, runs)
    assert names == ["interaction"] * 2


def test_a_killed_run_ends_the_same(config, runs, tmp_path, monkeypatch):
    plain = StageRun.evaluate

    def killed(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(StageRun, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path)
    assert (tmp_path / "smoke" / "perception" / "last.ckpt").is_file()
    assert not (tmp_path / "smoke" / "perception" / "card.json").exists()
    monkeypatch.setattr(StageRun, "evaluate", plain)
    fit(config, tmp_path)
    for stage in STAGES:
        for name in ("vla.safetensors", "predictions.jsonl"):
            one, two = (root / "smoke" / stage / name for root in (runs, tmp_path))
            assert one.read_bytes() == two.read_bytes()


def test_a_run_starts_from_any_handoff(config, runs, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    parent = runs / "smoke" / "perception"
    fit(replace(config, name="branch"), tmp_path, parent)
    assert names == ["interaction"]
    branch = tmp_path / "branch" / "interaction"
    assert (branch / "vla.safetensors").read_bytes() == (
        runs / "smoke" / "interaction" / "vla.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="no stage of run"):
        open_pipeline(config, tmp_path, branch)
    weights = branch / "vla.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(UserError, match="SHA-256 differs"):
        predict(config, tmp_path / "branch", "any")


def test_what_started_from_a_handoff_is_tested_with_its_vocabulary(config, runs, tmp_path):
    # Its own settings would make a smaller one.
    tokenizer = replace(config.tokenizer, vocab_size=300)
    alone = replace(config, run=("interaction",), tokenizer=tokenizer)
    fit(alone, tmp_path, runs / "smoke" / "perception")
    path = tmp_path / "smoke" / "interaction" / "predictions.jsonl"
    before = path.read_bytes()
    path.unlink()
    open_pipeline(alone, tmp_path, progress=False, trained=True).test()
    assert path.read_bytes() == before


def test_test_predicts_again(config, runs):
    path = runs / "smoke" / "interaction" / "predictions.jsonl"
    before = path.read_bytes()
    path.unlink()
    open_pipeline(config, runs, progress=False).test()
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="no stage is finished"):
        open_pipeline(replace(config, name="new"), runs, progress=False).test()


def test_an_evaluation_is_tracked_where_the_store_of_its_training_is_not(config, runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "smoke", moved / "smoke")
    pipeline = open_pipeline(config, moved, progress=False)
    pipeline.test()
    pipeline.report(Console(quiet=True))
    client = MlflowClient(tracking_uri=store_uri(moved))
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert any("min_ade" in name for name in run.data.metrics)
    assert "table.md" in [found.path for found in client.list_artifacts(run.info.run_id)]


def test_what_was_predicted_or_scored_otherwise_is_evaluated_anew(config, runs, tmp_path):
    shutil.copytree(runs / "smoke", tmp_path / "smoke")
    pipeline = open_pipeline(config, tmp_path, progress=False)
    table = tmp_path / "smoke" / "interaction" / "table.md"
    pipeline.report(Console(quiet=True), stage="interaction")
    pipeline.report(Console(quiet=True), stage="interaction")
    first, written = table.read_text(), table.stat().st_mtime_ns
    pipeline.test("interaction")
    pipeline.report(Console(quiet=True), stage="interaction")
    assert table.stat().st_mtime_ns > written
    assert table.read_text() == first
    # Other predictions by whatever way they came, and other data for the same ones.
    path = tmp_path / "smoke" / "interaction" / "predictions.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[: len(kept) // 2]))
    pipeline.report(Console(quiet=True), stage="interaction")
    assert table.read_text() != first
    written = table.stat().st_mtime_ns
    other = replace(config, data=replace(config.data, train_scenes=2))
    open_pipeline(other, tmp_path, progress=False).report(Console(quiet=True), stage="interaction")
    assert table.stat().st_mtime_ns > written


def test_other_images_than_were_learned_from_are_told(config, runs, tmp_path, caplog):
    token = json.loads((runs / "smoke/perception/predictions.jsonl").read_text().splitlines()[0])
    wide = replace(config, data=replace(config.data, image_size=(96, 54)))
    with caplog.at_level("WARNING"):
        predict(config, runs / "smoke", token["sample_token"], picture=tmp_path / "p.png")
        assert "another config" not in caplog.text
        predict(wide, runs / "smoke", token["sample_token"], picture=tmp_path / "p.png")
    assert "another config: data.image_size [64, 36] -> [96, 54]" in caplog.text


def test_a_sample_is_planned_and_asked(config, runs, tmp_path):
    records = (runs / "smoke" / "perception" / "predictions.jsonl").read_text().splitlines()
    token = json.loads(records[-1])["sample_token"]
    picture = tmp_path / "p.png"
    plan = predict(config, runs / "smoke", token, picture=picture)
    assert plan.stage == "interaction"
    assert len(plan.waypoints) == 6  # constrained: readable without having learned to plan
    assert picture.stat().st_size > 1000
    answer = predict(config, runs / "smoke", token, "What is ahead?", picture)
    assert answer.waypoints is None
    with pytest.raises(UserError, match="'nothing' is not in"):
        predict(config, runs / "smoke", "nothing")


def test_a_folder_that_another_process_works_in_is_left_alone(config, tmp_path):
    config = replace(config, name="busy")
    folder = tmp_path / "busy"
    folder.mkdir()
    # The lock must have a name, or Python lets go of it at once.
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"another process is working in .*busy"):
            open_pipeline(config, tmp_path, progress=False)
        other.kill()
    open_pipeline(config, tmp_path, progress=False)  # it ended, however it ended
