"""UniAD's coding of boxes, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from odvla import geometry

CODE = 10  # cx, cy, log w, log l, cz, log h, sin, cos, vx, vy


def boxes_of_codes(codes: Tensor, *, bottom: bool = False) -> Tensor:
    """UniAD's codes [..., 10] as boxes [..., 9] of odvla.types.

    UniAD's yaw is that of mmdet3d before 1.0: it grows clockwise, from the direction of -y.

    Args:
        codes: [..., 10].
        bottom: the height in the code is that of the box's bottom, as in mmdet3d; otherwise that
            of its centre.
    """
    size = torch.cat([codes[..., 2:4], codes[..., 5:6]], -1).clamp(-6, 6).exp()
    z = codes[..., 4:5] + size[..., 2:] / 2 if bottom else codes[..., 4:5]
    yaw = torch.atan2(codes[..., 6:7], codes[..., 7:8])
    yaw = geometry.wrap_angle(-yaw - torch.pi / 2)
    return torch.cat([codes[..., :2], z, size, yaw, codes[..., 8:]], -1)


def codes_of_boxes(boxes: Tensor, *, bottom: bool = False) -> Tensor:
    """The way back, for training targets: [..., 9] to [..., 10]."""
    size = boxes[..., 3:6].clamp(min=1e-2).log()
    z = boxes[..., 2:3] - boxes[..., 5:6] / 2 if bottom else boxes[..., 2:3]
    yaw = -boxes[..., 6:7] - torch.pi / 2
    return torch.cat(
        [
            boxes[..., :2],
            size[..., :2],
            z,
            size[..., 2:],
            yaw.sin(),
            yaw.cos(),
            boxes[..., 7:],
        ],
        -1,
    )
