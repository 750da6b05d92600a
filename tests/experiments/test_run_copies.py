"""A server that does not answer loses no run; its runs are pushed once it does."""

import socket
import subprocess
import sys
import time

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from experiments import logged_model
from experiments.cli import main
from experiments.run_copies import SOURCE, all_runs, push
from experiments.tracking import Tracker
from experiments.tracking_store import CONTINUES, MEANT_FOR, answers, local_store, shown
from experiments.verbs.runs import ui_command
from odvla.errors import UserError

STEPS = 1300  # more than a request takes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def absent():
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, absent):
    """An experiment that ran while its server was away, and one that was meant for the file."""
    store = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Tracker(store / "here", store, "here", active=True).start({}, {})
    patch.setenv("MLFLOW_TRACKING_URI", absent)
    tracker = Tracker(store / "e", store, "e", active=True)
    config = {f"a{number}": number for number in range(130)}
    tracker.start(config, {"seed": 3})
    logger = tracker.stage("planning", False, config, {"parent_card": "abcdef0123"})
    for step in range(STEPS):
        logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
    logger.finalize("success")
    (store / "table.md").write_text("hello")
    tracker.log_files("planning", store / "table.md")
    tracker.tag("planning", "card", "0123456789")
    tracker.close("planning")
    tracker.close("", RuntimeError())
    patch.undo()
    return store


def test_an_absent_server_means_the_local_store(runs, absent):
    assert not answers(absent)
    found = {run.info.run_name: run for run in all_runs(MlflowClient(local_store(runs)))}
    assert set(found) == {"here", "e", "e/planning"}
    assert found["e"].data.tags[MEANT_FOR] == absent
    assert MEANT_FOR not in found["here"].data.tags


