"""MLflow, on its local default store."""

import json
import time

import pytest
import torch
from mlflow.tracking import MlflowClient

from experiments.tracking import EXPERIMENT, Tracker
from experiments.tracking_store import local_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_parent_run_an_experiment_and_a_child_a_stage(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = {f"a.b{i}": i for i in range(120)} | {"long": "x" * 9000}
    tracker = Tracker(store / "e", store, "e", active=True)
    tracker.start(config, {"seed": 3})
    logger = tracker.stage("planning", False, config, {"parent_card": "abc"})
    for step in range(250):
        logger.log_metrics({"train/loss": 1 / (step + 1), "epoch": 0}, step)
    logger.finalize("success")
    tracker.log_numbers("planning", {"l2 (m)": [1, 2.5], "card": {"name": "x", "ok": True}})
    (store / "table.md").write_text("hello")
    tracker.log_files("", store / "table.md")
    tracker.close("planning")
    tracker.close("", RuntimeError())

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    child, parent = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    if child.info.run_name == "e":
        child, parent = parent, child
    assert (parent.info.status, child.info.status) == ("FAILED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["parent_card"] == "abc"
    assert len(parent.data.params) == 121
    curve = client.get_metric_history(child.info.run_id, "train/loss")
    assert sorted(m.step for m in curve) == list(range(250))
    assert child.data.metrics["l2 _m_/1"] == 2.5
    assert "card/ok" not in child.data.metrics
    # Artifacts lie beside the store, not in the working directory.
    assert (store / "mlartifacts" / parent.info.run_id / "artifacts" / "table.md").is_file()


def test_a_slow_run_is_seen_while_it_goes_on(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    now = [0.0]
    monkeypatch.setattr("experiments.tracking.time.monotonic", lambda: now[0])
    tracker = Tracker(store / "slow", store, "slow", active=True)
    tracker.start({}, {})
    logger = tracker.stage("perception", False, {}, {})
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    for seconds, seen in ((10.0, 0), (31.0, 2), (40.0, 2), (62.0, 4)):
        now[0] = seconds
        logger.log_metrics({"train/loss": 1.0}, int(seconds))
        assert len(client.get_metric_history(logger.version, "train/loss")) == seen


def test_an_interrupted_experiment_goes_on_in_its_runs(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ids = []
    for resumed in (False, True, False):
        tracker = Tracker(store / "f", store, "f", active=True)
        tracker.start({}, {})
        ids.append(tracker.stage("alignment", resumed, {}, {}).version)
    assert ids[0] == ids[1] != ids[2]
    parents = {json.loads((store / "f" / "mlflow.json").read_text())["runs"][""]}
    assert len(parents) == 1


def samples(client, run_id):
    """Steps of each of a run's metrics of the machine."""
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("system/")]
    return {name: [m.step for m in client.get_metric_history(run_id, name)] for name in names}


def test_the_machine_is_watched_while_a_stage_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    client, seen = None, []
    for resumed in (False, True):
        tracker = Tracker(tmp_path / "e", tmp_path, "e", active=True)
        tracker.start({}, {})
        run = tracker.stage("planning", resumed, {}, {}).version
        client = MlflowClient(tracker.uri)
        until = time.monotonic() + 30
        before = len(seen)
        while len(seen) < before + 3 and time.monotonic() < until:
            time.sleep(0.1)
            seen = samples(client, run).get("system/cpu_utilization_percentage", [])
        tracker.close("planning")
        closed = samples(client, run)
        time.sleep(0.6)
        assert samples(client, run) == closed  # nothing after its end
    names = {name.removeprefix("system/") for name in closed}
    assert {"system_memory_usage_megabytes", "disk_available_megabytes"} <= names
    steps = closed["system/cpu_utilization_percentage"]
    assert len(steps) >= 6
    assert sorted(set(steps)) == sorted(steps)  # a resumed stage goes on counting
    assert samples(client, tracker.run_id) == {}


def test_the_machine_is_left_alone_where_mlflow_is_told_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    tracker = Tracker(tmp_path / "e", tmp_path, "e", active=True)
    tracker.start({}, {})
    run = tracker.stage("planning", False, {}, {}).version
    time.sleep(0.5)
    tracker.close("planning")
    assert samples(MlflowClient(tracker.uri), run) == {}


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "e", tmp_path, "e", active=False)
    tracker.start({}, {})
    logger = tracker.stage("planning", False, {}, {})
    logger.log_metrics({"x": 1.0}, 0)
    logger.finalize("success")
    tracker.log_numbers("", {"x": 1})
    tracker.close("")
    assert not list(tmp_path.iterdir())


def test_another_store_is_respected(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker(tmp_path / "runs" / "e", tmp_path / "runs", "e", active=True)
    tracker.start({}, {})
    assert (tmp_path / "elsewhere.db").is_file()
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def begin_together(rank, store):
    torch.distributed.barrier()
    Tracker(store / f"e{rank}", store, "e", active=True)


def test_experiments_that_begin_at_once_share_a_new_store(tmp_path, in_processes):
    assert in_processes(3, begin_together, tmp_path) == [0, 0, 0]
    client = MlflowClient(local_store(tmp_path))
    assert [e.name for e in client.search_experiments()].count(EXPERIMENT) == 1
