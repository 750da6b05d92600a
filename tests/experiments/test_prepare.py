"""Settling on a data root."""

import pytest

from experiments.prepare import prepare_data
from experiments.tiny import smoke
from odvla.config import apply_overrides
from odvla.errors import UserError


def test_a_version_the_town_cannot_be_is_named_before_anything_is_made(tmp_path):
    changes = [f"data.root={tmp_path}", "data.version=v1.0-trainval"]
    with pytest.raises(UserError, match=r"holds no v1.0-trainval, and .*10 scenes .* v1.0-mini"):
        prepare_data(apply_overrides(smoke(), changes), progress=False)
    assert not list(tmp_path.iterdir())


def test_given_data_of_another_version_is_taken(town_root):
    changes = [f"data.root={town_root}", "data.version=v1.0-trainval"]
    config = prepare_data(apply_overrides(smoke(), changes), progress=False)
    assert config.data.folder == town_root
