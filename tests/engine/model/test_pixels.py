# SPDX-License-Identifier: Apache-2.0
"""Pixels by hand."""

import torch

from virst_engine.model.pixels import IMAGE_DEVIATION, IMAGE_MEAN, normalise


def test_channels_come_first_without_mean_and_deviation() -> None:
    image = torch.zeros(2, 5, 4, 6, 3, dtype=torch.uint8)
    image[1, 2, 3, 4] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    pixels = normalise(image)
    assert pixels.shape == (2, 5, 3, 4, 6)
    assert pixels.dtype == torch.float32
    red, green, blue = ((v - m) / d for v, m, d in zip((1.0, 0.0, 0.2), IMAGE_MEAN, IMAGE_DEVIATION, strict=True))
    assert torch.allclose(pixels[1, 2, :, 3, 4], torch.tensor([red, green, blue]))
    assert torch.allclose(pixels[0, 0, 1], torch.tensor(-IMAGE_MEAN[1] / IMAGE_DEVIATION[1]))


def test_rows_lie_one_after_another_in_memory() -> None:
    # Training a CPU on channels-last pixels corrupts memory in torch 2.13.
    assert normalise(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).is_contiguous()
