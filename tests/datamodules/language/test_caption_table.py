"""The caption table: streamed records against json, its order, its cache, its memory, refusals."""

import json
import pickle
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest

from datamodules import caption_stream
from datamodules.agents import learnable_mask, learnable_rows
from datamodules.caption_stream import CaptionStream
from datamodules.caption_table import ensure_table, open_table
from datamodules.columns import write_columns
from datamodules.index_file import SCHEMA_VERSION, cache_folder, load_index, map_index
from datamodules.records import AgentPaths, Annotations
from datamodules.tod3cap import TOD3CapConfig
from odvla.errors import UserError

EXTENT_M = (-32.0, 32.0, -32.0, 32.0)


@pytest.fixture
def record(caption_record):
    """Makes the record of a number; it moves at a speed that nuScenes does not know."""
    unknown = (float("nan"),) * 3

    def made(number, sample="s"):
        return caption_record(sample, f"Ein Auto, größer als {number}.", unknown)

    return made


def _write(path, count, record):
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f'{"," if number else "{"}\n "t{number}": {json.dumps(record(number))}')
        file.write("}\n")
    return path


@pytest.mark.parametrize("chunk", [64, 500, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_streaming_reads_what_json_reads(tmp_path, monkeypatch, chunk, indent, record):
    monkeypatch.setattr(caption_stream, "CHUNK", chunk)
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({f"t{k}": record(k, f"s{k}") for k in range(20)}, indent=indent))
    whole = json.loads(path.read_text())
    expected = [(t, r["sample_token"], r["final_caption"]) for t, r in whole.items()]
    assert list(CaptionStream(path)) == expected


def _shuffled(index, path, record):
    """Every annotation's caption in any order, with some of other roots in between."""
    tokens = index.annotations.token.tolist()
    order = np.random.default_rng(0).permutation(len(tokens)).tolist()
    records = {}
    for k in order:
        sample = index.frames[int(index.annotations.frame[k])].token
        records[tokens[k].decode()] = record(k, sample)
        if k % 10 == 0:
            records[f"elsewhere{k}"] = record(k, "nowhere")
            records[f"gone{k}"] = record(k, sample)
    path.write_text(json.dumps(records))
    return records


@pytest.fixture
def index(circle_root):
    return load_index(circle_root, "v1.0-mini")


def test_captions_lie_by_key_frame_in_the_order_of_the_file(index, tmp_path, record):
    records = _shuffled(index, tmp_path / "captions.json", record)
    table = open_table(ensure_table(tmp_path / "captions.json", index))
    in_file = list(records)
    for copy in (table, pickle.loads(pickle.dumps(table))):
        for frame in index.frames:
            expected = [
                (index.annotation_rows[token], one["final_caption"], in_file.index(token))
                for token, one in records.items()
                if one["sample_token"] == frame.token and token in index.annotation_rows
            ]
            numbers = range(*copy.first[frame.number : frame.number + 2].tolist())
            found = [(int(copy.row[n]), copy.text(n), int(copy.place[n])) for n in numbers]
            assert found == expected
    elsewhere = [t for t in records if t.startswith("elsewhere")]
    assert table.elsewhere == (len(elsewhere), elsewhere[0])
    gone = [t for t in records if t.startswith("gone")]
    assert [t.decode() for t in table.missing_token] == gone
    assert len(pickle.dumps(table)) < 1000


def test_a_table_is_made_once_and_again_when_the_file_changes(index, tmp_path, record):
    path = tmp_path / "captions.json"
    _shuffled(index, path, record)
    table = ensure_table(path, index)
    made = table.stat().st_mtime_ns
    assert ensure_table(path, index).stat().st_mtime_ns == made
    first = open_table(table).text(0)
    table.write_bytes(b"cut")
    assert open_table(ensure_table(path, index)).text(0) == first
    _write(path, 5, record)
    assert open_table(ensure_table(path, index)).elsewhere == (5, "t0")


def _peak(path):
    tracemalloc.start()
    count = sum(1 for _ in CaptionStream(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak


def test_memory_does_not_grow_with_the_records(tmp_path, record):
    few, small = _peak(_write(tmp_path / "few.json", 3000, record))
    many, large = _peak(_write(tmp_path / "many.json", 20000, record))
    assert (few, many) == (3000, 20000)
    assert large < 1.2 * small


def _tiled(index, times, folder):
    """A root with every annotation `times` times (tokens differ), as a file that is mapped."""
    arrays = dict(index.arrays)
    rows = np.repeat(np.arange(len(index.annotations.frame)), times)
    for prefix, kind in (("annotation", Annotations), ("path", AgentPaths)):
        for field in fields(kind):
            name = f"{prefix}.{field.name}"
            if name in arrays:
                arrays[name] = arrays[name][rows]
    arrays["annotation.token"] = np.array([f"{k:032x}".encode() for k in range(len(rows))])
    arrays["annotation.by_token"] = np.arange(len(rows))
    arrays["frame.annotations"] = arrays["frame.annotations"] * times
    facts = {"kind": "odvla index", "schema_version": str(SCHEMA_VERSION), "version": index.version}
    write_columns(folder / "index.arrow", arrays, {**facts, "fingerprint": "f", "sources": "{}"})
    return map_index(folder / "index.arrow", index.root)


def test_a_source_of_many_captions_holds_none_of_their_texts(index, tmp_path, monkeypatch, record):
    """As Python tuples the texts alone would be over 3 MB, and pickled for each worker."""
    big = _tiled(index, 200, tmp_path)
    count = len(big.annotations.frame)
    assert count > 15_000
    path = tmp_path / "captions.json"
    with path.open("w") as file:
        for row, frame in enumerate(big.annotations.frame.tolist()):
            one = record(row, big.frames[frame].token) | {"final_caption": f"{row} " * 30}
            file.write(f'{"," if row else "{"}"{row:032x}": {json.dumps(one)}')
        file.write("}")
    config = TOD3CapConfig(str(big.root), caption_file=str(path), sampling="random:50%")
    data = config.build()
    monkeypatch.setattr(type(data), "index", big)
    ensure_table(path, big)
    tracemalloc.start()
    source = data.source("train")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2e6
    assert len(pickle.dumps(source)) < 2 * count + 20_000
    # The same objects that learnable_rows has, found for all key-frames at once; half of them kept.
    near = [learnable_rows(big, frame, EXTENT_M).tolist() for frame in big.frames]
    mask = learnable_mask(big, np.arange(count), EXTENT_M)
    assert np.flatnonzero(mask).tolist() == [row for rows in near for row in rows]
    (report,) = source.reports
    train = sum(len(near[f]) for s in big.scenes_of("train") for f in range(s.first, s.last))
    assert report.joined == train
    assert report.kept == -(-train // 2) == sum(map(source.count, range(len(big.frames))))


WHOLE = "a whole record"
MISFITS = [
    ("[]", "must hold an object"),
    ("", "must hold an object"),
    ('{"t0": {"sample_token": "s", "final_caption"', "is not JSON"),
    (WHOLE, "is not JSON"),  # and no bracket behind it
    (WHOLE + "} x", "is not JSON"),
    ('{"t0": {"sample_token": "s"}}', "t0: field 'final_caption' is missing"),
    ('{"t0": 3}', "t0: expected an object"),
]


@pytest.mark.parametrize("chunk", [7, 64, 500, 1 << 18])
def test_a_stream_goes_on_behind_any_record(tmp_path, monkeypatch, chunk, record):
    monkeypatch.setattr(caption_stream, "CHUNK", chunk)
    path = tmp_path / "captions.json"
    records = {f"tök{k}": record(k, f"s{k}") for k in range(9)}
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    whole, content = list(CaptionStream(path)), path.read_bytes()
    stream = CaptionStream(path)
    for number, row in enumerate(stream, 1):
        assert row == whole[number - 1]
        assert json.loads(content[: stream.offset] + b"}")[row[0]]["final_caption"] == row[2]
        assert list(CaptionStream(path, stream.offset)) == whole[number:]
    assert list(CaptionStream(path, stream.offset)) == []


def test_a_number_that_a_chunk_cuts_is_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_stream, "CHUNK", 8)
    path = tmp_path / "captions.json"
    path.write_text('{"a": 1234567}')
    assert [one.token for one in CaptionStream(path)] == ["a"]


@pytest.mark.parametrize(("text", "message"), MISFITS)
def test_what_does_not_fit_is_named_and_leaves_no_table(index, tmp_path, text, message, record):
    path = tmp_path / "captions.json"
    path.write_text(text.replace(WHOLE, json.dumps({"t0": record(0)})[:-1]))
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            ensure_table(path, index)
    assert not list(cache_folder().glob(".captions-*.partial"))


def test_a_second_caption_of_an_annotation_is_named(index, tmp_path, record):
    path = tmp_path / "captions.json"
    token = index.annotations.token[3].decode()
    one = json.dumps(record(0, index.frames[int(index.annotations.frame[3])].token))
    path.write_text(f'{{"{token}": {one}, "{token}": {one}}}')
    with pytest.raises(
        UserError, match=f"{token}: its annotation has a second caption; it is the first of 1"
    ):
        ensure_table(path, index)
