"""The command line, as far as it goes without data."""

import os

import pytest

from experiments.cli import build_parser, main


def test_show_prints_the_changed_config(capsys, tmp_path):
    overlay = tmp_path / "o.yaml"
    overlay.write_text("seed: 4\nstages: {planning: {steps: 9}}\n")
    command = ["show", "smoke", "seed=5", "--overlay", str(overlay), "model.encoder.dim=24"]
    assert main([*command, "--data", "/d"]) == 0
    shown = capsys.readouterr().out
    assert "\nseed: 5\n" in shown  # an override is stronger than an overlay
    assert "dim: 24" in shown
    assert "steps: 9" in shown
    assert "root: /d" in shown


def test_of_two_overlays_both_count_the_later_one_more(capsys, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 4\npictures: 2\n")
    second.write_text("seed: 6\n")
    assert main(["show", "smoke", "--overlay", str(first), "--overlay", str(second)]) == 0
    shown = capsys.readouterr().out
    assert "\nseed: 6\n" in shown
    assert "\npictures: 2\n" in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "tinny"], "did you mean 'tiny'"),
        (["show", "json:loads"], "must be a function without arguments: missing"),
        (["data", "make", "out", "--seed", "-1"], "seed must be at least 0, not -1"),
        (["show", "tiny", "sed=1"], "did you mean 'seed'"),
        (["show", "tiny", "--overlay", "none.yaml"], "none.yaml does not exist"),
        (["data", "make", "out", "--image-size", "320"], "'320'"),
        (["fit", "tiny", "--from", "nowhere", "--runs", "none"], "nowhere holds no handoff"),
        (["test", "tiny", "town=null", "--data", "nodata", "--runs", "none"], "nodata does not"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict tiny --sample x --picture plan.pdf", "plan.pdf must end in .png"),
        ("predict tiny --sample x --picture folder.png", "folder.png is a folder"),
        ("predict tiny --sample x --picture file/p.png", "file is a file"),
        ("score plans.json --data d --out file", "file is a file, not a folder"),
        ("report r --out file", "file is a file, not a folder"),
        ("data show d --out x.txt", "x.txt must end in .png or .jpg"),
        ("data show d --out folder.png", "folder.png is a folder"),
        ("data export d --format gt-traj --out folder.png --force", "folder.png is a folder"),
        ("data index d --out folder.png", "folder.png is a folder"),
        ("data make file/x", "file/x cannot be made: "),
        ("weights convert w --from uniad --to odvla --out file/x", "file is a file"),
        ("weights convert w --from uniad --to odvla --out x --shard-gb nan", "--shard-gb"),
        ("fit tiny --runs file", "file is a file, not a folder"),
        ("fit tiny --data file", "the data root file is a file"),
        ("test tiny --runs file", "file is a file, not a folder"),
    ],
)
def test_a_place_that_cannot_be_written_shows_before_the_work(
    command, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder.png", "runs", "data"}


def test_what_the_system_refuses_is_a_sentence_and_any_other_error_is_seen(capsys, monkeypatch):
    def stopped_by(error):
        def run(options):
            raise error

        monkeypatch.setattr("experiments.verbs.run.list_experiments", run)
        return main(["list"])

    assert stopped_by(OSError(28, "No space left on device", "a/b")) == 2
    assert "error: a/b: No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="a pipe"):
        stopped_by(OSError("a pipe"))


def test_an_unknown_option_is_refused(capsys):
    for command in (
        ["fit", "tiny", "--sped"],
        ["list", "a=b"],
        ["fit", "tiny", "--runs", "r", "x"],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
    assert "unrecognized argument" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["list", "show", "fit", "test", "predict", "data make"])
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([*verb.split(), "--help"])
    assert end.value.code == 0
    assert f"example: python lightning_app.py {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_numerical_threads_wait_briefly_unless_told_otherwise(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever main does
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["list"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_mlflow_does_not_report_home_unless_it_is_told_to(monkeypatch):
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY

    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    assert main(["list"]) == 0
    assert MLFLOW_DISABLE_TELEMETRY.get()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    assert main(["list"]) == 0
    assert not MLFLOW_DISABLE_TELEMETRY.get()
