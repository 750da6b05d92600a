"""What training changes in images: colours, and a grid of holes.

Both are drawn from torch's global generator, which a stage seeds by its step, so that a run that
was interrupted draws what the uninterrupted one would have drawn.

Shape legend: B rows, N cameras, I images, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odvla.types import Frames

HOLE = (124, 116, 104)  # RGB of a hole: the pixel mean, which is zero after normalising


@dataclass(frozen=True)
class AugmentationConfig:
    """How much images change; the defaults are UniAD's. Nothing is changed with `off()`."""

    brightness: float = 32.0  # of 255, added
    contrast: tuple[float, float] = (0.5, 1.5)  # factor
    saturation: tuple[float, float] = (0.5, 1.5)  # factor
    hue_deg: float = 18.0
    swap_channels: bool = True
    grid_mask: float = 0.7  # probability of a grid of holes in a clip's images
    grid_ratio: float = 0.5  # of a grid's period that is kept

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ValueError: naming the setting.
        """
        if not 0 <= self.grid_mask <= 1:
            raise ValueError(f"augmentation.grid_mask is a probability, not {self.grid_mask}")
        if not 0 < self.grid_ratio < 1:
            raise ValueError(f"augmentation.grid_ratio must be within 0..1, not {self.grid_ratio}")
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augmentation.{name} must be two rising factors above 0")


def augment(clip: tuple[Frames, ...], config: AugmentationConfig) -> tuple[Frames, ...]:
    """Change a clip's images: colours image by image, holes alike in all images of the clip."""
    height, width = clip[0].images.shape[-2:]
    holes = None
    if float(torch.rand(())) < config.grid_mask:
        holes = grid_holes(height, width, config.grid_ratio).to(clip[0].images.device)
    return tuple(replace(frames, images=_changed(frames.images, holes, config)) for frames in clip)


def _changed(images: Tensor, holes: Tensor | None, config: AugmentationConfig) -> Tensor:
    flat = distort_colours(images.flatten(0, 1), config)
    if holes is not None:
        colour = torch.tensor(HOLE, dtype=torch.uint8, device=images.device).view(3, 1, 1)
        flat = torch.where(holes, colour, flat)
    return flat.unflatten(0, images.shape[:2])


def distort_colours(images: Tensor, config: AugmentationConfig) -> Tensor:
    """SSD's photometric distortion (Liu et al. 2016): each step is taken with probability 1/2.

    Brightness; contrast before or after the colours; saturation; hue; the order of the channels.

    Args:
        images: uint8 RGB [I, 3, h, w].
        config: how much.

    Returns:
        uint8 [I, 3, h, w].
    """
    count, device = len(images), images.device

    def drawn(low: float, high: float, neutral: float) -> Tensor:
        """A number an image, neutral for half of them: [I, 1, 1]."""
        values = torch.empty(count, 1, 1).uniform_(low, high)
        return torch.where(torch.rand(count, 1, 1) < 0.5, values, neutral).to(device)

    pixels = images.float() + drawn(-config.brightness, config.brightness, 0.0).unsqueeze(1)
    contrast = drawn(*config.contrast, 1.0).unsqueeze(1)
    early = (torch.rand(count, 1, 1, 1) < 0.5).to(device)
    pixels = torch.where(early, pixels * contrast, pixels)
    hue, saturation, value = rgb_to_hsv(pixels.clamp(0, 255)).unbind(1)
    saturation = (saturation * drawn(*config.saturation, 1.0)).clamp(0, 1)
    hue = (hue + drawn(-config.hue_deg, config.hue_deg, 0.0)) % 360
    pixels = hsv_to_rgb(torch.stack([hue, saturation, value], 1))
    pixels = torch.where(early, pixels, pixels * contrast)
    if config.swap_channels:
        order = torch.argsort(torch.rand(count, 3), 1)
        order = torch.where(torch.rand(count, 1) < 0.5, order, torch.arange(3))
        pixels = pixels.gather(1, order.to(device).view(count, 3, 1, 1).expand_as(pixels))
    return pixels.clamp(0, 255).round().to(torch.uint8)


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """RGB [I, 3, h, w], 0..255, to hue (degrees), saturation (0..1), value (0..255)."""
    red, green, blue = rgb.unbind(1)
    value, most = rgb.max(1)
    spread = value - rgb.amin(1)
    safe = spread.clamp(min=1e-6)
    sector = torch.stack(
        [(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], 1
    )
    hue = sector.gather(1, most.unsqueeze(1))[:, 0] * 60 % 360
    hue = torch.where(spread > 0, hue, 0.0)
    return torch.stack([hue, spread / value.clamp(min=1e-6), value], 1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """The way back."""
    hue, saturation, value = hsv.unbind(1)
    chroma = value * saturation

    def channel(offset: int) -> Tensor:
        sector = (offset + hue / 60) % 6
        return value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def grid_holes(height: int, width: int, ratio: float) -> Tensor:
    """GridMask (Chen et al. 2020): squares of holes with a random period and phase.

    Args:
        height: of the images.
        width: of the images.
        ratio: part of a period that stays visible in each direction.

    Returns:
        bool [h, w], True in the holes.
    """
    period = int(torch.randint(2, max(height, 3), ()))
    kept = min(max(int(period * ratio + 0.5), 1), period - 1)

    def covered(length: int) -> Tensor:
        phase = int(torch.randint(0, period, ()))
        return (torch.arange(length) + phase) % period >= kept

    return covered(height).unsqueeze(1) & covered(width)
