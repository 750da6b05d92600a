"""Our vision tower against the arrays recorded from the reference."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from experiments.cli import main
from experiments.parity import maps
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
    "e_clip_matcher",
    "f_msda_unit",
    "f_panseg_levels1",
    "f_panseg_levels4",
    "g_glue_mlp2x_gelu",
    "g_glue_qwen2_5_rms",
    "h_planning_metric",
    "i_retrieve_traj",
    "j_label_mask",
    "j_prompts",
    "k_e2e",
    "k_e2e_zeroed",
    "l_panseg_loss",
    "m_sdc_labels",
    "n_track_train_clip",
)


@pytest.mark.parametrize("stem", RUN)
def test_a_case_is_equal_to_the_reference(golden, stem):
    outcome = run_case(golden, stem)
    assert outcome.failure == ""
    assert [check.name for check in outcome.checks if not check.passed] == []
    assert len(outcome.checks) >= 2


def test_all_cases_are_known(golden):
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


def test_a_letter_that_differs_is_a_failure(shared, tmp_path):
    facts = json.loads((shared / "golden" / "j_prompts.json").read_text())
    facts["records"][1]["inference_prompt"] += " "
    (tmp_path / "j_prompts.json").write_text(json.dumps(facts))
    (tmp_path / "index.json").write_text("{}")
    outcome = run_case(Golden(tmp_path), "j_prompts")
    assert [check.name for check in outcome.checks if not check.passed] == [
        "tok1_trajectory/prompt"
    ]


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


def test_a_listed_file_that_is_absent_is_a_failure_and_no_other_file_is_passed_over(
    shared, tmp_path, capsys
):
    source = shared / "golden"
    for name in ("i_retrieve_traj.json", "h_planning_metric.npz"):
        shutil.copy(source / name, tmp_path)
    shutil.copy(source / "b_rotate_unit.json", tmp_path / "B_rotate_unit.json")
    shutil.copy(source / "state_dict_keys_opendrivevla_0.5b.json", tmp_path)
    listed = {"h_planning_metric.npz": {}, "b_rotate_unit.safetensors": {}}
    (tmp_path / "index.json").write_text(json.dumps(listed))
    assert main(["parity", str(tmp_path)]) == EXIT_FAILED
    said = capsys.readouterr().out
    assert "FAIL  b_rotate_unit.safetensors: index.json lists it, but it is not there" in said
    assert "SKIP  B_rotate_unit.json: it belongs to no case" in said
    assert "FAIL  h_planning_metric " in said  # its settings are missing
    assert "PASS  i_retrieve_traj" in said
    assert "state_dict_keys" not in said
    assert "2 cases run: NOT all pass" in said
    assert "1 listed files absent; 1 of no known case" in said


@pytest.mark.parametrize("index", ["garbage", "[]", "\xff"])
def test_an_index_that_cannot_be_read_is_refused(spoiled, capsys, index):
    (spoiled / "index.json").write_bytes(index.encode("latin-1"))
    assert main(["parity", str(spoiled)]) == EXIT_USER_ERROR
    assert "index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("h_planning_metric.json", "[]"),
        ("h_planning_metric.npz", ""),
        ("i_retrieve_traj.json", '{"a": 1}'),
        ("i_retrieve_traj.json", "[1]"),
        ("m_sdc_labels.json", '{"cases": [null]}'),
        ("m_sdc_labels.json", '{"cases": {"a": 1}}'),
    ],
)
def test_a_file_of_another_form_fails_its_own_case_alone(shared, tmp_path, capsys, name, content):
    for other in ("h_planning_metric.json", "h_planning_metric.npz", "j_prompts.json"):
        shutil.copy(shared / "golden" / other, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "index.json").write_text("{}")
    assert main(["parity", str(tmp_path)]) == EXIT_FAILED
    said = capsys.readouterr().out
    assert f"FAIL  {name.partition('.')[0]} " in said
    assert "PASS  j_prompts" in said


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


# What a case of the map head must notice, however near-ties are settled.
SPOILS = {
    "chosen_positions": lambda t: t.roll(1),
    "chosen_output_query_things": lambda t: t.roll(1, 0),
    "raw_bbox_index": lambda t: t.flip(0),
    "labels": lambda t: 2 - t,
    "bbox": lambda t: t.flip(0),
    "segm": lambda t: 1 - t,
    "drivable": lambda t: 1 - t,
    "lane": lambda t: t.flip(1),
    "panoptic": lambda t: t.flip(0),
    "things_mask_inter0": lambda t: t + 0.01,
}


@pytest.fixture(scope="module")
def copied(shared, tmp_path_factory):
    """A directory with one case of the map head that can be spoiled."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "index.json").write_text("{}")
    shutil.copy(shared / "golden" / "f_panseg_levels4.json", folder)
    return folder, load_file(shared / "golden" / "f_panseg_levels4.safetensors")


@pytest.mark.parametrize("name", SPOILS)
def test_near_ties_hide_no_difference_of_the_map_head(copied, name):
    folder, tensors = copied
    spoiled = {**tensors, f"out/{name}": SPOILS[name](tensors[f"out/{name}"]).contiguous()}
    save_file(spoiled, folder / "f_panseg_levels4.safetensors")
    outcome = run_case(Golden(folder), "f_panseg_levels4")
    assert not outcome.passed
    wrong = {check.name for check in outcome.checks if not check.passed}
    assert name in wrong or outcome.failure


def test_near_ties_may_swap(copied):
    folder, tensors = copied
    changed = dict(tensors)
    scores = changed["out/raw_bbox"][:, 4]
    first = int(scores.diff().abs().argmin())  # two neighbours, swapped as if they were a tie
    swap = torch.arange(len(scores))
    swap[[first, first + 1]] = swap[[first + 1, first]]
    for name in ("raw_bbox", "raw_bbox_index", "raw_labels", "output_query_things"):
        changed[f"out/{name}"] = changed[f"out/{name}"][swap].contiguous()
    for name in ("things_mask", "things_query_first", "things_query_last", "things_mask_inter0"):
        changed[f"out/{name}"] = changed[f"out/{name}"][:, swap].contiguous()
    chosen = changed["out/chosen_positions"]
    changed["out/chosen_output_query_things"] = changed["out/output_query_things"][chosen]
    save_file(changed, folder / "f_panseg_levels4.safetensors")
    gap = float(scores.diff().abs().min())
    assert gap > maps.TIE
    assert not run_case(Golden(folder), "f_panseg_levels4").passed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "TIE", 1.1 * gap)
        outcome = run_case(Golden(folder), "f_panseg_levels4")
    assert [check.name for check in outcome.checks if not check.passed] == []
    assert outcome.passed


def test_a_map_head_of_another_kind_is_refused_with_its_setting(copied):
    folder, tensors = copied
    save_file(tensors, folder / "f_panseg_levels4.safetensors")
    facts = json.loads((folder / "f_panseg_levels4.json").read_text())
    kept = json.dumps(facts)
    facts["cfg"]["as_two_stage"] = True
    (folder / "f_panseg_levels4.json").write_text(json.dumps(facts))
    outcome = run_case(Golden(folder), "f_panseg_levels4")
    (folder / "f_panseg_levels4.json").write_text(kept)
    assert outcome.failure == (
        "UserError: seg_head.as_two_stage is True; the map head knows False only"
    )
