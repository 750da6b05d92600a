"""BEVFormer against independent arithmetic, one row at a time, and with its quirk."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.activations import kept_for_backward
from odvla.encoders import bevformer
from odvla.encoders.bev_motion import can_bus_deltas, motion_of, turn_bev
from odvla.encoders.bevformer import BEVFormerConfig, pillar_points
from odvla.encoders.bevformer_layers import project_pillars
from odvla.encoders.check import check_encoder
from odvla.encoders.protocol import fake_frames
from odvla.encoders.resnet import FPN, ResNetConfig
from odvla.errors import UserError
from odvla.ops.deformable_conv import ModulatedDeformConv
from odvla.rows import rows_of

BACKBONE = ResNetConfig(depth=50, base_channels=8)
SMALL = BEVFormerConfig(
    backbone=BACKBONE,
    dim=32,
    rows=10,
    columns=12,
    layers=2,
    hidden=32,
    range_m=(-24.0, -20.0, -5.0, 24.0, 20.0, 3.0),
)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = SMALL.build().eval()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name or "conv_offset" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # as after some training
    with torch.no_grad():
        for level in model.neck.fpn_convs:
            level.weight /= 500  # an untrained ResNet's features, around 1000, magnify rounding
    return model


def drive(step):
    """Two scenes that go different ways, with CAN bus values of different sizes."""
    frames = fake_frames(2, (80, 48), seed=3, step=step)
    can = torch.zeros(2, 18)
    can[:, :2] = torch.tensor([[1.0, 2.0], [3.0, -1.0]]) * (step > 0)
    can[:, -2] = torch.tensor([0.3, 5.0])
    can[:, -1] = torch.tensor([7.0, -4.0]) * (step > 0)
    cameras = frames.cameras
    moved = cameras.lidar_to_cam.clone()
    moved[1, :, 2, 3] += 2.0  # the second scene's cameras see other cells
    return replace(frames, can_bus=can, cameras=replace(cameras, lidar_to_cam=moved))


def test_the_encoder_keeps_the_contract():
    check_encoder(SMALL)


@torch.no_grad()
def test_a_batch_of_scenes_gives_what_each_gives_alone(encoder):
    state, states = None, [None, None]
    for step in range(3):
        frames = drive(step)
        features, state = encoder(frames, state)
        for row in range(2):
            alone, states[row] = encoder(rows_of(frames, torch.tensor([row])), states[row])
            torch.testing.assert_close(features.bev[row], alone.bev[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_scene_start_forgets_the_past(encoder):
    _, state = encoder(drive(0), None)
    again = drive(0)
    kept, _ = encoder(replace(again, scene_start=torch.tensor([True, False])), state)
    fresh, _ = encoder(again, None)
    torch.testing.assert_close(kept.bev[0], fresh.bev[0])
    assert not torch.allclose(kept.bev[1], fresh.bev[1])


def test_a_turned_bev_is_what_a_loop_over_cells_gives():
    rows, columns, degrees = 8, 10, 33.0
    bev = torch.arange(1.0, 1 + rows * columns).view(1, 1, rows, columns)
    turned = turn_bev(bev, torch.tensor([degrees]))[0, 0]
    angle = math.radians(degrees)
    for row in range(rows):
        for column in range(columns):
            # Where this cell was before the map was turned counter-clockwise (y points down).
            x, y = column - (columns - 1) / 2, row - (rows - 1) / 2
            source_x = math.cos(angle) * x - math.sin(angle) * y + (columns - 1) / 2
            source_y = math.sin(angle) * x + math.cos(angle) * y + (rows - 1) / 2
            j, i = round(source_x), round(source_y)
            inside = 0 <= i < rows and 0 <= j < columns
            assert float(turned[row, column]) == (float(bev[0, 0, i, j]) if inside else 0.0)


def test_driving_ahead_shifts_along_y_whatever_the_heading():
    for heading in (0.0, 0.7, 3.0, 6.0):
        can = torch.zeros(1, 18)
        can[0, :2] = 4.0 * torch.tensor([math.cos(heading), math.sin(heading)])
        can[0, -2], can[0, -1] = heading, 5.0
        motion = motion_of(can, SMALL.grid)
        expected = torch.tensor([[0.0, 4.0 / 40.0]])
        torch.testing.assert_close(motion.shift, expected, atol=1e-6, rtol=0)
        assert motion.turn_deg.tolist() == [5.0]


def test_uniads_shift_moves_both_halves_and_ours_only_the_past():
    shift = torch.tensor([[0.1, 0.2]])
    ours = SMALL.build().places(shift)
    theirs = replace(SMALL, compat="uniad").build().places(shift)
    centres = SMALL.build().centres
    torch.testing.assert_close(ours[0, 1], centres)
    torch.testing.assert_close(theirs[0, 1], centres + shift)
    torch.testing.assert_close(ours[0, 0], theirs[0, 0])


def test_visibility_is_that_of_a_pinhole_camera():
    frames = fake_frames(1, (80, 48))
    points = pillar_points(SMALL)
    seen = project_pillars(points, frames.cameras, (64, 96))
    k, to_cam = frames.cameras.intrinsics[0].double(), frames.cameras.lidar_to_cam[0].double()
    visible = 0
    for camera in range(6):
        for cell in range(0, len(points), 7):
            for height in range(4):
                point = torch.cat([points[cell, height].double(), torch.ones(1).double()])
                x, y, depth = (k[camera] @ (to_cam[camera] @ point)[:3]).tolist()
                inside = depth > 1e-5 and 0 < x / depth < 96 and 0 < y / depth < 64
                assert bool(seen.visible[0, camera, cell, height]) == inside
                visible += inside
    assert visible > 50


def test_heights_stay_half_a_metre_inside_the_range():
    z = pillar_points(SMALL)[0, :, 2]
    torch.testing.assert_close(z, torch.tensor([-4.5, -2.1667, 0.1667, 2.5]), atol=1e-4, rtol=0)


def test_the_batch_norm_of_the_backbone_never_learns():
    net = BACKBONE.build().train()
    before = net.bn1.running_mean.clone()
    net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert not net.bn1.training
    assert torch.equal(net.bn1.running_mean, before)


@torch.no_grad()
def test_activations_start_of_order_one_without_weights_from_elsewhere():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for level in replace(BACKBONE, depth=101).build()(images):
        assert 0.2 < float(level.std()) < 5


def test_checkpointing_changes_no_gradient():
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    plain = BACKBONE.build()
    lean = replace(BACKBONE, checkpoint=True).build()
    lean.load_state_dict(plain.state_dict())
    for net in (plain, lean):
        net(images)[-1].sum().backward()
    for (name, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_layers_that_are_recomputed_learn_the_same_and_keep_less():
    gradients, kept = [], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        encoder = replace(SMALL, checkpoint=checkpoint).build().train()  # dropout is repeated, too
        state = encoder(drive(0), None)[1]
        with kept_for_backward(encoder.parameters) as bytes_kept:
            bev = encoder.encode_bev(encoder.image_levels(drive(1)), drive(1), state)
            kept.append(bytes_kept())
        bev.square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    plain, lean = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(lean[name], gradient, msg=name)
    assert kept[1] < kept[0]


def test_images_of_any_size_are_padded_at_the_bottom_and_right():
    net = BACKBONE.build().eval()
    image = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    pixels = net.normalise(image)
    assert pixels.shape == (1, 3, 64, 96)
    assert pixels[..., 50:, :].abs().max() == 0
    assert pixels[..., 70:].abs().max() == 0
    blue = pixels[0, 0, :50, :70]
    torch.testing.assert_close(blue, image[0, 2].float() - 103.53)
    assert [tuple(m.shape[1:]) for m in net(image)] == [(64, 8, 12), (128, 4, 6), (256, 2, 3)]


def test_the_pyramid_has_extra_levels():
    maps = [torch.randn(1, c, 16 // 2**n, 24 // 2**n) for n, c in enumerate((8, 16))]
    levels = FPN((8, 16), 4, 4)(maps)
    assert [tuple(level.shape[-2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_can_bus_becomes_changes():
    absolute, before = torch.arange(18.0), torch.ones(18)
    changes = can_bus_deltas(absolute, before)
    assert changes[:3].tolist() == [-1.0, 0.0, 1.0]
    assert changes[-1] == 16.0
    assert torch.equal(changes[3:17], absolute[3:17])
    assert torch.equal(can_bus_deltas(absolute, None), absolute)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "encoder.dim 30 must be even and a multiple of encoder.heads 8"),
        ({"spatial_points": 6}, "must be a multiple of encoder.heights 4"),
        ({"levels": 2}, "encoder.levels 2 must be at least the backbone's 3"),
        ({"columns": 10}, "give cells that are not square"),
        ({"range_m": (5.0, 0, 0, 1, 1, 1)}, "must be mins, then larger maxs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_other_numbers_of_cameras_are_refused(encoder):
    frames = fake_frames(1, (64, 32))
    five = replace(
        frames,
        images=frames.images[:, :5],
        cameras=replace(
            frames.cameras,
            intrinsics=frames.cameras.intrinsics[:, :5],
            lidar_to_cam=frames.cameras.lidar_to_cam[:, :5],
        ),
    )
    with pytest.raises(UserError, match="built for 6 cameras, not 5"):
        encoder(five, None)


@pytest.mark.parametrize("size", [(31, 64), (640, 20), (0, 0)])
def test_images_smaller_than_a_coarse_pixel_are_refused(encoder, size):
    frames = fake_frames(1, (64, 32))
    images = torch.zeros(1, 6, 3, size[1], size[0], dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"images of {size[0]}x{size[1]} pixels .* are too small"):
        encoder(replace(frames, images=images), None)


@torch.no_grad()
def test_cameras_one_at_a_time_give_what_all_give_at_once(encoder, monkeypatch):
    frames = drive(0)
    together = encoder.image_levels(frames)
    monkeypatch.setattr(bevformer, "PIXELS_AT_ONCE", 1)
    for alone, level in zip(encoder.image_levels(frames), together, strict=True):
        assert alone.shape == level.shape
        torch.testing.assert_close(alone, level, atol=1e-4, rtol=1e-4)


def test_kernels_that_hold_the_norm_give_the_same_maps(encoder):
    net = ResNetConfig(depth=50, base_channels=8).build()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, ModulatedDeformConv):
            torch.nn.init.normal_(module.conv_offset.weight, std=0.001)
    images = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8)
    with torch.no_grad():
        folded = net(images)
    for ours, plain in zip(folded, net(images), strict=True):
        assert plain.requires_grad
        atol = 1e-4 * float(plain.detach().abs().max())
        torch.testing.assert_close(ours, plain.detach(), atol=atol, rtol=1e-4)


def test_normalisation_never_follows_the_batch():
    net = ResNetConfig(depth=50, base_channels=8).build()
    before = net.bn1.running_mean.clone()
    net(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    net.train()(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    torch.testing.assert_close(net.bn1.running_mean, before, rtol=0, atol=0)


@torch.no_grad()
def test_a_first_frame_reads_what_rows_without_a_past_read(encoder):
    """The shorter way of a first frame, against a past that no row of the batch may use."""
    frames = drive(0)
    _, state = encoder(frames, None)
    fresh, _ = encoder(frames, None)
    none = replace(state, valid=torch.zeros_like(state.valid))
    forgotten, _ = encoder(replace(frames, scene_start=torch.zeros(2, dtype=torch.bool)), none)
    torch.testing.assert_close(forgotten.bev, fresh.bev, atol=1e-5, rtol=1e-4)
