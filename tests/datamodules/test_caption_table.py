"""The caption table: streamed records against json, its cache, its memory, its refusals."""

import json
import tracemalloc

import pytest

from datamodules import caption_table
from datamodules.caption_table import caption_rows, ensure_table, stream_records
from datamodules.index_file import cache_folder
from odvla.errors import UserError


def _record(number):
    return {
        "sample_token": f"s{number}",
        "final_caption": f"Ein Auto, größer als {number}.",
        "motion_caption": {"motion_caption": "moving", "x_vel": float("nan")},
    }


def _write(path, count):
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f'{"," if number else "{"}\n "t{number}": {json.dumps(_record(number))}')
        file.write("}\n")
    return path


@pytest.mark.parametrize("chunk", [64, 500, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_streaming_reads_what_json_reads(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(caption_table, "CHUNK", chunk)
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({f"t{k}": _record(k) for k in range(20)}, indent=indent))
    whole = json.loads(path.read_text())
    expected = [(t, r["sample_token"], r["final_caption"]) for t, r in whole.items()]
    assert list(stream_records(path)) == expected
    assert list(caption_rows(path)) == expected


def test_a_table_is_made_once_and_again_when_the_file_changes(tmp_path):
    path = _write(tmp_path / "captions.json", 3)
    table = ensure_table(path)
    made = table.stat().st_mtime_ns
    assert ensure_table(path).stat().st_mtime_ns == made
    _write(path, 5)
    assert len(list(caption_rows(path))) == 5
    table.write_bytes(b"cut")
    assert len(list(caption_rows(path))) == 5


def _peak(path):
    tracemalloc.start()
    count = sum(1 for _ in stream_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak


def test_memory_does_not_grow_with_the_records(tmp_path):
    few, small = _peak(_write(tmp_path / "few.json", 5000))
    many, large = _peak(_write(tmp_path / "many.json", 40000))
    assert (few, many) == (5000, 40000)
    assert large < 1.2 * small


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold an object"),
        ("", "must hold an object"),
        ('{"t0": {"sample_token": "s", "final_caption"', "is not JSON"),
        ('{"t0": {"sample_token": "s", "final_caption": "a"}', "is not JSON"),
        ('{"t0": {"sample_token": "s", "final_caption": "a"}} x', "is not JSON"),
        ('{"t0": {"sample_token": "s"}}', "t0: field 'final_caption' is missing"),
        ('{"t0": 3}', "t0: expected an object"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_no_table(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            list(caption_rows(path))
    assert not list(cache_folder().glob(".captions-*.partial"))
