"""The index file: the devkit's records, number for number; and what is refused."""

import itertools
import json
import os
import pickle
import shutil
import signal
import stat
from dataclasses import fields, is_dataclass
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pytest
import torch
from nuscenes.nuscenes import NuScenes

from datamodules import columns, index_file
from datamodules.columns import open_columns, write_columns
from datamodules.index_build import index_arrays
from datamodules.index_file import (
    build_index,
    ensure_index,
    index_places,
    load_index,
    map_index,
    open_index,
)
from datamodules.nuscenes import FrameDataset, NuScenesDataConfig
from datamodules.records import AgentPaths, index_of_arrays, without_derived
from datamodules.sampling import ClipRequest
from odvla.errors import UserError


def _devkit_index(root, version):
    """The index made in memory from the devkit's tables, computing all that is derived anew."""
    tables = NuScenes(version, str(root), verbose=False)
    return without_derived(index_of_arrays(root, version, index_arrays(tables, root, version)))


def assert_same(ours, theirs, where="sample"):
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    elif is_dataclass(ours):
        for f in fields(ours):
            assert_same(getattr(ours, f.name), getattr(theirs, f.name), f"{where}.{f.name}")
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs), where
        for k, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{k}]")
    else:
        assert ours == theirs, where


def _same_samples(root, version, stride):
    data = NuScenesDataConfig(str(root), version, image_size=(32, 18)).build()
    ours = FrameDataset(data.index, data.config, data.loader)
    theirs = FrameDataset(_devkit_index(root, version), data.config, data.loader)
    for frame in data.index.frames[::stride]:
        targets = data._available(frame)
        for steps, carried in ((1, False), (3, True)):
            request = ClipRequest(frame.number, steps, carried)
            assert_same(ours.read(request, targets), theirs.read(request, targets))
        assert_same(frame.token, theirs.index.frame(frame.token).token)
    return data


def test_samples_of_a_town_are_the_devkits(town_root):
    version = next(p.name for p in town_root.glob("v1.0-*"))
    data = _same_samples(town_root, version, 7)
    assert data.index.file is not None
    assert data.index.maps


def test_samples_of_the_circles_are_the_devkits(circle_root):
    _same_samples(circle_root, "v1.0-mini", 1)


def test_a_real_sample_is_the_devkits_and_its_folder_stays_as_it_is(shared):
    root = shared / "data" / "nuscenes-one-sample"
    before = sorted(root.iterdir())
    _same_samples(root, "v1.0-mini", 1)
    assert sorted(root.iterdir()) == before


def test_agents_paths_in_both_frames(circle_root, circles):
    """Own and lidar frame tell the same points; pasts are futures seen from later."""
    index = load_index(circle_root, "v1.0-mini")
    paths, data = index.paths, index.annotations
    assert isinstance(paths, AgentPaths)
    checked = 0
    for row in np.flatnonzero(paths.future_mask.any(1) | paths.past_mask.any(1)):
        frame = index.frames[data.frame[row]]
        scene = index.scenes[frame.scene].name
        name = next(
            n
            for n in circles.AGENTS
            if index.instance_tokens[data.instance[row]] == circles.token(scene, n)
        )
        x0, y0, yaw = circles.lidar_pose(scene, 0.5 * frame.position)
        for known, points, shifts in (
            (paths.future_mask[row], paths.future_lidar[row], range(1, 7)),
            (paths.past_mask[row], paths.past_lidar[row], (-1, -2, -3, -4)),
        ):
            for k, shift in enumerate(shifts):
                at = frame.position + shift
                there = 0 <= at < circles.SCENES[scene][1] and at in circles.AGENTS[name][3]
                assert known[k] == there
                if there:
                    x, y = circles.agent_xy(scene, name, 0.5 * at)
                    dx, dy = x - x0, y - y0
                    expected = (
                        dx * np.cos(yaw) + dy * np.sin(yaw),
                        -dx * np.sin(yaw) + dy * np.cos(yaw),
                    )
                    np.testing.assert_allclose(points[k], expected, atol=1e-4)
                    checked += 1
                else:
                    assert not points[k].any()
    assert checked > 100


def test_tokens_are_found(circle_root):
    index = load_index(circle_root, "v1.0-mini")
    for row, token in enumerate(index.annotations.token[::11]):
        assert index.annotation_rows[token.decode()] == 11 * row
    assert [index.number_of_token[f.token] for f in index.frames] == list(range(26))
    for token in ("", "nope", "zzzz", "0", 3):
        assert token not in index.number_of_token
    assert list(index.number_of_token) == [f.token for f in index.frames]
    assert index.frames[-1].number == 25
    with pytest.raises(IndexError):
        index.frames[26]


