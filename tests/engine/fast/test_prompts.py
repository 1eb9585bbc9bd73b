# SPDX-License-Identifier: Apache-2.0
"""Prompts in pixels of the camera's image -> the model's input."""

import numpy as np
import pytest
import torch

from virst_engine.errors import BadPrompt
from virst_engine.fast.prompts import check_prompt, click_input, mask_input
from virst_engine.types import ClickPrompt, MaskPrompt

WIDE = (240, 320)  # height, width


def test_a_box_comes_before_points_and_both_are_scaled_per_axis() -> None:
    prompt = ClickPrompt(np.array([[160.0, 120.0]]), np.array([0]), box_px=(32.0, 24.0, 64.0, 240.0))
    points, labels = click_input(prompt, WIDE, 128)
    assert labels.tolist() == [[2, 3, 0]]
    assert torch.allclose(points, torch.tensor([[[12.8, 12.8], [25.6, 128.0], [64.0, 64.0]]]))


def test_points_without_labels_are_on_the_object() -> None:
    _, labels = click_input(ClickPrompt(np.array([[1.0, 2.0], [3.0, 4.0]])), WIDE, 64)
    assert labels.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs points, a box, or both"),
        ({"points_px": np.zeros((1, 2)), "labels": np.array([2])}, "labels must be 1"),
        ({"points_px": np.array([[np.nan, 0.0]])}, "finite"),
        ({"box_px": (5.0, 1.0, 5.0, 9.0)}, "left < right and top < bottom"),
        ({"box_px": (0.0, 0.0, float("inf"), 9.0)}, "finite"),
    ],
)
def test_what_is_no_prompt_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickPrompt(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [-0.5, 320.5])
def test_a_point_outside_the_image_is_named(x: float) -> None:
    with pytest.raises(BadPrompt, match=rf"\({x:g}, 3\) is outside the image of 320 x 240"):
        check_prompt(ClickPrompt(np.array([[4.0, 3.0], [x, 3.0]])), WIDE)


def test_a_mask_is_squashed_and_stays_zero_or_one() -> None:
    mask = np.zeros(WIDE, bool)
    mask[60:120, 80:240] = True
    small = mask_input(MaskPrompt(mask), WIDE, 64)
    assert small.shape == (1, 1, 64, 64)
    assert set(small.unique().tolist()) == {0.0, 1.0}
    assert small[0, 0, 16:32, 16:48].min() == 1.0
    assert int(small.sum()) == 16 * 32


def test_a_mask_of_another_size_is_named() -> None:
    with pytest.raises(BadPrompt, match="the mask is 20 x 10, the camera's image 320 x 240"):
        check_prompt(MaskPrompt(np.zeros((10, 20), bool)), WIDE)
