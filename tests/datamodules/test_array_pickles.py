"""Pickles of arrays: code in them is never reached, and what is written piecewise is one pickle."""

import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.array_pickles import load_arrays, load_packed, write_dict, write_infos
from datamodules.exchange.formats import FORMATS, read_file
from odvla.errors import UserError


class _Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


class _TensorAttack:
    """A tensor whose numbers are a pickle with code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        inner = pickle.dumps(_Attack(self.target), protocol=2)
        return (torch.storage._load_from_bytes, (inner,))


@pytest.mark.parametrize("attack", [_Attack, _TensorAttack])
@pytest.mark.parametrize("form", list(FORMATS.values()), ids=lambda form: form.name)
def test_no_format_runs_code(form, attack, tmp_path):
    target = tmp_path / "touched"
    evil = attack(target)
    content = {"infos": [{"token": evil}], "metadata": {}} if form.listed else {"token": evil}
    path = tmp_path / "file.pkl"
    for protocol in (0, 2, 4, 5):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(UserError, match=r"file\.pkl is (refused: it names|not a whole)"):
            read_file(path, form)
    assert not target.exists()
    pickle.loads(pickle.dumps(_Attack(target)))  # the attack works where nobody looks
    assert target.exists()


def test_a_file_written_piecewise_is_one_pickle(tmp_path):
    path = tmp_path / "new" / "file.pkl"
    records = {
        f"token{k}": {"a": np.full((2, 3), k), "names": np.array(["car", "bus"]), "same": ["x"] * k}
        for k in range(4)
    }
    assert write_dict(path, records.items()) == 4
    for loaded in (pickle.loads(path.read_bytes()), load_arrays(path)):
        assert list(loaded) == list(records)
        for token, record in records.items():
            assert repr(loaded[token]) == repr(record)
    assert write_infos(path, records.values(), {"version": "v1.0-mini"}) == 4
    loaded = load_arrays(path)
    assert list(loaded) == ["infos", "metadata"]
    assert repr(loaded["infos"]) == repr(list(records.values()))
    # Names of numpy 1, which the reference runs on, and a protocol that Python 3.8 reads.
    names = {o[1] for o in pickletools.genops(path.read_bytes()) if o[0].name == "GLOBAL"}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    assert path.read_bytes()[:2] == b"\x80\x03"


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.pkl"
    write_dict(path, [("a", 1)])

    def failing():
        yield "b", 2
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_dict(path, failing())
    assert load_arrays(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_cells_are_packed_whatever_wrote_them(tmp_path, protocol, dtype):
    cells = np.random.default_rng(0).random((1, 3, 5, 7)) < 0.3
    path = tmp_path / "file.pkl"
    content = {
        "plain": cells.astype(dtype) * 2,
        "fortran": np.asfortranarray(cells.astype(dtype)),
        "tensor": torch.from_numpy(cells.astype(dtype)).transpose(2, 3),
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    packed = load_packed(path)
    for name in ("plain", "fortran"):
        np.testing.assert_array_equal(packed[name].unpacked(), cells)
        assert packed[name].bits.nbytes == 14  # 105 bits
    np.testing.assert_array_equal(packed["tensor"] > 0, np.swapaxes(cells, 2, 3))
