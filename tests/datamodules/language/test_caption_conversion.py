"""A conversion that is killed and goes on, and records that do not fit."""

import itertools
import json
import os
import signal
from multiprocessing import get_context

import numpy as np
import pytest

from datamodules import caption_conversion
from datamodules.agents import learnable_mask
from datamodules.caption_conversion import CaptionStream
from datamodules.caption_table import ensure_table, open_table
from datamodules.columns import partial_path, write_columns
from datamodules.index_file import load_index
from datamodules.tod3cap import TOD3CapConfig
from odvla.errors import UserError
from odvla.language.prompts import Dialect

VERSION = "v1.0-mini"
EXTENT_M = (-32.0, 32.0, -32.0, 32.0)
PARTS = 16


@pytest.fixture
def index(circle_root):
    return load_index(circle_root, VERSION)


def _records(index, caption_record):
    """Every annotation's caption from the last to the first, others of every kind in between."""
    records = {}
    data = index.annotations
    for row in reversed(range(len(data.frame))):
        token, sample = data.token[row].decode(), index.frames[int(data.frame[row])].token
        records[token] = caption_record(sample, f"Größe {row}")
        if row % 7 == 0:
            records[f"elsewhere{row}"] = caption_record("nowhere", "x")
            records[f"gone{row}"] = caption_record(sample, "x")
    return records


