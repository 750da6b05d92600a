"""From the file's pixels to the model's: resize, crop, pad, and what that does to the intrinsics.

Pixel coordinates are those of the nuScenes calibration: column u to the right, row v downwards.
Normalisation is not here: encoders get RGB bytes and do it themselves, each with its own statistics
(the reference tower in BGR with caffe's means).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odvla.errors import UserError

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageGeometry:
    """What is done to every image.

    Attributes:
        resized: width, height after resizing; the aspect may change.
        crop_top: rows cut off at the top after resizing: mostly sky.
        pad_multiple: black rows and columns at the bottom and the right, up to a multiple of this.
    """

    resized: tuple[int, int]
    crop_top: int = 0
    pad_multiple: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: nothing would be left of an image, or the multiple is no number of pixels.
        """
        if not 0 <= self.crop_top < self.resized[1]:
            raise UserError(
                f"data.crop_top must leave rows of an image of {self.resized[1]}, "
                f"not be {self.crop_top}"
            )
        if self.pad_multiple < 1:
            raise UserError(f"data.pad_multiple must be at least 1, not {self.pad_multiple}")

    @property
    def size(self) -> tuple[int, int]:
        """Width, height of the images that the model gets."""
        width, height = self.resized[0], self.resized[1] - self.crop_top
        return _up(width, self.pad_multiple), _up(height, self.pad_multiple)

    def crop_and_pad(self, image: Image) -> Image:
        """What follows resizing.

        Args:
            image: [h, w, 3] of the resized size.

        Returns:
            [h, w, 3] of `size`.
        """
        width, height = self.size
        kept = image[self.crop_top :]
        if kept.shape[:2] == (height, width):
            return kept
        padded = np.zeros((height, width, 3), dtype=np.uint8)
        padded[: kept.shape[0], : kept.shape[1]] = kept
        return padded

    def matrix(self, file_size: tuple[int, int]) -> NDArray[np.float64]:
        """Matrix [3, 3] that takes pixels (u, v, 1) of a file to pixels of the model's image.

        Args:
            file_size: width, height of the file.
        """
        scale = np.array(self.resized) / np.array(file_size)
        matrix = np.diag([scale[0], scale[1], 1.0])
        matrix[1, 2] = -self.crop_top
        return matrix


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
