"""Weights on disk: whole, strict, tied."""

import hashlib

import pytest
import torch
from torch import nn

from odvla.errors import UserError
from odvla.weights import file_sha256, load_weights, save_weights, tensor_sha256


class Tied(nn.Module):
    """Output layer and embedding are one tensor."""

    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embed.weight


def test_weights_come_back_and_ties_hold(tmp_path):
    first, second = Tied(), Tied()
    first.norm.running_mean += 1
    digest = save_weights(first, tmp_path / "w.safetensors")
    assert digest == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    load_weights(second, tmp_path / "w.safetensors")
    for name, tensor in first.state_dict().items():
        assert tensor.equal(second.state_dict()[name]), name
    assert second.head.weight is second.embed.weight
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_load_is_strict(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(Tied(), path)
    with pytest.raises(UserError, match=r"embed\.weight.*shape \(6, 4\).*\(6, 5\)"):
        load_weights(Tied(5), path)
    with pytest.raises(UserError, match=r"lack 'weight'"):
        load_weights(nn.Linear(4, 4), path)
    larger = nn.Sequential(nn.Linear(2, 2))
    save_weights(larger, path)
    with pytest.raises(UserError, match=r"hold '0\.bias'"):
        load_weights(nn.Sequential(nn.Linear(2, 2, bias=False)), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(larger, path)
    with pytest.raises(UserError, match="do not exist"):
        load_weights(larger, tmp_path / "none")


def test_a_digest_tells_value_type_and_shape_apart(tmp_path):
    one = torch.arange(4.0)
    digests = {
        tensor_sha256(t) for t in (one, one + 1, one.view(2, 2), one.double(), one.bfloat16())
    }
    assert len(digests) == 5
    assert tensor_sha256(one) == tensor_sha256(torch.arange(8.0).view(4, 2).t()[0] / 2)
    (tmp_path / "f").write_bytes(b"x")
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"x").hexdigest()