def test_a_copy_for_a_worker_is_a_path(circle_root):
    index = load_index(circle_root, "v1.0-mini")
    sent = pickle.dumps(index)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again.annotations.centre, index.annotations.centre)
    bare = without_derived(index_of_arrays(index.root, index.version, index.arrays))
    assert pickle.loads(pickle.dumps(bare)).frames[3].token == index.frames[3].token


def test_arrays_are_mapped_not_read(circle_root):
    index = load_index(circle_root, "v1.0-mini")
    assert not index.annotations.centre.flags.writeable
    assert not index.annotations.centre.flags.owndata
    assert index.frames[0].lidar_to_global.flags.writeable  # records are the reader's own


@pytest.fixture
def root(circles, tmp_path):
    return circles.write_root(tmp_path / "root")


def test_an_index_is_built_beside_the_data_and_found_again(root, monkeypatch):
    file = ensure_index(root, "v1.0-mini")
    assert file == root / "odvla-index-v1.0-mini.arrow"
    monkeypatch.setattr(index_file, "build_index", lambda *_: pytest.fail("built again"))
    assert ensure_index(root, "v1.0-mini") == file
    assert open_index(file, root, "v1.0-mini").frames[2].number == 2


def test_a_root_without_write_permission_is_left_alone(root):
    mode = root.stat().st_mode
    root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        file = ensure_index(root, "v1.0-mini")
    finally:
        root.chmod(mode)
    assert file == index_places(root, "v1.0-mini")[1]
    assert file.is_file()
    assert str(file).startswith(os.environ["ODVLA_CACHE"])


def _touch(path):
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: _touch(root / "v1.0-mini" / "sample.json"), r"stale: 1 .*sample\.json"),
        (
            lambda root: (root / "can_bus" / "scene-0061_pose.json").unlink(),
            r"stale: 1 .*scene-0061_pose\.json",
        ),
        (
            lambda root: _touch(root / "maps" / "expansion" / "boston-seaport.json"),
            r"stale: 1 .*boston-seaport\.json",
        ),
    ],
)
def test_a_stale_index_is_refused_and_built_again(root, change, message):
    file = ensure_index(root, "v1.0-mini")
    made = file.stat().st_mtime_ns
    change(root)
    with pytest.raises(UserError, match=message):
        open_index(file, root, "v1.0-mini")
    assert ensure_index(root, "v1.0-mini") == file
    assert file.stat().st_mtime_ns != made
    open_index(file, root, "v1.0-mini")


def test_foreign_and_damaged_indexes_are_refused(root, shared, tmp_path):
    file = ensure_index(root, "v1.0-mini")
    real = shared / "data" / "nuscenes-one-sample"
    with pytest.raises(UserError, match="was made from other data than"):
        open_index(file, real, "v1.0-mini")
    shutil.copytree(root / "v1.0-mini", root / "v1.0-trainval")
    with pytest.raises(UserError, match=r"is of v1\.0-mini, not of v1\.0-trainval"):
        open_index(file, root, "v1.0-trainval")
    old = open_columns(file)
    other = tmp_path / "other.arrow"
    write_columns(other, old.arrays, {**old.metadata, "schema_version": "0"})
    with pytest.raises(UserError, match="has schema version 0, this program reads"):
        map_index(other, root)
    write_columns(other, {"x": np.zeros(3)}, {"made_by": "somebody"})
    with pytest.raises(UserError, match="is an Arrow file, but not an index"):
        map_index(other, root)
    with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
        pass
    with pytest.raises(UserError, match="cannot be read as an index"):
        map_index(other, root)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot be read as an index"):
        open_index(file, root, "v1.0-mini")
    assert map_index(ensure_index(root, "v1.0-mini"), root).frames[0].position == 0


def _die_writing(root, out, file):
    """Build an index, and be killed when file number `file` is written but has no name yet."""
    written = itertools.count(1)

    def fsync(descriptor):
        if next(written) == file:
            os.kill(os.getpid(), signal.SIGKILL)

    columns.os.fsync = fsync
    build_index(root, "v1.0-mini", out)


