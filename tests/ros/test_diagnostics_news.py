# SPDX-License-Identifier: Apache-2.0
"""What the node logs of its own diagnostics: each trouble once, and that all is well again."""

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("rclpy")

from virst_engine import FrameResult, ObjectResult, ObjectState
from virst_ros.diagnostics import LOG_AGAIN_S, RECENT_S, Diagnostics, Surroundings

pytestmark = pytest.mark.ros


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def diagnostics(clock):
    return Diagnostics("segmenter", clock)


def news(diagnostics, reasoner_problem="", **changes):
    """The lines of troubles, and of their ends, in this order."""
    seen = Surroundings(
        state="active",
        image_topic="/image",
        image_publishers=1,
        received=1,
        dropped=0,
        depth_topic="",
        no_image_after_s=2.0,
        inference_traceback="",
        reasoner_problem=reasoner_problem,
    )
    seen = replace(seen, **changes)
    diagnostics.statuses(seen)
    troubled, well = diagnostics.news()
    return troubled + well


def test_nothing_is_logged_while_all_is_well(diagnostics):
    diagnostics.image_received()
    assert news(diagnostics) == []


def test_silence_is_logged_once_and_so_is_its_end(diagnostics, clock):
    clock.now_s += 3.0
    (line,) = news(diagnostics)
    assert line.startswith("input: no images on /image since activation, 3.0 s")
    clock.now_s += 1.0
    assert news(diagnostics) == []  # only the number has changed
    diagnostics.image_received()
    assert news(diagnostics) == ["input: well again"]


def test_different_reasons_are_different_news(diagnostics):
    diagnostics.image_received()
    diagnostics.frame_rejected("has step 3")
    assert "has step 3" in news(diagnostics)[0]
    diagnostics.frame_rejected("has step 3")
    assert news(diagnostics) == []
    diagnostics.frame_rejected("encoding 'bayer_rggb8' is not supported")
    assert "bayer_rggb8" in news(diagnostics)[0]


def test_sizes_and_encodings_are_not_taken_for_numbers_that_change(diagnostics):
    diagnostics.image_received()
    lines = []
    for size in ("320x240 rgb8", "640x480 rgb8", "640x480 bgr8"):
        diagnostics.image_decoded(size)
        lines += news(diagnostics)
    assert len(lines) == 2


def test_what_comes_and_goes_is_logged_every_now_and_then(diagnostics, clock):
    lines = []
    for number in range(40):
        clock.now_s += 0.5
        diagnostics.image_received()
        lines += news(diagnostics, "no reasoner answers" if number % 2 else "")
    told = [line for line in lines if "no reasoner" in line]
    assert len(told) == 20.0 // LOG_AGAIN_S


def test_what_was_held_back_is_logged_if_it_stays(diagnostics, clock):
    diagnostics.image_received()
    assert len(news(diagnostics, "it hangs")) == 1
    assert news(diagnostics) == ["reasoner: well again"]
    assert news(diagnostics, "it hangs") == []
    clock.now_s += LOG_AGAIN_S
    diagnostics.image_received()
    assert len(news(diagnostics, "it hangs")) == 1


def test_all_troubles_are_told_not_only_the_first(diagnostics, clock):
    diagnostics.image_received()
    diagnostics.frame_rejected("has step 3")
    diagnostics.stamp_jumped(3600.0)
    diagnostics.picture_checked("the image is black")
    lines = news(diagnostics)
    assert len(lines) == 3
    assert "jumped forwards by 3600.000 s" in lines[1]
    clock.now_s += RECENT_S
    diagnostics.image_received()
    assert news(diagnostics) == []  # black still, and told already


def test_what_is_not_followed_any_more_is_not_well_again(diagnostics, clock):
    clock.now_s += 3.0
    assert len(news(diagnostics, "no reasoner answers")) == 2
    assert news(diagnostics, state="inactive") == []
    assert news(diagnostics, "no reasoner answers") == []
    diagnostics.image_received()
    assert sorted(news(diagnostics)) == ["input: well again", "reasoner: well again"]


def test_a_worse_trouble_does_not_make_well(diagnostics):
    def publish(message=""):
        state = ObjectState.SEARCHING if message else ObjectState.TRACKING
        found = ObjectResult("cup", "goal_1", 1, state, np.zeros((2, 2), bool), 0.5, math.nan, 0.3, message)
        for _ in range(2):
            diagnostics.image_received()
            diagnostics.result_published(FrameResult(0, 0, "camera", (found,), {}), 0.1, overhead_ms=1.0)

    publish("not understood")
    news(diagnostics)
    assert news(diagnostics, unserved="nobody fills it") == [
        "output: nobody fills it",
        "goals: goal_1: not understood",
    ]
    diagnostics.goal_rejected("it is empty")
    assert news(diagnostics, inference_traceback="RuntimeError: boom") == []
    diagnostics.reset()
    publish()
    assert news(diagnostics) == ["output: well again", "goals: well again"]
