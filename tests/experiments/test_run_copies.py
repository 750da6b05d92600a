"""A server that does not answer loses no run; its runs are pushed once it does."""

import socket
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient

from experiments.cli import main
from experiments.run_copies import SOURCE, all_runs, push
from experiments.tracking import Tracker
from experiments.tracking_store import MEANT_FOR, answers, local_store, shown
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{place / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(place / "artifacts")]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=place)
        try:
            until = time.monotonic() + 90
            while not answers(uri, 1.0):
                assert process.poll() is None, (place / "log").read_text()
                assert time.monotonic() < until, (place / "log").read_text()
                time.sleep(0.3)
            yield uri
        finally:
            process.terminate()
            process.wait(20)


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