# Three steps, and the index itself.
@pytest.mark.parametrize("file", [1, 2, 3, 4])
def test_a_killed_build_goes_on_and_leaves_no_junk(root, tmp_path, monkeypatch, file):
    whole = tmp_path / "whole.arrow"
    build_index(root, "v1.0-mini", whole)
    place = root / "odvla-index-v1.0-mini.arrow"
    # Forked: another interpreter would take seconds to import the same things.
    child = get_context("fork").Process(target=_die_writing, args=(root, place, file))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not place.exists()
    steps = sorted(path.stem for path in root.glob(".*.steps/*.arrow") if path.stem[0] != ".")
    assert len(steps) == file - 1
    assert len(list(root.rglob(".*.partial"))) == 1
    read = []
    tables = index_file.open_tables
    monkeypatch.setattr(index_file, "open_tables", lambda *a: read.append(1) or tables(*a))
    assert ensure_index(root, "v1.0-mini") == place
    assert len(read) == (file == 1)
    assert place.read_bytes() == whole.read_bytes()
    assert not list(root.glob(".*"))


def test_steps_of_other_data_do_not_count(root, tmp_path):
    child = get_context("fork").Process(target=_die_writing, args=(root, tmp_path / "i.arrow", 4))
    child.start()
    child.join(60)
    table = root / "v1.0-mini" / "scene.json"
    scenes = json.loads(table.read_text())
    scenes[0]["description"] = "Another one"
    table.write_text(json.dumps(scenes))
    index = build_index(root, "v1.0-mini", tmp_path / "i.arrow")
    assert index.scenes[0].description == "Another one"
    build_index(root, "v1.0-mini", tmp_path / "whole.arrow")
    assert (tmp_path / "i.arrow").read_bytes() == (tmp_path / "whole.arrow").read_bytes()


def test_tables_that_do_not_fit_leave_nothing_behind(root):
    table = root / "v1.0-mini" / "sample_annotation.json"
    boxes = json.loads(table.read_text())
    table.write_text(json.dumps([{**boxes[0], "size": [0, 0, 0]}, *boxes[1:]]))
    before = sorted(root.iterdir())
    with pytest.raises(UserError, match=rf"{boxes[0]['token']} of .*: size \[0, 0, 0\] is not"):
        ensure_index(root, "v1.0-mini")
    assert sorted(root.iterdir()) == before


def test_columns_of_every_kind_come_back(tmp_path):
    arrays = {
        "numbers": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "yes": np.array([[True], [False]]),
        "words": np.array([b"a", b"bcd", b""]),
        "none": np.zeros((0, 5), dtype=np.int64),
        "nothing": np.zeros(0, dtype=np.bytes_),
    }
    write_columns(tmp_path / "x.arrow", arrays, {"a": "b"})
    found = open_columns(tmp_path / "x.arrow")
    assert found.metadata == {"a": "b"}
    assert list(found.arrays) == list(arrays)
    for name, values in arrays.items():
        assert found.arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(found.arrays[name], values)
    # Feather V2: any Arrow reader opens it.
    table = pa.feather.read_table(tmp_path / "x.arrow") if hasattr(pa, "feather") else None
    assert table is None or table.num_rows == 1


def test_progress_is_told(root, tmp_path):
    told = []
    build_index(root, "v1.0-mini", tmp_path / "i.arrow", lambda *state: told.append(state))
    names = [what for what, _, _ in told]
    assert {"reading sample_data", "boxes", "CAN bus", "maps", "writing"} <= set(names)
    assert all(done <= total for _, done, total in told)


def test_a_list_of_records_is_streamed_in_pieces(tmp_path, monkeypatch):
    from datamodules import tables

    records = [{"token": str(k), "text": 'a "]} ,[{ b' * k} for k in range(20)]
    path = tmp_path / "t.json"
    for indent in (None, 0, 2):
        path.write_text(json.dumps(records, indent=indent))
        for size in (1, 7, 1000):
            monkeypatch.setattr(tables, "_CHUNK", size)
            assert list(tables.stream_records(path)) == records
    whole = json.dumps(records)
    for size in (1, 7, 1000, 1 << 22):
        monkeypatch.setattr(tables, "_CHUNK", size)
        path.write_text(whole + "\n" * 9)
        assert list(tables.stream_records(path)) == records
        for more in (" garbage", "\n[]", "]", "\0"):
            path.write_text(whole + more)
            with pytest.raises(UserError, match=rf"t\.json .* at character {len(whole) - 1}, but"):
                list(tables.stream_records(path))
    path.write_text("[]")
    assert list(tables.stream_records(path)) == []
    for text in ("{}", '[{"a": 1}]', "[3]", '[{"token": "a"}', '[{"token": ', "", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"t\.json"):
            list(tables.stream_records(path))
