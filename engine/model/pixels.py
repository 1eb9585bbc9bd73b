# SPDX-License-Identifier: Apache-2.0
"""Pixels as both image encoders want them."""

from jaxtyping import Float, UInt8
from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of 0..1
IMAGE_DEVIATION = (0.229, 0.224, 0.225)


def normalise(image_rgb_u8: UInt8[Tensor, "*batch h w 3"]) -> Float[Tensor, "*batch 3 h w"]:
    """0..255 RGB -> float32 with ImageNet's mean and deviation taken out, channels first."""
    x = image_rgb_u8.float() / 255
    x = (x - x.new_tensor(IMAGE_MEAN)) / x.new_tensor(IMAGE_DEVIATION)
    return x.movedim(-1, -3).contiguous()  # torch 2.13 corrupts memory when a CPU trains on channels-last pixels