@pytest.fixture
def captions(index, tmp_path, caption_record):
    """A file with two records that do not fit, early and late."""
    records = _records(index, caption_record)
    own = [token for token in records if not token.startswith(("elsewhere", "gone"))]
    del records[own[2]]["final_caption"]
    records[own[-3]]["depth_caption"]["depth"] = "far"
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def _die_writing(index, captions, file):
    """Convert, and be killed while half of file number `file` is written."""
    caption_conversion.BATCH, caption_conversion.PART_BYTES = 5, 4000
    written = itertools.count(1)

    def write(path, arrays, facts):
        write_columns(path, arrays, facts)
        if next(written) == file:
            half = path.read_bytes()[: path.stat().st_size // 2]
            path.unlink()
            partial_path(path).write_bytes(half)
            os.kill(os.getpid(), signal.SIGKILL)

    caption_conversion.write_columns = write
    ensure_table(captions, index, broken=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Cache folders by name; the one that was asked for last is used."""

    def use(name):
        folder = tmp_path / name
        monkeypatch.setenv("ODVLA_CACHE", str(folder))
        return folder

    return use


@pytest.fixture
def begun(monkeypatch):
    """Bytes at which streams began."""
    starts = []

    class Watched(CaptionStream):
        def __init__(self, path, start=0):
            starts.append(start)
            super().__init__(path, start)

    monkeypatch.setattr(caption_conversion, "CaptionStream", Watched)
    return starts


def _parts(folder):
    return sorted(folder.glob(".*.parts/*.arrow"))


def _end(part):
    return json.loads(caption_conversion.open_columns(part).metadata["counts"])[1]


# The first part, some part, the last one, and the table itself.
@pytest.mark.parametrize("die", [1, 3, PARTS, PARTS + 1])
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(
    index, captions, cache, begun, die
):
    cache("whole")
    expected = ensure_table(captions, index, broken=2).read_bytes()
    killed = cache("killed")
    # Forked: another interpreter would take seconds to import the same things.
    child = get_context("fork").Process(target=_die_writing, args=(index, captions, die))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    parts = _parts(killed)
    assert len(parts) == die - 1
    left = list(killed.rglob(".*.partial"))
    assert len(left) == 1
    assert not list(killed.glob("captions-*"))
    ends = [_end(part) for part in parts]
    assert ends == sorted(ends)
    table = ensure_table(captions, index, broken=2)
    assert begun == [0, ends[-1] if ends else 0]
    assert table.read_bytes() == expected
    assert [path.name for path in killed.iterdir()] == [table.name]


@pytest.fixture
def interrupted(index, captions, cache, monkeypatch):
    """A cache with all parts of a conversion that did not come to its table."""
    monkeypatch.setattr(caption_conversion, "BATCH", 5)
    monkeypatch.setattr(caption_conversion, "PART_BYTES", 4000)
    folder = cache("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_conversion, "_join", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_table(captions, index, broken=2)
    return folder


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_changed_file_begins_anew(index, captions, interrupted, cache, begun):
    records = json.loads(captions.read_text())
    token = list(records)[1]
    records[token]["final_caption"] = "Something else"
    captions.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    again = ensure_table(captions, index, broken=2).read_bytes()
    assert begun == [0]
    assert b"Something else" in again
    cache("fresh")
    assert ensure_table(captions, index, broken=2).read_bytes() == again
    assert not list(interrupted.glob(".*"))


def test_only_parts_that_follow_one_another_count(index, captions, interrupted, cache, begun):
    parts = _parts(interrupted)
    assert len(parts) == PARTS
    end = _end(parts[2])
    parts[3].write_bytes(parts[3].read_bytes()[:-100])  # as a failing disk might leave it
    again = ensure_table(captions, index, broken=2).read_bytes()
    assert begun == [end]
    cache("fresh")
    assert ensure_table(captions, index, broken=2).read_bytes() == again


def test_a_part_of_another_place_does_not_count(index, captions, interrupted, begun):
    parts = _parts(interrupted)
    end = _end(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    table = open_table(ensure_table(captions, index, broken=2))
    assert begun == [end]
    assert len(table.row) == len(index.annotations.frame) - 2


def test_a_larger_budget_goes_on_where_the_smaller_one_stopped(
    index, captions, cache, monkeypatch, begun
):
    monkeypatch.setattr(caption_conversion, "BATCH", 5)
    monkeypatch.setattr(caption_conversion, "PART_BYTES", 4000)
    cache("budget")
    own = [t for t in json.loads(captions.read_text()) if not t.startswith(("else", "gone"))]
    with pytest.raises(
        UserError,
        match=f"{own[2]}: field 'final_caption' is missing; it is the first of 1 record.* that do "
        r"not fit, and data\.<stage>\.broken_captions .* allows 0",
    ):
        ensure_table(captions, index)
    with pytest.raises(UserError, match=f"{own[2]}: .* the first of 2 record.* allows 1"):
        ensure_table(captions, index, broken=1)
    table = ensure_table(captions, index, broken=2)
    assert begun[:2] == [0, 0]
    assert begun[2] > 20_000
    assert [(token, problem) for _, token, problem in open_table(table).broken] == [
        (own[2], "field 'final_caption' is missing"),
        (own[-3], "field 'depth_caption.depth' must be a number, not 'far'"),
    ]
    # A table that is there is no way around the budget.
    with pytest.raises(UserError, match=f"{own[2]}: .* the first of 2 record.* allows 1"):
        ensure_table(captions, index, broken=1)
    assert len(begun) == 3


def test_broken_records_are_left_out_counted_and_named(index, captions, caplog):
    records = json.loads(captions.read_text())
    learned = learnable_mask(index, np.arange(len(index.annotations.frame)), EXTENT_M)
    trained = np.repeat(
        [s.split == "train" for s in index.scenes], [s.last - s.first for s in index.scenes]
    )
    row, twice = np.flatnonzero(learned & trained[index.annotations.frame])[[4, 6]].tolist()
    token = index.annotations.token[row].decode()
    own = index.frames[int(index.annotations.frame[row])]
    other = index.frames[own.number + 1].token
    records[token]["sample_token"] = other
    again = index.annotations.token[twice].decode()
    text = json.dumps(records)[:-1] + f', "{again}": {json.dumps(records[again])}}}'
    captions.write_text(text)

    def data(broken):
        settings = {"caption_file": str(captions), "broken_captions": broken}
        return TOD3CapConfig(str(index.root), VERSION, **settings).build(None, Dialect())

    with pytest.raises(
        UserError, match=r"the first of 4 record.* data\.<stage>\.broken_captions .* allows 3"
    ):
        data(3).source("train")
    relaxed = data(4)
    relaxed.prepare_data()
    warned = [r.message for r in caplog.records if "left out" in r.message and token in r.message]
    assert warned == [
        f"{captions}, {token}: sample_token is {other!r}, but the annotation belongs to sample "
        f"{own.token!r}; it is left out"
    ]
    (report,) = relaxed.join_reports("train")
    assert report.records == len(records) + 1
    told = {left.reason: (left.count, left.example) for left in report.left_out}
    assert told["it does not fit (its annotation has a second caption)"] == (1, again)
    assert told["it does not fit (field 'final_caption' is missing)"][0] == 1
    broken = [count for reason, (count, _) in told.items() if reason.startswith("it does not fit")]
    assert broken == [1, 1, 1, 1]
    left = {one.meta["annotation_token"] for one in relaxed.conversations("train")}
    assert token not in left
    assert again in left  # the first of its captions counts
    with pytest.raises(UserError, match=r"broken_captions must be 0 or more, not -1"):
        TOD3CapConfig(broken_captions=-1)
