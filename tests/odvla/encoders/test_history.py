"""History of a training clip against computing it anew for every frame, as UniAD does."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.history import after_history, uniad_history
from odvla.encoders.protocol import fake_frames
from odvla.encoders.resnet import ResNetConfig

CONFIG = BEVFormerConfig(
    backbone=ResNetConfig(depth=50, base_channels=2, deformable_stages=()),
    dim=8,
    rows=6,
    columns=6,
    layers=1,
    heads=2,
    hidden=8,
    dropout=0.5,
)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return CONFIG.build()


def clip_of(starts):
    """Frames of two rows; starts: one pair a frame."""
    return tuple(
        replace(fake_frames(2, (32, 32), step=step), scene_start=torch.tensor(start))
        for step, start in enumerate(starts)
    )


def test_it_is_what_computing_it_anew_for_every_frame_gives(encoder):
    clip = clip_of([(True, True), (False, False), (False, False)])
    encoder.train()
    found = uniad_history(encoder, clip, None)
    encoder.eval()
    with torch.no_grad():
        for step in range(3):
            state = None
            for frames in clip[: max(step, 1)]:  # the first frame is its own history
                _, state = encoder(frames, state)
            torch.testing.assert_close(found[step].bev, state.bev)
            assert found[step].valid.all()


def test_a_scene_that_starts_inside_a_clip_is_its_own_history(encoder):
    clip = clip_of([(True, True), (False, True), (False, False)])
    states = uniad_history(encoder, clip, None)
    own = uniad_history(encoder, clip[1:], None)
    torch.testing.assert_close(states[1].bev[1], own[0].bev[1])
    torch.testing.assert_close(states[2].bev[1], own[1].bev[1])
    assert not torch.allclose(states[1].bev[0], own[0].bev[0])
    first = after_history(clip[0])
    assert not first.scene_start.any()
    # So the encoder does use that history.
    encoder.eval()
    with torch.no_grad():
        assert not torch.allclose(encoder(first, states[0])[0].bev, encoder(clip[0], None)[0].bev)


def test_a_scene_that_goes_on_keeps_what_was_known_before(encoder):
    clip = clip_of([(True, True), (False, False), (False, True)])
    (first, *rest) = uniad_history(encoder, clip, None)
    going_on = uniad_history(encoder, clip[1:], first)
    for a, b in zip(rest, going_on, strict=True):
        torch.testing.assert_close(a.bev, b.bev)


def test_modes_are_left_as_they_were_and_no_gradient_comes_through(encoder):
    encoder.train()
    encoder.backbone.eval()
    states = uniad_history(encoder, clip_of([(True, True)]), None)
    assert encoder.training
    assert encoder.layers[0].ffn.training
    assert not encoder.backbone.training
    assert not states[0].bev.requires_grad


def test_an_encoder_without_memory_has_no_history():
    class Forgetful(nn.Module):
        def forward(self, frames, state):
            return None, None

    assert uniad_history(Forgetful(), clip_of([(True, True)] * 2), None) == (None, None)
