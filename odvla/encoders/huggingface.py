"""Image backbones from Hugging Face: ResNet, ConvNeXt, Swin, DINOv2 and whatever else it has.

A local folder with a config.json and weights, or a named architecture of any size with random
weights. Nothing is downloaded. Inside BEVFormer and lift-splat it stands where ResNet-101 stands;
VisionPatches (vision_patches.py) reads its last map alone.

Shape legend: I images, C channels, h x w pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig

from odvla.encoders.image_backbone import PIXEL_MEAN, PIXEL_STD, padded

Architecture = Literal["resnet", "convnext", "swin", "dinov2"]
# Sizes for tests and small experiments, where no folder is given.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "window_size": 4},
    "dinov2": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 14,
        "image_size": 224,
    },
}


@dataclass(frozen=True)
class HuggingFaceBackboneConfig:
    """Which backbone, and which of its stages come out.

    `folder` decides about everything where it is set; otherwise `architecture` with `sizes`
    (arguments of its transformers config) and random weights.
    """

    architecture: Architecture = "resnet"
    folder: str | None = None
    sizes: tuple[tuple[str, Any], ...] = ()  # () takes SMALL
    stages: tuple[int, ...] = (2, 3, 4)  # counted from 1; of a ViT: layers

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: the folder has no model, or a stage does not exist.
        """
        if self.folder is not None and not (Path(self.folder) / "config.json").is_file():
            raise ValueError(
                f"backbone.folder {self.folder} holds no config.json; fetch a model with "
                "`hf download facebook/dinov2-base --local-dir DIR` and name DIR"
            )
        names = self._hf().stage_names
        wrong = [stage for stage in self.stages if not 1 <= stage < len(names)]
        if wrong or not self.stages or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(
                f"backbone.stages {self.stages} must be ascending and among 1 to {len(names) - 1}"
            )

    def _hf(self) -> Any:
        """The transformers config."""
        if self.folder is not None:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        else:
            settings = dict(self.sizes) or dict(SMALL[self.architecture])
            config = AutoConfig.for_model(self.architecture, **settings)
        names = config.stage_names
        chosen = [names[stage] for stage in self.stages if stage < len(names)]
        config.out_features = chosen or names[-1:]
        if hasattr(config, "use_mask_token"):
            config.use_mask_token = False  # of pre-training
        if hasattr(config, "reshape_hidden_states"):
            config.reshape_hidden_states = True
        return config

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        config = self._hf()
        if hasattr(config, "patch_size") and not hasattr(config, "depths"):
            return (config.hidden_size,) * len(self.stages)
        if hasattr(config, "embed_dim"):
            return tuple(config.embed_dim * 2 ** (stage - 1) for stage in self.stages)
        return tuple(config.hidden_sizes[stage - 1] for stage in self.stages)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each output."""
        config = self._hf()
        if hasattr(config, "patch_size") and not hasattr(config, "depths"):
            return (config.patch_size,) * len(self.stages)
        return tuple(2 ** (stage + 1) for stage in self.stages)

    @property
    def multiple(self) -> int:
        """Images are padded at the bottom and right to a multiple of this."""
        config = self._hf()
        if hasattr(config, "patch_size") and not hasattr(config, "depths"):
            return config.patch_size
        window = getattr(config, "window_size", 1)
        return 32 * window if window > 1 else 32

    def build(self) -> HuggingFaceBackbone:
        """The backbone."""
        return HuggingFaceBackbone(self)


class HuggingFaceBackbone(nn.Module):
    """uint8 images to feature maps; see the module's head."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: HuggingFaceBackboneConfig) -> None:
        super().__init__()
        self.config, self.multiple = config, config.multiple
        hf = config._hf()
        mean: tuple[float, ...] = PIXEL_MEAN
        std: tuple[float, ...] = PIXEL_STD
        self.model = AutoBackbone.from_config(hf)
        if config.folder is not None:
            kind = type(self.model)
            self.model = kind.from_pretrained(config.folder, config=hf, local_files_only=True)
            mean, std = _statistics(Path(config.folder))
        _cut_off(self.model, config.stages[-1])
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise, pad and encode.

        Args:
            images: uint8 [I, 3, h, w], RGB.

        Returns:
            One map [I, C_s, h_s, w_s] for each chosen stage, of the padded image.
        """
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        return tuple(self.model(padded(pixels, self.multiple)).feature_maps)


def _cut_off(model: nn.Module, last: int) -> None:
    """Take away what stands behind the last stage that comes out: nothing could train it."""
    inner = getattr(model, "swin", model)
    encoder = inner.get_submodule("encoder")
    for name in ("stages", "layers", "layer"):
        stages = getattr(encoder, name, None)
        if isinstance(stages, nn.ModuleList):
            del stages[last:]
            break
    else:
        raise ValueError(f"{type(model).__name__} has no stages that odvla knows how to cut")
    if inner is not model:  # Swin's maps are those before its norm and before a stage shrinks them
        inner.layernorm = nn.Identity()
        del stages[-1].downsample
        stages[-1].register_module("downsample", None)


def _statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels (0..255) that the weights were trained with."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return PIXEL_MEAN, PIXEL_STD
    content = json.loads(path.read_text())
    mean, std = content.get("image_mean"), content.get("image_std")
    if mean is None or std is None:
        return PIXEL_MEAN, PIXEL_STD
    return tuple(255 * value for value in mean), tuple(255 * value for value in std)
