"""Our vision tower against the arrays recorded from the reference."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from experiments.cli import main
from experiments.parity.golden import Check, Golden
from experiments.parity.run import CASES, NOT_YET, cases, run_case, run_parity
from experiments.verbs.parser import EXIT_FAILED, EXIT_OK, EXIT_USER_ERROR


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden")


RUN = (
    "a_resnet_fpn",
    "b_bev_encoder",
    "b_rotate_unit",
    "c_track_decoder",
    "d_track_memory_qim",
    "f_msda_unit",
    "k_e2e",
    "k_e2e_zeroed",
    "m_sdc_labels",
)


@pytest.mark.parametrize("stem", RUN)
def test_a_case_is_equal_to_the_reference(golden, stem):
    outcome = run_case(golden, stem)
    assert outcome.failure == ""
    assert [check.name for check in outcome.checks if not check.passed] == []
    assert len(outcome.checks) >= 2


def test_all_cases_of_the_vision_tower_are_known(golden):
    found = cases(golden.folder)
    assert set(RUN) <= set(found)
    others = [stem for stem in found if stem not in RUN]
    assert all(any(stem.startswith(start) for start in NOT_YET) for stem in others)
    assert not set(CASES) & set(NOT_YET)


@pytest.fixture
def spoiled(shared, tmp_path):
    """A copy of one case with one number changed."""
    source = shared / "golden"
    for name in ("b_rotate_unit.json", "b_rotate_unit.safetensors"):
        shutil.copy(source / name, tmp_path)
    tensors = load_file(tmp_path / "b_rotate_unit.safetensors")
    tensors["out/small_4.0"][0, 3, 3] += 0.5
    (tmp_path / "b_rotate_unit.safetensors").unlink()
    save_file(tensors, tmp_path / "b_rotate_unit.safetensors")
    (tmp_path / "index.json").write_text("{}")
    return tmp_path


def test_a_difference_is_a_failure_with_its_array(spoiled):
    out = io.StringIO()
    assert not run_parity(spoiled, Console(file=out, width=160))
    assert "FAIL  b_rotate_unit" in out.getvalue()
    assert "small_4.0" in out.getvalue()


def test_the_verb_says_by_its_exit_code_how_it_went(spoiled, capsys):
    assert main(["parity", str(spoiled)]) == EXIT_FAILED
    tensors = load_file(spoiled / "b_rotate_unit.safetensors")
    del tensors["out/small_4.0"]
    save_file(tensors, spoiled / "b_rotate_unit.safetensors")
    assert main(["parity", str(spoiled)]) == EXIT_OK
    assert "1 cases run: all pass" in capsys.readouterr().out


def test_a_case_that_cannot_run_fails_with_its_reason(spoiled, capsys):
    (spoiled / "b_rotate_unit.safetensors").write_bytes(b"not tensors")
    assert main(["parity", str(spoiled)]) == EXIT_FAILED
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("index", [None, "{}"])
def test_a_folder_without_recordings_is_refused(tmp_path, capsys, index):
    if index is not None:
        (tmp_path / "index.json").write_text(json.dumps(json.loads(index)))
    assert main(["parity", str(tmp_path)]) == EXIT_USER_ERROR
    assert str(tmp_path) in capsys.readouterr().err.replace("\n", "")


def test_what_is_not_finite_or_of_another_size_never_passes():
    nan = Check("x", torch.tensor([float("nan")]), torch.zeros(1))
    longer = Check("x", torch.zeros(2), torch.zeros(1))
    assert not nan.passed
    assert not longer.passed
    assert Check("x", torch.zeros(0, 3), torch.zeros(0, 3)).passed
