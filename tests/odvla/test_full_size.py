"""The tower at full size, without memory for it: as many parameters as the reference counts."""

import pytest
import torch

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.queries.trackformer import TrackFormerConfig

# Measured on the reference at OpenDriveVLA's settings.
TOTAL = 99_958_589
UNUSED_EMBEDDING = 10_240_000  # the map head's own BEV embedding, which nothing reads
LOSS_WEIGHTS = 10  # a parameter there, a setting here


@pytest.fixture(scope="module")
def tower():
    with torch.device("meta"):
        encoder = BEVFormerConfig().build()
        agents = TrackFormerConfig().build(encoder.dim, encoder.grid)
        elements = PanopticMapConfig(compat="uniad").build(encoder.dim, encoder.grid)
    return {"encoder": encoder, "agents": agents, "map": elements}


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("encoder.backbone", 44_304_894),
        ("encoder.neck", 3_278_592),
        ("encoder.bev_embedding", 10_240_000),
        ("encoder.layers", 4_940_928),
        ("encoder.can_bus_mlp", 35_968),
        ("agents.layers", 4_103_232),
        ("agents.cls_branches", 811_068),
        ("agents.reg_branches", 804_924),
        ("agents.past_branches", 814_176),
        ("agents.query_embedding", 461_312),
        ("agents.query_interaction", 659_968),
        ("agents.memory_bank", 461_568),
        ("map.encoder", 2_965_248),
        ("map.decoder", 4_547_328),
        ("map.thing_masks", 3_291_029),
        ("map.stuff_masks", 6_452_791),
    ],
)
def test_a_part_has_as_many_parameters_as_the_references(tower, path, parameters):
    name, _, inner = path.partition(".")
    assert count(tower[name].get_submodule(inner)) == parameters


def test_all_parts_together_have_the_references_number(tower):
    assert all(p.is_meta for module in tower.values() for p in module.parameters())
    assert count(*tower.values()) == TOTAL - UNUSED_EMBEDDING - LOSS_WEIGHTS
