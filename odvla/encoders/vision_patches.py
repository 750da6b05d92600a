"""Images as patches of a vision transformer, and no bird's-eye view.

So do EMMA, DriveVLM and OpenVLA feed a language model: a pretrained ViT from this machine (DINOv2
of Hugging Face; SigLIP, too, of timm) makes a map of patch embeddings of each camera, and the scene
sampler pools them to tokens. There are no agents and no map elements, and so neither object
captions nor forecasts.

Shape legend: B rows, N cameras, C channels, h x w patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odvla.encoders.huggingface import HuggingFaceBackboneConfig
from odvla.encoders.protocol import EncoderState, fake_frames
from odvla.errors import check_sizes
from odvla.types import Frames, SceneFeatures


def _small_vit() -> HuggingFaceBackboneConfig:
    return HuggingFaceBackboneConfig("dinov2", stages=(2,))


@dataclass(frozen=True)
class VisionPatchesConfig:
    """Which backbone, and the width of what it becomes."""

    backbone: Any = field(default_factory=_small_vit)  # anything with build() and channels
    dim: int = 48
    cameras: int = 6
    camera_embedding: bool = True  # tells the language model which camera a patch is of

    def __post_init__(self) -> None:
        """Check what would fail late.

        Raises:
            ValueError: naming the setting.
        """
        check_sizes(self, "dim", "cameras")

    def build(self) -> VisionPatches:
        """The encoder."""
        return VisionPatches(self)

    def fake_batch(self, batch: int = 2, *, seed: int = 0, step: int = 0) -> Frames:
        """Frames that fit this encoder, for tests and `check_encoder`."""
        return fake_frames(batch, seed=seed, step=step)


class VisionPatches(nn.Module):
    """Six images to a map of patches each; see the module's head."""

    grid = None  # no bird's-eye view

    def __init__(self, config: VisionPatchesConfig) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        self.backbone = config.backbone.build()
        self.project = nn.Sequential(
            nn.Linear(config.backbone.channels[-1], config.dim), nn.LayerNorm(config.dim)
        )
        self.cameras: nn.Parameter | None = None
        if config.camera_embedding:
            self.cameras = nn.Parameter(torch.randn(config.cameras, config.dim) * 0.02)

    def forward(
        self, frames: Frames, state: EncoderState | None
    ) -> tuple[SceneFeatures, EncoderState | None]:
        """Encode one key-frame; nothing is remembered.

        Raises:
            ValueError: there are not as many cameras as this encoder was built for.
        """
        batch, cameras = frames.images.shape[:2]
        if self.cameras is not None and cameras != self.config.cameras:
            raise ValueError(
                f"the encoder was built for {self.config.cameras} cameras, not {cameras}"
            )
        patches = self.backbone(frames.images.flatten(0, 1))[-1]  # B*N, C', h, w
        features = self.project(patches.movedim(1, -1)).unflatten(0, (batch, cameras))
        features = self._named(features)
        return SceneFeatures(levels=(features.movedim(-1, 2).contiguous(),)), None

    def _named(self, features: Tensor) -> Tensor:
        """[B, N, h, w, C] with the camera's embedding added."""
        if self.cameras is None:
            return features
        return features + self.cameras[:, None, None]
