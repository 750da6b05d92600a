"""Every weight of the released models has one name of ours, and leads back to its own."""

import json

import pytest
import torch

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.errors import UserError
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.queries.trackformer import TrackFormerConfig
from odvla.weight_names import UNIAD, UNUSED, to_odvla


@pytest.fixture(scope="module")
def released(shared):
    return json.loads((shared / "golden" / "state_dict_keys_uniad_track_map.json").read_text())


def test_every_released_weight_is_mapped_once_or_unused_with_a_reason(released):
    renamed = UNIAD.to_ours(released)
    assert renamed.unknown == ()
    assert set(renamed.unused) == set(UNUSED)
    assert len(renamed.names) + len(renamed.unused) == len(released)
    assert len(set(renamed.names.values())) == len(renamed.names)
    back = UNIAD.to_theirs(renamed.names.values())
    assert back.unknown == ()
    assert {old: back.names[new] for old, new in renamed.names.items()} == {
        old: old for old in renamed.names
    }


def test_the_full_size_tower_has_exactly_the_released_shapes(released):
    names = UNIAD.to_ours(released).names
    shapes = {new: tuple(released[old]["shape"]) for old, new in names.items()}
    with torch.device("meta"):
        encoder = BEVFormerConfig().build()
        tracks = TrackFormerConfig().build(256, encoder.grid)
        elements = PanopticMapConfig(compat="uniad").build(256, encoder.grid)
    own = {f"encoder.{n}": tuple(t.shape) for n, t in encoder.state_dict().items()}
    own |= {f"queries.track.{n}": tuple(t.shape) for n, t in tracks.state_dict().items()}
    own |= {f"queries.map.{n}": tuple(t.shape) for n, t in elements.state_dict().items()}
    assert own == shapes


def test_old_names_of_deformable_offsets_are_understood():
    renamed = UNIAD.to_ours(["img_backbone.layer3.4.conv2_offset.weight"])
    assert list(renamed.names.values()) == ["encoder.backbone.layer3.4.conv2.conv_offset.weight"]


def test_an_unknown_name_is_named():
    with pytest.raises(UserError, match=r"'planning_head\.x' is no weight"):
        to_odvla({"planning_head.x": torch.zeros(1)})