def test_a_password_is_neither_told_nor_kept(tmp_path, absent, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", absent.replace("://", "://me:secret@"))
    Tracker(tmp_path / "e", tmp_path, "e", active=True).start({}, {})
    (run,) = all_runs(MlflowClient(local_store(tmp_path)))
    assert run.data.tags[MEANT_FOR] == absent
    assert "secret" not in caplog.text
    with pytest.raises(UserError) as refused:
        push(local_store(tmp_path), absent.replace("://", "://me:secret@"))
    assert "secret" not in str(refused.value)
    assert shown("sqlite:///a/b.db") == "sqlite:///a/b.db"


def test_an_absent_server_is_told_in_one_sentence(tmp_path, absent, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", absent)
    began = time.monotonic()
    Tracker(tmp_path / "e", tmp_path, "e", active=True)
    assert time.monotonic() - began < 15  # MLflow's own client tries for minutes
    (record,) = [r for r in caplog.records if r.name == "experiments.tracking"]
    assert f"runs push {absent}" in record.getMessage()


def test_runs_are_listed_with_their_lineage(runs, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["runs", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "e/planning" in line)
    for word in ("planning", "abcdef01", "01234567", "finished"):
        assert word in line
    assert main(["runs", "--runs", str(runs / "nowhere")]) == 2
    assert "there are no runs" in capsys.readouterr().err


def test_nothing_is_pushed_to_an_absent_server(runs, absent, capsys):
    assert main(["runs", "push", absent, "--runs", str(runs)]) == 2
    assert "does not answer; nothing was pushed" in capsys.readouterr().err


def test_the_pages_are_started_on_the_store():
    command = ui_command("sqlite:///x.db", 5001)
    assert command[1:4] == ["-m", "mlflow", "ui"]
    assert command[4:] == ["--backend-store-uri", "sqlite:///x.db", "--port", "5001"]
    with pytest.raises(UserError, match="between 1 and 65535"):
        ui_command("sqlite:///x.db", 0)


class Server:
    """An MLflow server on this machine, which may go away and come back."""

    def __init__(self, place):
        port = free_port()
        self.uri, self._place, self._process = f"http://127.0.0.1:{port}", place, None
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{place / 'server.db'}"]
        self._command = [*command, "--artifacts-destination", str(place / "artifacts")]

    def start(self):
        log = self._place / "log"
        with log.open("w") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out, cwd=self._place)
        until = time.monotonic() + 90
        while not answers(self.uri, 1.0):
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.3)

    def stop(self):
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def server(serving):
    return serving.uri


def test_runs_are_pushed_once_and_whole(runs, server):
    store = local_store(runs)
    done = push(store, server)
    assert len(done.copied) == 2  # not the run that was meant for the file
    here, there = MlflowClient(store), MlflowClient(server)
    mine = {run.info.run_name: run for run in all_runs(here)}
    copies = {run.info.run_name: run for run in all_runs(there)}
    assert set(copies) == {"e", "e/planning"}
    child, parent = copies["e/planning"], copies["e"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags[SOURCE] == mine["e/planning"].info.run_id
    assert child.data.tags["parent_card"] == "abcdef0123"
    for name, copy in copies.items():
        assert copy.data.params == mine[name].data.params
        assert copy.info.status == mine[name].info.status
        assert copy.info.start_time == mine[name].info.start_time
        assert copy.info.end_time == mine[name].info.end_time
    curves = [
        sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run, "train/loss"))
        for client, run in (
            (here, mine["e/planning"].info.run_id),
            (there, child.info.run_id),
        )
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == STEPS
    assert [file.path for file in there.list_artifacts(child.info.run_id)] == ["table.md"]

    again = push(store, server + "/")
    assert (again.copied, len(again.skipped)) == ({}, 2)
    # A copy that was interrupted is replaced, one whose note was lost is found again.
    here.delete_tag(mine["e"].info.run_id, "odvla.pushed")
    here.delete_tag(mine["e/planning"].info.run_id, "odvla.pushed")
    there.delete_tag(child.info.run_id, "odvla.pushed_whole")
    third = push(store, server)
    assert third.copied[mine["e"].info.run_id] == parent.info.run_id
    assert third.copied[mine["e/planning"].info.run_id] != child.info.run_id
    assert len(all_runs(there)) == 2
    # The parent goes on after it was pushed: it is left while it runs, then copied anew.
    own = mine["e"].info.run_id
    here.update_run(own, status="RUNNING")
    assert push(store, server).running == [own]
    here.log_metric(own, "late", 2.0)
    here.set_terminated(own, "FINISHED", mine["e"].info.end_time + 1000)
    fourth = push(store, server)
    assert list(fourth.copied) == [own]
    renewed = {run.info.run_name: run for run in all_runs(there)}
    assert renewed["e"].data.metrics["late"] == 2.0
    assert renewed["e/planning"].data.tags["mlflow.parentRunId"] == fourth.copied[own]
    # One that was meant for the file is pushed when it is named.
    named = push(store, server, mine["here"].info.run_id)
    assert list(named.copied) == [mine["here"].info.run_id]
    with pytest.raises(UserError, match="there is no run abc"):
        push(store, server, "abc")


def test_a_run_goes_on_when_its_server_goes_away(serving, tmp_path, monkeypatch, caplog):
    runs, uri = tmp_path / "runs", serving.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # of minutes
    earlier = Tracker(runs / "e", runs, "e", active=True)
    earlier.start({}, {"seed": 3})
    earlier.stage("perception", False, {}, {})
    earlier.close("perception")
    tracker = Tracker(runs / "e", runs, "e", active=True)
    tracker.start({"a": 1}, {"seed": 3})
    tracker.stage("interaction", False, {}, {})
    tracker.close("interaction")  # over, and so nothing has to go on
    logger = tracker.stage("planning", False, {"b": 2}, {"parent_card": "abcdef"})
    logger.log_metrics({"train/loss": 4.0}, 0)
    logger.flush()
    left = {key: tracker.id_of(key) for key in ("", "perception", "planning")}
    logger.log_metrics({"train/loss": 3.0}, 1)
    serving.stop()
    for step in (2, 3):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.finalize("success")
    assert f"runs push {uri}" in caplog.text
    (runs / "card.json").write_text("{}")
    tracker.log_files("planning", runs / "card.json")
    tracker.close("planning")
    tracker.log_numbers("perception", {"map_iou": 0.5})  # trained by another process
    tracker.close("")

    here = MlflowClient(local_store(runs))
    found = {run.info.run_name: run for run in all_runs(here)}
    assert set(found) == {"e", "e/perception", "e/planning"}
    for key, name in (("", "e"), ("perception", "e/perception"), ("planning", "e/planning")):
        assert found[name].data.tags[CONTINUES] == left[key]
        assert found[name].data.tags[MEANT_FOR] == uri
    planning = found["e/planning"]
    assert planning.data.params == {"b": "2"}
    assert planning.data.tags["parent_card"] == "abcdef"
    assert planning.info.status == "FINISHED"
    curve = here.get_metric_history(planning.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in curve] == [(1, 3.0), (2, 1.0), (3, 1.0)]
    assert [file.path for file in here.list_artifacts(planning.info.run_id)] == ["card.json"]
    assert found["e/perception"].data.metrics == {"map_iou": 0.5}
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    serving.start()
    assert len(push(local_store(runs), uri).copied) == 3
    there = MlflowClient(uri)
    assert there.get_run(left["planning"]).info.status == "KILLED"
    assert there.get_run(left["perception"]).info.status == "FINISHED"
    old = there.get_metric_history(left["planning"], "train/loss")
    assert [(m.step, m.value) for m in old] == [(0, 4.0)]
    # Resumed with the server back, the experiment goes on in runs of the server.
    assert Tracker(runs / "e", runs, "e", active=True).uri == uri


def test_what_a_store_refuses_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path / "e", tmp_path, "e", active=True)
    tracker.start({}, {})
    with pytest.raises(MlflowException, match="exceeds"):
        tracker.tag("", "x" * 9000, "y")
    with pytest.raises(FileNotFoundError):
        tracker.log_files("", tmp_path / "nothing")


