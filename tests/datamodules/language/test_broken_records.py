"""Records that do not fit, within a budget: the others are read, and each of these is told."""

import json
import pickle
import shutil

import pytest

from datamodules.drivelm import DriveLMConfig
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.joining import UNFIT
from datamodules.nucaption import NuCaptionConfig
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.nux import NuXConfig
from datamodules.omnidrive import OmniDriveConfig
from odvla.errors import UserError
from odvla.language.prompts import Dialect

TWO = 2  # records that are broken, the second and the fifth


def _json_records(of):
    """Breaks two records of a JSON file in a way; their names."""

    def breaking(path, change, names):
        content = json.loads(path.read_text())
        records = of(content)
        keys = list(records) if isinstance(records, dict) else range(len(records))
        for key in (keys[1], keys[4]):
            change(records[key])
        path.write_text(json.dumps(content))
        return [names(keys[1]), names(keys[4])]

    return breaking


def _key_frames(content):
    return {
        f"scene {scene}, sample {sample}": record
        for scene, value in content.items()
        for sample, record in value["key_frames"].items()
    }


CASES = {
    "nucaption/train.json": (
        NuCaptionConfig,
        lambda path: _json_records(lambda c: c)(
            path, lambda r: r.update(answer=""), "record {}".format
        ),
    ),
    "nuscenes_qa/NuScenes_train_questions.json": (
        NuScenesQAConfig,
        lambda path: _json_records(lambda c: c["questions"])(
            path, lambda r: r.update(answer=None), "record {}".format
        ),
    ),
    "nux/Nu_X_train.json": (
        NuXConfig,
        lambda path: _json_records(lambda c: c)(path, lambda r: r.pop("reasoning"), str),
    ),
    "drivelm/v1_1_train_nus.json": (
        DriveLMConfig,
        lambda path: _json_records(_key_frames)(path, lambda r: r["QA"].pop("behavior"), str),
    ),
}


@pytest.fixture
def copied(town_root, tmp_path):
    return shutil.copytree(town_root / "language", tmp_path / "language")


@pytest.fixture
def data_of(town_root, copied):
    def made(config, **settings):
        settings = {"image_size": (16, 9), "language_root": str(copied)} | settings
        return config(str(town_root), "v1.0-trainval", **settings).build(None, Dialect())

    return made


def _told(data, caplog):
    """Conversations by sample, the report, and the warnings."""
    caplog.clear()
    with caplog.at_level("WARNING", logger="datamodules.joining"):
        samples = [c.id for c in data.conversations("train")]
    return samples, data.join_reports("train")[0], [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("name", CASES)
def test_records_that_do_not_fit_are_left_out_within_the_budget(name, copied, data_of, caplog):
    config, breaking = CASES[name]
    before, whole, _ = _told(data_of(config), caplog)
    names = breaking(copied / name)
    for budget in range(TWO):
        with pytest.raises(
            UserError,
            match=rf"{names[0]}.*first of {budget + 1} record.*broken_records.* allows {budget}",
        ):
            data_of(config, broken_records=budget).source("train")
    after, report, warned = _told(data_of(config, broken_records=TWO), caplog)
    assert len(after) < len(before)
    assert next(left for left in report.left_out if left.reason == UNFIT).count == TWO
    assert report.left_out[0].example == names[0]
    assert len(warned) == TWO
    for told, broken in zip(warned, names, strict=True):
        assert broken in told
        assert told.endswith("it is left out")
    if config is not DriveLMConfig:  # its records are questions, what is left out key-frames
        assert report.records == whole.records
        assert len(before) - len(after) == TWO


def test_files_and_cached_infos_that_do_not_fit_are_left_out(copied, data_of, caplog):
    folder = copied / "omnidrive" / "vqa" / "train"
    files = sorted(folder.glob("*.json"))
    files[1].write_text("")
    files[4].write_text('[{"question": "What?", "answer": "One."}, {"question": "And?"}]')
    settings = {"omnidrive_parts": ("vqa",)}
    with pytest.raises(UserError, match=rf"{files[1].name} is not JSON.*broken_records.* allows 0"):
        data_of(OmniDriveConfig, **settings).source("train")
    ids, report, warned = _told(data_of(OmniDriveConfig, **settings, broken_records=2), caplog)
    assert (report.records, report.joined) == (len(files), len(files) - TWO)
    assert not any(identity.startswith(files[4].stem) for identity in ids)
    assert len(warned) == TWO

    path = copied / "gpt_driver" / "cached_nuscenes_info.pkl"
    cache = pickle.loads(path.read_bytes())
    token = list(cache)[2]
    del cache[token]["gt_ego_lcf_feat"]
    path.write_bytes(pickle.dumps(cache))
    with pytest.raises(UserError, match=rf"{token}: field 'gt_ego_lcf_feat' is missing"):
        data_of(GPTDriverConfig).source("train")
    ids, report, _ = _told(data_of(GPTDriverConfig, broken_records=1), caplog)
    assert report.records == len(cache)
    assert f"{token}_trajectory" not in ids


def test_a_leak_is_no_record_that_does_not_fit(copied, data_of):
    """However large the budget is, a training record about an evaluation scene stops the run."""
    path = copied / "nux" / "Nu_X_train.json"
    train, val = (json.loads(p.read_text()) for p in (path, path.with_name("Nu_X_val.json")))
    path.write_text(json.dumps(train | dict([next(iter(val.items()))])))
    with pytest.raises(UserError, match=r"a scene of the val split"):
        data_of(NuXConfig, broken_records=100).source("train")


def test_a_budget_is_no_negative_number():
    with pytest.raises(UserError, match=r"broken_records must be 0 or more, not -1"):
        NuXConfig(broken_records=-1)
