"""Language files that JSON or pickle allow for, or downloads come as: read, or one sentence."""

import json
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from datamodules import caption_stream
from datamodules.array_pickles import load_arrays
from datamodules.caption_stream import CaptionStream
from datamodules.gpt_driver import GPTDriverConfig
from datamodules.language_files import read_json, read_json_lines
from datamodules.nucaption import NuCaptionConfig
from datamodules.nuscenes_qa import NuScenesQAConfig
from datamodules.nux import NuXConfig
from datamodules.tod3cap import TOD3CapConfig
from odvla.errors import UserError

CAPTIONS = "final_caption_bbox_token.json"
MARK = "\ufeff"  # of the byte order, as some editors put it
HALF = "\\ud83d"  # JSON's escape of half a character


@pytest.fixture
def language(root, tmp_path):
    """Path and text of a copied file, to be changed."""

    def copied(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, (root / "language" / name).read_text()

    return copied


@pytest.fixture
def told(root, tmp_path, build):
    """What a data set says of the files below tmp_path."""

    def references(config, **settings):
        data = build(config, root, language_root=str(tmp_path), **settings)
        data.prepare_data()
        return [conversation.reference for conversation in data.conversations("train")]

    return references


JSON_FILES = {
    "nucaption/train.json": NuCaptionConfig,
    "nuscenes_qa/NuScenes_train_questions.json": NuScenesQAConfig,
    "nux/Nu_X_train.json": NuXConfig,
    CAPTIONS: TOD3CapConfig,
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_byte_order_marks_and_line_ends_change_nothing(name, root, language, told, build):
    path, text = language(name)
    data = build(JSON_FILES[name], root)
    data.prepare_data()
    before = [conversation.reference for conversation in data.conversations("train")]
    spread = json.dumps(json.loads(text), indent=1).replace("\n", "\r\n")
    path.write_bytes((MARK + spread + "\r\n").encode())
    assert told(JSON_FILES[name]) == before


@pytest.mark.parametrize("chunk", [2, 7, 1 << 18])
def test_a_stream_goes_on_behind_a_byte_order_mark(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(caption_stream, "CHUNK", chunk)
    path = tmp_path / "captions.json"
    path.write_text(MARK + '{"ä": {}, "b": {}}', encoding="utf-8")
    stream = CaptionStream(path)
    assert next(iter(stream)).token == "ä"
    assert path.read_bytes()[: stream.offset].decode() == MARK + '{"ä": {}'
    assert [one.token for one in CaptionStream(path, stream.offset)] == ["b"]


DAMAGE = {
    "too deep": ("[" * 100_000, "is not JSON"),
    "a number without end": ('{"a": ' + "9" * 5000 + "}", "is not JSON.*: Exceeds the limit"),
    "a page that asks to sign in": ("<!DOCTYPE html>", "is not JSON"),
    "a pointer of git-lfs": ("version https://git-lfs.github.com/spec/v1\n", "is not JSON"),
    "nothing": ("", "is not JSON"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_json_is_said(text, message, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(path)
    path.write_text(f"[]\n{text or '{'}")
    with pytest.raises(UserError, match=rf"line 2 {message}"):
        list(read_json_lines(path))
    path.write_text('{"t0": ' + (text or "}"))
    with pytest.raises(UserError, match=message):
        list(CaptionStream(path))


def test_what_cannot_be_read_is_said(tmp_path):
    for read in (read_json, lambda path: list(read_json_lines(path))):
        with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
            read(tmp_path)
    path = tmp_path / "train.json"
    path.write_bytes('["Straße"]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.json is not text in UTF-8"):
        read_json(path)


def test_half_a_character_is_named_before_a_tokenizer_meets_it(language, told):
    path, text = language("nucaption/train.json")
    records = json.loads(text)
    path.write_text(text.replace(f'"{records[4]["answer"]}"', f'"so {HALF}"'))
    with pytest.raises(UserError, match=r"record \d+: field 'answer' has half a character"):
        told(NuCaptionConfig)
    path, text = language("nux/Nu_X_train.json")
    path.write_text(text[:-1] + f', "{HALF}": {{"narration": "a", "reasoning": "b"}}}}')
    told(NuXConfig)  # a token that no root has
    path, text = language(CAPTIONS)
    caption = next(iter(json.loads(text).values()))["final_caption"]
    path.write_text(text.replace(f'"{caption}"', f'"so {HALF}"'))
    with pytest.raises(UserError, match=r"field 'final_caption' has half a character"):
        told(TOD3CapConfig)
    told(TOD3CapConfig, broken_captions=1)
    path.write_text(text[:-1] + f', "{HALF}": {{}}}}')
    with pytest.raises(UserError, match=r"has half a character"):
        told(TOD3CapConfig)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("motion_caption", {"x_vel": None, "y_vel": "0.5", "bev_vel": [0.5, 1.0]}),
        ("map_caption", {"map_caption": None}),
        (None, {"relation_caption": None}),
        (None, {"2d_bbox": None, "3d_size": "unknown", "of a later version": {}}),
    ],
)
def test_parts_whose_kind_is_told_nowhere_may_be_anything(language, told, part, values):
    path, text = language(CAPTIONS)
    records = json.loads(text)
    record = next(iter(records.values()))
    (record if part is None else record[part]).update(values)
    path.write_text(json.dumps(records))
    assert told(TOD3CapConfig)


EMPTY = {
    "nucaption/train.json": "[]",
    "nuscenes_qa/NuScenes_train_questions.json": '{"info": {}, "questions": []}',
    "nux/Nu_X_train.json": "{}",
    CAPTIONS: "{}",
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_without_records_is_refused(name, language, told):
    path, _ = language(name)
    path.write_text(EMPTY[name])
    with pytest.raises(UserError, match=rf"{path.name}: it holds no record"):
        told(JSON_FILES[name])


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_brings_what_is_harmless(tmp_path, protocol):
    path = tmp_path / "cache.pkl"
    content = OrderedDict(
        token={1, "a"}, other=[frozenset([2]), 1j, b"x", np.array(["a"]), np.float32(2)]
    )
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_arrays(path) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_ego_lcf_feat": np.array([np.nan, *range(8)])}, r"'gt_ego_lcf_feat' must be finite"),
        ({"token": "another"}, r"its field 'token' is 'another'"),
    ],
)
def test_what_a_cached_record_says_of_itself_must_hold(root, language, told, change, message):
    path = language("nux/Nu_X_train.json")[0].parent.parent / "gpt_driver/cached_nuscenes_info.pkl"
    path.parent.mkdir()
    cache = pickle.loads((root / "language/gpt_driver/cached_nuscenes_info.pkl").read_bytes())
    token = next(iter(cache))
    cache[token] |= change
    path.write_bytes(pickle.dumps(cache))
    with pytest.raises(UserError, match=rf"{token}: .*{message}"):
        told(GPTDriverConfig)
