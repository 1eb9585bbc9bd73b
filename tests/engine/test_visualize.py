# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.types import FrameResult, ObjectResult, ObjectState
from virst_engine.visualize import PALETTE, caption_of, colour_of, draw_overlay


def result_of(*states: ObjectState, height: int = 240, width: int = 320) -> FrameResult:
    objects = []
    for number, state in enumerate(states, 1):
        mask = np.zeros((height, width), bool)
        if state is ObjectState.TRACKING:
            mask[120:160, 60 * number : 60 * number + 30] = True
        score = 0.8 if state is ObjectState.TRACKING else 0.0
        objects.append(ObjectResult(f"o{number}", f"g{number}", number, state, mask, score, 0.0, 0.0))
    return FrameResult(0, 0, "camera", tuple(objects), {})


GREY_IMAGE = np.full((240, 320, 3), 100, np.uint8)


def test_masks_get_their_colour_and_the_rest_of_the_image_stays() -> None:
    image = GREY_IMAGE.copy()
    drawn = draw_overlay(image, result_of(ObjectState.TRACKING, ObjectState.LOST))
    assert np.array_equal(image, GREY_IMAGE)
    expected = 0.6 * 100 + 0.4 * np.array(PALETTE[0])
    assert np.allclose(drawn[140, 75], expected, atol=1)
    assert np.array_equal(drawn[100:, 130:], GREY_IMAGE[100:, 130:])  # nothing is drawn of what is lost
    assert not np.array_equal(drawn[:40], GREY_IMAGE[:40])  # the labels


def test_an_instance_has_its_own_colour_and_its_union_the_rest() -> None:
    (union,) = result_of(ObjectState.TRACKING).objects
    mask = union.mask.copy()
    mask[:, 75:] = False
    part = replace(union, object_id="o1.1", instance_id=2, mask=mask, part_of="o1")
    drawn = draw_overlay(GREY_IMAGE, FrameResult(0, 0, "camera", (union, part), {}))
    for column, number in ((67, 1), (82, 0)):
        assert np.allclose(drawn[140, column], 0.6 * 100 + 0.4 * np.array(PALETTE[number]), atol=1)


def test_captions_number_instances() -> None:
    (union,) = result_of(ObjectState.TRACKING).objects
    part = replace(union, object_id="o1.12", part_of="o1")
    assert [caption_of(each, {"g1": "the balls"}) for each in (union, part)] == ["the balls", "the balls 12"]
    assert [caption_of(each, {}) for each in (union, part)] == ["o1", "o1.12"]


def test_without_objects_the_image_comes_back() -> None:
    assert np.array_equal(draw_overlay(GREY_IMAGE, result_of()), GREY_IMAGE)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_the_picture_can_be_larger_than_the_image(scale: int) -> None:
    drawn = draw_overlay(GREY_IMAGE, result_of(ObjectState.TRACKING), scale=scale)
    assert drawn.shape == (240 * scale, 320 * scale, 3)
    assert drawn.dtype == np.uint8
    assert not np.array_equal(drawn[140 * scale, 75 * scale], GREY_IMAGE[0, 0])


@pytest.mark.parametrize("caption", ["", "x" * 300, "赤いボール", "the red ball: left of it"])
def test_any_caption_can_be_drawn_on_any_image(caption: str) -> None:
    for height, width in ((240, 320), (12, 16), (1, 1)):
        found = result_of(ObjectState.TRACKING, ObjectState.NOT_FOUND, height=height, width=width)
        drawn = draw_overlay(np.zeros((height, width, 3), np.uint8), found, {"g1": caption, "g2": caption})
        assert drawn.shape == (height, width, 3)


def test_colours_repeat_only_after_the_whole_palette() -> None:
    assert len({colour_of(i) for i in range(1, len(PALETTE) + 1)}) == len(PALETTE)
    assert colour_of(254) in PALETTE
