"""Joins: every record is joined or counted with its reason, and training sees no evaluation scene.

The hand-made root is a v1.0-mini: scene-0061 and scene-0553 train (9 and 4 key-frames), scene-0103
and scene-0916 evaluate (8 and 5). In v1.0-trainval scene-0553 evaluates, too.
"""

import json
from pathlib import Path

import pytest

from datamodules.index_file import load_index
from datamodules.joining import ELSEWHERE, Join
from datamodules.nux import NuXConfig
from odvla.errors import UserError

OTHER = "its sample belongs to the {} split"


@pytest.fixture(scope="module")
def index(circle_root):
    return load_index(circle_root, "v1.0-mini")


def _nux(path, tokens):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({t: {"narration": "on", "reasoning": "free"} for t in tokens}))


def _data(circle_root, folder, **changes):
    return NuXConfig(
        str(circle_root), image_size=(16, 9), language_root=str(folder), **changes
    ).build()


def _told(report):
    return {left.reason: (left.count, left.example) for left in report.left_out}


def test_records_of_other_splits_and_roots_are_left_out_and_counted(circle_root, circles, tmp_path):
    """Trainval's val file on v1.0-mini, two scenes of which mini trains on."""
    train = circles.token("scene-0553", 2)
    val = [circles.token("scene-0103", k) for k in range(3)]
    _nux(tmp_path / "nux/Nu_X_val.json", ["nowhere", train, *val, "at all"])
    data = _data(circle_root, tmp_path)
    assert [c.sample_token for c in data.conversations("val")] == val
    (report,) = data.join_reports("val")
    assert (report.records, report.joined, report.split) == (6, 3, "val")
    assert _told(report) == {ELSEWHERE: (2, "nowhere"), OTHER.format("train"): (1, train)}
    assert str(report).endswith(
        "Nu_X_val.json: 3 of 6 records joined (val); 2 left out: its sample is not in this root, "
        f"e.g. nowhere; 1 left out: its sample belongs to the train split, e.g. {train}"
    )


def test_training_records_of_evaluation_scenes_are_refused(circle_root, circles, tmp_path):
    train, val = circles.token("scene-0061", 0), circles.token("scene-0916", 4)
    _nux(tmp_path / "nux/Nu_X_train.json", [train, val])
    data = _data(circle_root, tmp_path)
    with pytest.raises(
        UserError, match=rf"train\.json, {val}: .* about scene-0916, .* val split"
    ) as refused:
        data.source("train")
    assert "data.<stage>.leaks=leave_out (data describe: leaks=leave_out)" in str(refused.value)
    data = _data(circle_root, tmp_path, leaks="leave_out")
    assert [c.sample_token for c in data.conversations("train")] == [train]
    assert _told(data.join_reports("train")[0]) == {OTHER.format("val"): (1, val)}
    with pytest.raises(UserError, match="leaks must be refuse or leave_out, not 'keep'"):
        NuXConfig(leaks="keep")


def test_scenes_beyond_the_limit_are_counted(circle_root, circles, tmp_path):
    tokens = [circles.token(scene, 1) for scene in ("scene-0061", "scene-0553")]
    _nux(tmp_path / "nux/Nu_X_train.json", tokens)
    data = _data(circle_root, tmp_path, train_scenes=1)
    data.source("train")
    (report,) = data.join_reports("train")
    assert _told(report) == {"its scene is beyond data.train_scenes": (1, tokens[1])}


def test_a_file_of_other_data_is_refused(circle_root, circles, tmp_path):
    _nux(tmp_path / "nux/Nu_X_train.json", ["a", "b"])
    _nux(tmp_path / "nux/Nu_X_val.json", [circles.token("scene-0061", 0)])
    data = _data(circle_root, tmp_path)
    with pytest.raises(UserError, match=r"none of its 2 records belongs to a sample of the train"):
        data.source("train")
    with pytest.raises(
        UserError, match=r"none of its 1 records .* \(1: its sample belongs to the t"
    ):
        data.source("val")


def test_one_file_for_all_splits_leaks_nothing(index, circles, tmp_path):
    train, val = circles.token("scene-0553", 1), circles.token("scene-0103", 1)
    join = Join(tmp_path / "x", index, "train", index.scenes_of("train"))
    assert join.frame(train, "a") == index.number_of_token[train]
    assert join.frame(val, "b") is None
    assert _told(join.report()) == {OTHER.format("val"): (1, "b")}
    whole = Join.whole(tmp_path / "x", index)
    assert [whole.frame(f.token, "") for f in index.frames] == list(range(len(index.frames)))
    assert whole.report().joined == len(index.frames)
    for frame in index.frames:
        assert whole.scene(frame.number) == index.scenes[frame.scene]


def test_a_run_says_once_what_is_left_out_beyond_splits(index, caplog):
    """Stages join the same files again; and what belongs elsewhere is no news."""
    frame = index.frames[index.scenes_of("train")[0].first].token

    def joined(name):
        join = Join(Path(name), index, "train", index.scenes_of("train"))
        join.frame(frame, "record 0")
        join.frame("nowhere", "record 1")
        return join

    with caplog.at_level("INFO", logger="datamodules.joining"):
        joined("a/quiet.json").report()
        assert not caplog.records
        for _ in range(2):
            join = joined("a/told.json")
            join.leave_out("its object is no target", "record 0")
            report = join.report()
    (record,) = caplog.records
    assert record.getMessage().startswith("a/told.json: 0 of 2 records joined (train)")
    assert "e.g. record 0" in str(report)
