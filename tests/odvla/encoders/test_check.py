"""check_encoder finds each kind of broken encoder, and passes one without BEV."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from odvla.encoders.check import check_encoder
from odvla.encoders.protocol import EncoderState, fake_frames
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.types import BevGrid, Frames, SceneFeatures

GRID = BevGrid(-8.0, -8.0, 4.0, 4, 4)


class Plain(nn.Module):
    """A strided convolution, optionally with a memory, broken in one chosen way."""

    dim = 8

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.grid = GRID if fault in ("state", "carry") else None
        self.backbone = nn.Conv2d(3, 8, 16, stride=16)
        self.unused = nn.Linear(2, 2) if fault == "unused" else None

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState | None]:
        level = self.backbone(frames.images.flatten(0, 1) / 255).unflatten(0, (-1, 6))
        if self.fault == "rows":
            level = level + level.mean(0, keepdim=True)
        if self.fault == "nan":
            level = level / 0
        if self.grid is None:
            return SceneFeatures(levels=(level,)), None
        bev = level[:, 0].mean((-1, -2))[:, None, None].expand(-1, 4, 4, -1)
        if state is not None:
            keep = torch.ones_like(frames.scene_start)
            if self.fault == "carry":
                keep = ~frames.scene_start
            bev = bev + torch.where(keep[:, None, None, None], state.bev, torch.zeros(()))
        valid: Tensor = torch.ones_like(frames.scene_start)
        return SceneFeatures((level,), bev, GRID), EncoderState(bev, frames.lidar_to_global, valid)


@dataclass(frozen=True)
class PlainConfig:
    """Builds Plain."""

    fault: str = ""

    def build(self) -> Plain:
        return Plain(self.fault)


@pytest.mark.parametrize("fault", ["", "carry"])
def test_sound_encoders_pass(fault: str) -> None:
    check_encoder(PlainConfig(fault))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("rows", "a row's features depend on the other rows"),
        ("nan", "features are not finite"),
        ("unused", r"no gradient reaches the parameter unused\.weight"),
        ("state", "scene_start does not forget the state"),
    ],
)
def test_broken_encoders_are_named(fault: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_encoder(PlainConfig(fault))


def test_without_bev_there_are_scene_tokens_but_no_agents() -> None:
    encoder = Plain("")
    frames = fake_frames(2)
    features, _ = encoder(frames, None)
    sampler = SceneSamplerConfig(source="levels", rows=2, columns=3).build(8, encoder.grid)
    tokens, _ = sampler(features, frames, None)
    assert tokens.feats.shape == (2, 36, 8)
    with pytest.raises(ValueError, match="agent queries need the feature 'bev'"):
        AgentQueriesConfig().build(8, encoder.grid)
