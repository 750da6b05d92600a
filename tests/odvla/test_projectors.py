"""Projectors: the released layout, and its numbers."""

import pytest
import torch

from odvla.errors import UserError
from odvla.projectors import ProjectorConfig


def test_the_paper_projector_has_the_size_and_names_of_the_released_one():
    projector = ProjectorConfig().build(256, 896)
    assert sum(p.numel() for p in projector.parameters()) == 1_033_984
    assert set(projector.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert projector(torch.randn(2, 5, 256)).shape == (2, 5, 896)


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="'mlp3x'"):
        ProjectorConfig("mlp3x")
