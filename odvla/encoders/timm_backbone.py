"""Any image backbone of timm that gives feature maps, where timm is installed.

timm needs a torchvision that fits torch, which not every machine has: it is imported when such a
backbone is asked for, and not before. Nothing is downloaded; weights are a file on this machine.
Inside BEVFormer and lift-splat it stands where ResNet-101 stands.

Shape legend: I images, C channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from odvla.encoders.image_backbone import padded
from odvla.errors import UserError


@dataclass(frozen=True)
class TimmBackboneConfig:
    """Which of timm's models, and which of its maps come out."""

    name: str = "resnet50"  # see timm.list_models()
    outputs: tuple[int, ...] = (2, 3, 4)  # out_indices of timm, counted from 0
    weights: str | None = None  # file of timm's weights for this model; None: random ones
    # Further arguments of timm.create_model, such as ("dynamic_img_size", True) for a ViT and
    # ("strict_img_size", False) for a Swin, whose images have one size otherwise.
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            UserError: timm is not installed or has no such model, an output does not exist, or
                there is no file of weights.
        """
        if self.weights is not None and not Path(self.weights).is_file():
            raise UserError(f"backbone.weights: there is no file {self.weights}")
        _maps(self)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return _maps(self)[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each output."""
        return _maps(self)[1]

    @property
    def multiple(self) -> int:
        """Images are padded at the bottom and right to a multiple of this."""
        return max(self.strides)

    def build(self) -> TimmBackbone:
        """The backbone.

        Raises:
            UserError: the file of weights does not fit the model.
        """
        return TimmBackbone(self)


class TimmBackbone(nn.Module):
    """uint8 images to feature maps; see the module's head."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: TimmBackboneConfig) -> None:
        super().__init__()
        self.config, self.multiple = config, config.multiple
        if config.weights is not None:
            _check_weights(config, config.weights)
        self.model = _create(config, config.weights)
        known = self.model.pretrained_cfg
        for name, values in (("pixel_mean", known["mean"]), ("pixel_std", known["std"])):
            pixels = 255 * torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, pixels, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise, pad and encode.

        Args:
            images: uint8 [I, 3, h, w], RGB.

        Returns:
            One map [I, C_s, h_s, w_s] for each output, of the padded image.
        """
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        maps = self.model(padded(pixels, self.multiple))
        if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):  # Swin's
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return tuple(maps)


def _timm() -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # of a torchvision that does not fit torch
        raise UserError(
            "a timm backbone needs timm and a torchvision that fits this torch: install the extra "
            f"with pip install 'odvla[timm]' ({error})"
        ) from error
    return timm


def _create(config: TimmBackboneConfig, weights: str | None) -> Any:
    timm = _timm()
    file: dict[str, Any] = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    try:
        return timm.create_model(
            config.name,
            pretrained=weights is not None,
            features_only=True,
            out_indices=config.outputs,
            **file,
            **dict(config.options),
        )
    except Exception as error:  # timm's own are of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"timm cannot make backbone {config.name!r} with outputs {list(config.outputs)}"
            f"{f' and the weights of {weights}' if weights else ''}: {reason}"
        ) from error


def _check_weights(config: TimmBackboneConfig, path: str) -> None:
    """Compare a file with the whole model: timm leaves out what does not fit without a word.

    Raises:
        UserError: naming the first weight that is missing, of another shape, or unknown.
    """
    timm = _timm()
    with torch.device("meta"):
        whole = timm.create_model(config.name, **dict(config.options))
    heads = whole.pretrained_cfg.get("classifier") or ()  # of classes that nobody here asks for
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    try:
        found = timm.models.load_state_dict(path, device="cpu", weights_only=True)
    except Exception as error:  # of every format that timm reads
        raise UserError(f"backbone.weights {path} cannot be read: {error}") from error

    def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {
            key: tuple(value.shape)
            for key, value in state.items()
            if not key.startswith(tuple(f"{head}." for head in heads))
        }

    wanted, there = shapes(whole.state_dict()), shapes(found)
    for key in sorted({*wanted, *there}):
        if wanted.get(key) != there.get(key):
            raise UserError(
                f"backbone.weights {path} is not timm's {config.name}: {key} is of shape "
                f"{there.get(key)} there and {wanted.get(key)} in the model"
            )


@lru_cache
def _maps(config: TimmBackboneConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the outputs, of a model without memory."""
    with torch.device("meta"):
        info = _create(config, None).feature_info
    return tuple(info.channels()), tuple(info.reduction())
