# SPDX-License-Identifier: Apache-2.0
"""Camera image -> what the networks read. SAM 2 squashes to a square too; aspect is not kept (sam2 SAM2Transforms)."""

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from virst_engine.errors import BadFrame
from virst_engine.model.pixels import IMAGE_DEVIATION, IMAGE_MEAN


def check_image(image: object) -> None:
    """Raises BadFrame unless `image` is uint8, height x width x 3 and has pixels."""
    if not isinstance(image, np.ndarray):
        raise BadFrame(f"an image must be a numpy array, got {type(image).__name__}; convert it before the engine")
    if image.dtype != np.uint8:
        raise BadFrame(f"an image must be uint8, got {image.dtype}; scale it to 0..255 and convert it")
    if image.ndim != 3 or image.shape[2] != 3:
        raise BadFrame(f"an image must be height x width x 3 (RGB), got {image.shape}; convert it to RGB")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise BadFrame(f"an image must have pixels, got {image.shape[1]} x {image.shape[0]}; check the camera driver")


def resize_image(image_rgb_u8: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The image squashed to a square; a copy, even where the size is right already."""
    height, width = image_rgb_u8.shape[:2]
    if (height, width) == (size, size):
        return image_rgb_u8.copy()
    # Averaging keeps small things when shrinking; it is nearest neighbour, hence blocky, when enlarging.
    shrinks = height >= size and width >= size
    return cv2.resize(image_rgb_u8, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def fit_image(
    image_rgb_u8: UInt8[np.ndarray, "height width 3"], longer_side: int
) -> UInt8[np.ndarray, "smaller_height smaller_width 3"]:
    """The image shrunk until no side is longer, with its aspect; itself where it is small enough."""
    height, width = image_rgb_u8.shape[:2]
    scale = longer_side / max(height, width)
    if scale >= 1.0:
        return image_rgb_u8
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image_rgb_u8, size, interpolation=cv2.INTER_AREA)


class Preprocess:
    """Keeps the normalisation constants on the device, so that only uint8 pixels travel to it."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self._size, self._device = size, torch.device(device)
        mean = torch.tensor(IMAGE_MEAN, device=self._device).reshape(3, 1, 1)
        deviation = torch.tensor(IMAGE_DEVIATION, device=self._device).reshape(3, 1, 1)
        self._scale, self._shift = 1.0 / (255.0 * deviation), -mean / deviation

    def __call__(self, image_rgb_u8: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 size size"]:
        """What the image encoder reads: squashed and normalised. The image has passed `check_image`."""
        return self.normalise(resize_image(image_rgb_u8, self._size))

    def normalise(self, square_rgb_u8: UInt8[np.ndarray, "size size 3"]) -> Float[Tensor, "1 3 size size"]:
        """float32 pixels with ImageNet's mean and deviation taken out, of an image that was squashed already."""
        pixels = torch.from_numpy(square_rgb_u8)
        if self._device.type == "cuda":  # from page-locked memory, so that nobody waits for the copy
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return (pixels.permute(2, 0, 1) * self._scale + self._shift)[None].contiguous()
