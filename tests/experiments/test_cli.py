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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "tinny"], "did you mean 'tiny'"),
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
