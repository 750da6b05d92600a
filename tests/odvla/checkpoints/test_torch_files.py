"""PyTorch's files: everything torch wrote is read as torch reads it, and nothing is ever run."""

import contextlib
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from odvla.checkpoints.torch_files import read_torch_file
from odvla.errors import UserError

FORMATS = {"zip": True, "stream": False}


def save(content, path, *, new=True):
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path


def read(path):
    return {name: tensor.read() for name, tensor in read_torch_file(path).items()}


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
def test_what_torch_wrote_is_read_as_torch_reads_it(tmp_path, new):
    base = torch.arange(24.0).view(4, 6)
    tensors = OrderedDict(
        whole=base,
        turned=base.t(),
        part=base[1:3, ::2],
        row=base[2],
        none=torch.empty(0, 3),
        one=torch.tensor(7),
        wide=torch.randn(3).expand(5, 3),
        parameter=nn.Parameter(torch.randn(2)),
        **{
            str(dtype).removeprefix("torch."): torch.randn(3).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
        },
    )
    found = read(save(tensors, tmp_path / "w.pth", new=new))
    assert_same(found, tensors)


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
def test_a_checkpoint_of_mmcv_is_read_past_its_numpy_scalars(tmp_path, new):
    layer = nn.BatchNorm2d(3)
    content = {
        "meta": {
            "epoch": np.int64(6),
            "mAP": np.float64(0.38),
            "CLASSES": ["car", "truck"],
            "PALETTE": np.arange(6, dtype=np.uint8).reshape(2, 3),
            "config": "model = dict()",
            "hooks": (1, None, {2, 3}, np.dtype("int32")),
        },
        "state_dict": layer.state_dict(),  # an OrderedDict with attributes
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    path = save(content, tmp_path / "epoch_6.pth", new=new)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # what the restricted reader is there for
    assert_same(read(path), layer.state_dict())


class Touch:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Evaluate(Touch):
    """The same by a builtin."""

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


class Build(Touch):
    """Smuggled in as the state of something that is allowed."""

    def __reduce__(self):
        return OrderedDict, (), {"x": Evaluate(self.path)}


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("kind", [Touch, Evaluate, Build])
@pytest.mark.parametrize("place", ["tensor", "meta"])
def test_a_malicious_file_is_refused_and_nothing_is_run(tmp_path, new, kind, place):
    mark = tmp_path / "was-here"
    content = {"state_dict": {"a": torch.zeros(2)}, "meta": {}}
    content["state_dict" if place == "tensor" else "meta"]["b"] = kind(mark)
    path = save(content, tmp_path / "w.pth", new=new)
    with pytest.raises(UserError, match="refused, and nothing in it was run"):
        read_torch_file(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have worked


def test_a_plain_pickle_is_refused_before_its_code_is_reached(tmp_path):
    mark, path = tmp_path / "was-here", tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Evaluate(mark)))
    with pytest.raises(UserError, match=r"names builtins\.eval"):
        read_torch_file(path)
    assert not mark.exists()


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, new):
    rebuild = torch._utils._rebuild_tensor_v2

    class Fake:
        def __init__(self, tensor):
            self.storage = torch.storage.TypedStorage(
                wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
            )

        def __reduce__(self):
            return rebuild, (self.storage, 2, (5,), (1,), False, OrderedDict())

    path = save({"a": Fake(torch.zeros(4))}, tmp_path / "w.pth", new=new)
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch_file(path)


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
def test_a_truncated_file_is_named_wherever_it_is_cut(tmp_path, new):
    path = save({"a": torch.randn(100), "b": torch.randn(7, 3)}, tmp_path / "w.pth", new=new)
    whole = path.read_bytes()
    for length in range(8, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.pth"):
            read(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    content = {"state_dict": {"a": torch.arange(6.0)}, "meta": {"x": np.float32(2)}}
    return {
        name: save(content, folder / f"{name}.pth", new=new).read_bytes()
        for name, new in FORMATS.items()
    }


@given(kind=st.sampled_from(list(FORMATS)), place=st.floats(0, 1), value=st.integers(0, 255))
def test_a_damaged_file_gives_weights_or_a_sentence(sound, tmp_path_factory, kind, place, value):
    content = bytearray(sound[kind])
    content[min(int(place * len(content)), len(content) - 1)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(content)
    with contextlib.suppress(UserError):  # anything else fails the test
        read(path)


def test_what_is_no_state_dict_is_named(tmp_path):
    with pytest.raises(UserError, match="'lr' in it is no tensor"):
        read_torch_file(save({"a": torch.zeros(1), "lr": 0.1}, tmp_path / "w.pth"))
    with pytest.raises(UserError, match="holds no state dict"):
        read_torch_file(save([torch.zeros(1)], tmp_path / "w.pth"))
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "s.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(tmp_path / "s.pt")
