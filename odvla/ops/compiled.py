"""The compiled kernels of other libraries, behind the same two functions.

mmcv (its full build, not mmcv-lite) has both operations for NVIDIA GPUs; on a CPU it has the
convolution only, which is slower than ours. deformops has both as Triton kernels for NVIDIA GPUs.
Neither is needed. Both get float32: mmcv has no bfloat16 kernel, and places in half precision are
pixels off.

Shape legend: B rows, Q queries, A heads, L levels, P points, E channels a head, S places of all
levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _tokens(values: Sequence[Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [B, A * E, h, w] as [B, S, A, E]; (h, w) [L, 2] and first place [L] of each level."""
    tokens = torch.cat([value.flatten(2) for value in values], 2).transpose(1, 2)
    sizes = torch.tensor([value.shape[-2:] for value in values], device=tokens.device)
    counts = sizes.prod(1)
    return tokens.unflatten(-1, (heads, -1)).contiguous(), sizes, counts.cumsum(0) - counts


class MMCVOps:
    """mmcv's autograd functions.

    Raises:
        ImportError: there is no mmcv with compiled operations, or it was built for another torch.
    """

    def __init__(self) -> None:
        from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        self._attention: Any = MultiScaleDeformableAttnFunction.apply
        self._convolution: Any = modulated_deform_conv2d

    def attention(self, values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
        """See odvla.ops.deformable_attention."""
        tokens, sizes, starts = _tokens(values, locations.shape[2])
        # The last argument, how many rows a launch takes, must divide the number of rows.
        return self._attention(
            tokens, sizes, starts, locations.contiguous(), weights.contiguous(), len(tokens)
        )

    def convolution(
        self,
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
        dilation: int,
    ) -> Tensor:
        """See odvla.ops.deformable_conv."""
        parts = (part.contiguous() for part in (x, offset, mask, weight))
        return self._convolution(*parts, None, stride, padding, dilation, 1, 1)


class DeformopsOps:
    """deformops' functional forms.

    Raises:
        ImportError: deformops is not installed.
    """

    def __init__(self) -> None:
        from deformops.integrations.torchvision import deform_conv2d
        from deformops.registry import msda

        self._attention: Any = msda
        self._convolution: Any = deform_conv2d

    def attention(self, values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
        """See odvla.ops.deformable_attention."""
        tokens, sizes, starts = _tokens(values, locations.shape[2])
        read = self._attention(
            tokens, sizes, starts, locations.contiguous(), weights.flatten(3).contiguous()
        )
        return read.reshape(*locations.shape[:2], -1)

    def convolution(
        self,
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
        dilation: int,
    ) -> Tensor:
        """See odvla.ops.deformable_conv."""
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        pairs = {name: (value, value) for name, value in settings.items()}
        return self._convolution(x, offset, weight, None, mask=mask, **pairs)
