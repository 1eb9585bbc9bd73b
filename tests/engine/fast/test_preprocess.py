# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from virst_engine.errors import BadFrame
from virst_engine.fast.preprocess import Preprocess, check_image, resize_image


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
        (np.zeros((4, 0, 3), np.uint8), "0 x 4"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        ([[1]], "list"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(image: object, words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        check_image(image)


def test_pixels_are_normalised_channels_first() -> None:
    image = np.zeros((6, 8, 3), np.uint8)
    image[...] = (255, 0, 51)
    pixels = Preprocess(4)(image)
    assert pixels.shape == (1, 3, 4, 4)
    expected = [(1.0 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert torch.allclose(pixels[0, :, 1, 2], torch.tensor(expected), atol=1e-5)


def test_shrinking_averages_and_squashes() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, 1::2] = 200  # every second column
    assert np.all(resize_image(image, 2) == 100)


def test_an_image_of_the_right_size_is_copied() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    resized = resize_image(image, 3)
    assert np.array_equal(resized, image)
    assert not np.shares_memory(resized, image)


def test_a_small_image_is_enlarged_smoothly() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 100
    row = resize_image(image, 4)[0, :, 0].tolist()
    assert row == [0, 25, 75, 100]
