"""Backbones of timm, where timm is installed; and what is said where it is not."""

import sys

import pytest
import torch

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.check import check_encoder
from odvla.encoders.lift_splat import LiftSplatConfig
from odvla.encoders.timm_backbone import TimmBackboneConfig
from odvla.errors import UserError

KINDS = {
    "resnet18": {},
    "convnext_atto": {"outputs": (1, 2, 3)},
    "efficientnet_b0": {},
    "swin_tiny_patch4_window7_224": {
        "outputs": (1, 2),
        "options": (("strict_img_size", False),),
    },
    "vit_tiny_patch16_224": {"outputs": (5, 11), "options": (("dynamic_img_size", True),)},
}


@pytest.fixture
def timm():
    try:
        import timm
    except (ImportError, RuntimeError):  # of a torchvision that does not fit torch
        pytest.skip("timm is not installed, or cannot be imported here")
    return timm


@pytest.mark.parametrize("name", list(KINDS))
def test_channels_and_strides_are_what_comes_out(timm, name):
    config = TimmBackboneConfig(name, **KINDS[name])
    maps = config.build().eval()(torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8))
    assert tuple(one.shape[1] for one in maps) == config.channels
    for feature, stride in zip(maps, config.strides, strict=True):
        padded = [-(-side // config.multiple) * config.multiple for side in (90, 160)]
        assert feature.shape[-2:] == tuple(side // stride for side in padded)


@torch.no_grad()
def test_weights_of_a_file_give_timms_own_features(timm, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = TimmBackboneConfig("resnet18", weights=str(tmp_path / "weights.pth")).build().eval()
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    mean, std = (
        torch.tensor(theirs.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")
    )
    expected = theirs.forward_features((images / 255 - mean) / std)
    torch.testing.assert_close(ours(images)[-1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"is not timm's resnet34: layer1\.2\.bn1\.bias"):
        TimmBackboneConfig("resnet34", weights=str(tmp_path / "weights.pth")).build()


def test_it_stands_in_bevformer_and_lift_splat(timm):
    backbone = TimmBackboneConfig("resnet18")
    grid = {"dim": 16, "rows": 8, "columns": 8}
    check_encoder(BEVFormerConfig(backbone=backbone, layers=1, hidden=16, heads=2, **grid))
    check_encoder(LiftSplatConfig(backbone=backbone, **grid))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "nonsense"}, "cannot make backbone 'nonsense'"),
        ({"outputs": (7,)}, r"with outputs \[7\]"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(timm, settings, message):
    with pytest.raises(UserError, match=message):
        TimmBackboneConfig(**settings)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"there is no file /nowhere/weights\.pth"):
        TimmBackboneConfig(weights="/nowhere/weights.pth")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'odvla\[timm\]'"):
        TimmBackboneConfig("resnet26")