@pytest.mark.parametrize("way", ["straight", "pushed"])
def test_models_reach_the_server(way, tmp_path, server, monkeypatch):
    if way == "straight":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(logged_model, "write_model", write_small_model)
    tracker = Tracker(tmp_path / way, tmp_path, way, active=True)
    tracker.start({}, {})
    made = tracker.log_model("planning", tmp_path / way, "abc")
    assert tracker.log_model("planning", tmp_path / way, "abc") == made
    tracker.close("")
    run = tracker.run_id
    if way == "pushed":
        (run,) = push(local_store(tmp_path), server, run).copied.values()
    there = MlflowClient(server)
    (output,) = there.get_run(run).outputs.model_outputs
    logged = there.get_logged_model(output.model_id)
    assert (logged.name, logged.status, logged.tags["card"]) == ("planning", "READY", "abc")
    assert logged.source_run_id == run
    mlflow.set_tracking_uri(server)
    try:
        model = mlflow.pyfunc.load_model(f"runs:/{run}/planning")
    finally:
        mlflow.set_tracking_uri(None)
    assert model.metadata.model_id == logged.model_id
    assert model.metadata.run_id == run
    assert model.predict(["a"]) == ["A"]


def write_small_model(folder, stage_folder, model_id, run_id):
    """In the place of weights: a model that writes texts in capitals."""
    code = folder.with_name("code.py")
    code.write_text(
        "from mlflow.models import set_model\n"
        "from mlflow.pyfunc import PythonModel\n\n\n"
        "class Capitals(PythonModel):\n"
        "    def predict(self, context, model_input: list[str]) -> list[str]:\n"
        "        return [text.upper() for text in model_input]\n\n\n"
        "set_model(Capitals())\n"
    )
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(code),
        pip_requirements=[],
        mlflow_model=mlflow.models.Model(model_id=model_id, run_id=run_id),
    )
