"""Folders, indices and shards as Hugging Face lays them out; what is wrong with one is named."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from odvla.checkpoints import reading
from odvla.checkpoints.reading import open_checkpoint
from odvla.checkpoints.stored import StoredTensor
from odvla.checkpoints.writing import write_folder, write_safetensors
from odvla.errors import UserError

TENSORS = {
    "b.weight": torch.randn(3, 4),
    "a.half": torch.randn(5).half(),
    "a.brain": torch.randn(7, 1).bfloat16(),
    "a.count": torch.tensor(12),
    "a.flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 2),
}


def stored(tensors):
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def values(checkpoint):
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def write_shards(folder, suffix=".safetensors", stem="model"):
    """Two shards and their index, by the libraries themselves."""
    places = {}
    for number, names in enumerate((list(TENSORS)[:2], list(TENSORS)[2:]), start=1):
        file = f"{stem}-{number:05}-of-00002{suffix}"
        part = {name: TENSORS[name] for name in names}
        if suffix == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        places |= dict.fromkeys(names, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
@pytest.mark.parametrize("named", ["folder", "index", "without index"])
def test_shards_are_one_checkpoint(tmp_path, suffix, stem, named):
    index, _ = write_shards(tmp_path, suffix, stem)
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    if named == "without index":
        index.unlink()
    opened = open_checkpoint(index if named == "index" else tmp_path)
    assert_same(values(opened), TENSORS)
    assert len(opened.files) == 2


def test_one_file_and_a_folder_with_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "any.safetensors")
    assert_same(values(open_checkpoint(tmp_path)), TENSORS)
    assert_same(values(open_checkpoint(tmp_path / "any.safetensors")), TENSORS)
    (tmp_path / "any.safetensors").rename(tmp_path / "any.bin")  # the content tells
    assert open_checkpoint(tmp_path / "any.bin").format == "safetensors"


@pytest.mark.parametrize(("limit", "opened"), [(1 << 28, 1), (0, len(TENSORS))])
def test_a_file_is_opened_anew_when_much_of_it_was_read(tmp_path, monkeypatch, limit, opened):
    save_file(TENSORS, tmp_path / "any.safetensors")
    checkpoint, calls = open_checkpoint(tmp_path), []
    monkeypatch.setattr(reading, "REOPEN_BYTES", limit)
    safe_open = reading.safe_open
    monkeypatch.setattr(reading, "safe_open", lambda *a: calls.append(a) or safe_open(*a))
    assert_same(values(checkpoint), TENSORS)
    assert len(calls) == opened


def test_what_is_written_is_what_the_library_reads(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", stored(TENSORS))
    assert_same(load_file(tmp_path / "w.safetensors"), TENSORS)


@pytest.mark.parametrize("limit", [1, 40, 10**9])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_cut_at_the_limit(tmp_path, limit, suffix):
    write_folder(tmp_path, "model", stored(TENSORS), suffix=suffix, limit=limit)
    shards = list(tmp_path.glob(f"*{suffix}"))
    assert (len(shards) == 1) == (limit == 10**9)
    if suffix == ".safetensors" and limit == 40:
        for shard in shards:
            content = load_file(shard)
            size = sum(t.numel() * t.element_size() for t in content.values())
            assert size <= limit or len(content) == 1
    if suffix == ".safetensors":
        found = {name: t for shard in shards for name, t in load_file(shard).items()}
        assert_same(found, TENSORS)
        assert_same(values(open_checkpoint(tmp_path)), TENSORS)


def test_a_missing_shard_is_named(tmp_path):
    index, places = write_shards(tmp_path)
    (tmp_path / places["none"]).unlink()
    with pytest.raises(UserError, match=r"names the shard model-00002-of-00002.* missing"):
        open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"shard .*model-00002-of-00002.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_two_shards_with_one_key_are_refused(tmp_path):
    _, places = write_shards(tmp_path)
    save_file({**TENSORS}, tmp_path / places["none"])
    with pytest.raises(UserError, match=r"is in both .*00001.* and .*00002"):
        open_checkpoint(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    index, places = write_shards(tmp_path)

    def rewrite(**changed):
        index.write_text(json.dumps({"weight_map": {**places, **changed}}))

    rewrite(more=places["none"])
    with pytest.raises(UserError, match="has 'more' in model-00002"):
        open_checkpoint(tmp_path)
    rewrite(none="../outside.safetensors")
    with pytest.raises(UserError, match="not a file beside it"):
        open_checkpoint(tmp_path)
    del places["none"]
    rewrite()
    with pytest.raises(UserError, match="does not list 'none'"):
        open_checkpoint(tmp_path)
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match="is not JSON with a weight_map"):
            open_checkpoint(tmp_path)


def test_what_cannot_be_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="nothing of the kind"):
        open_checkpoint(tmp_path)
    file = tmp_path / "w.pth"
    for content, said in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html>", "neither PyTorch's nor safetensors"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            open_checkpoint(file)
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"holds w\.pth, x\.safetensors; name one"):
        open_checkpoint(tmp_path)


def test_a_truncated_safetensors_file_is_named(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    for length in range(1, len(whole), 23):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.safetensors"):
            open_checkpoint(file)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    tensors = {f"t{n}": torch.randn(1 << 18) for n in range(40)}  # 1 MiB each
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path)
    tracemalloc.start()
    try:
        write_folder(tmp_path, "model", opened.tensors, limit=10**7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1 << 20 <= peak < 4 << 20
    assert_same(values(open_checkpoint(tmp_path)), tensors)
