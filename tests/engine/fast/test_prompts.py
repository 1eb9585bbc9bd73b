# SPDX-License-Identifier: Apache-2.0
"""Prompts in pixels of the camera's image -> the model's input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes import FakeStages
from virst_engine.errors import BadPrompt
from virst_engine.fast.prompts import ABSENT_LOGIT, check_prompt, click_input, decode_boxes, decode_prompt, mask_input
from virst_engine.types import ClickPrompt, ImageFeatures, MaskPrediction, MaskPrompt, PromptTokens

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


class SeesAnObjectEverywhere(FakeStages):
    def __init__(self, *, reads_boxes: bool) -> None:
        super().__init__()
        self.sizes = replace(self.sizes, reads_boxes=reads_boxes)
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tokens: list[PromptTokens] = []

    def click_tokens(
        self, points: torch.Tensor, labels: torch.Tensor, mask_logits: torch.Tensor | None = None
    ) -> PromptTokens:
        self.asked.append((points, labels))
        return super().click_tokens(points, labels, mask_logits)

    def mask_decoder(
        self, features: ImageFeatures, conditioned: object, prompts: PromptTokens | None
    ) -> MaskPrediction:
        assert prompts is not None
        self.tokens.append(prompts)
        count, side = len(prompts.sparse), self.sizes.mask
        return MaskPrediction(
            torch.ones(count, side, side), torch.ones(count), torch.ones(count), torch.zeros(count, 8)
        )


BOXES = np.array([[[0.25, 0.5, 0.75, 1.0]], [[0.0, 0.0, 0.5, 0.25]]], np.float32)
NOTHING = ImageFeatures(*(torch.zeros(2, 8, 4, 4) for _ in range(4)))


def test_a_model_that_reads_boxes_gets_their_corners() -> None:
    stages = SeesAnObjectEverywhere(reads_boxes=True)
    found = decode_boxes(stages, NOTHING, BOXES, torch.device("cpu"))
    ((points, labels),) = stages.asked
    assert labels.tolist() == [[2, 3], [2, 3]]
    assert points.tolist() == [[[8, 16], [24, 32]], [[0, 0], [16, 8]]]
    assert (found.mask_logits == 1).all()


def test_to_a_model_that_reads_none_a_box_is_its_middle_and_nothing_outside() -> None:
    stages = SeesAnObjectEverywhere(reads_boxes=False)
    found = decode_boxes(stages, NOTHING, BOXES, torch.device("cpu"))
    ((points, labels),) = stages.asked
    assert labels.tolist() == [[1], [1]]
    assert points.tolist() == [[[16, 24]], [[8, 4]]]
    assert stages.tokens[0].multimask is not None
    assert not stages.tokens[0].multimask.any()
    wanted = torch.full((2, 16, 16), ABSENT_LOGIT)
    wanted[0, 8:, 4:12] = 1
    wanted[1, :4, :8] = 1
    assert torch.equal(found.mask_logits, wanted)


BOX_PX, POINT_PX = (80.0, 0.0, 160.0, 120.0), np.array([[80.0, 60.0]])


@pytest.mark.parametrize(
    ("prompt", "points", "labels", "is_cut"),
    [
        (ClickPrompt(box_px=(80, 0, 160, 120)), [[12, 8]], [1], True),
        (ClickPrompt(np.array([[80.0, 60.0]]), np.array([1]), box_px=(80, 0, 160, 120)), [[8, 8]], [1], True),
        (
            ClickPrompt(np.array([[80.0, 60.0]]), np.array([0]), box_px=(80, 0, 160, 120)),
            [[12, 8], [8, 8]],
            [1, 0],
            True,
        ),
        (ClickPrompt(np.array([[80.0, 60.0]]), np.array([1])), [[8, 8]], [1], False),
    ],
)
def test_a_users_box_is_its_middle_too_unless_a_point_tells_the_object(prompt, points, labels, is_cut) -> None:
    stages = SeesAnObjectEverywhere(reads_boxes=False)
    frame = ImageFeatures(*(torch.zeros(1, 8, 4, 4) for _ in range(4)))
    found = decode_prompt(stages, frame, prompt, (240, 320), torch.device("cpu"))
    ((asked, with_labels),) = stages.asked
    assert (asked[0].tolist(), with_labels[0].tolist()) == (points, labels)
    assert stages.tokens[0].multimask is not None
    assert not stages.tokens[0].multimask.any()
    wanted = torch.ones(1, 16, 16)
    if is_cut:
        wanted = torch.full((1, 16, 16), ABSENT_LOGIT)
        wanted[0, :8, 4:8] = 1
    assert torch.equal(found.mask_logits, wanted)
