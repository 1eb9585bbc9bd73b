# SPDX-License-Identifier: Apache-2.0
"""The two rules for anchors, by hand and against SAM 2's own selection."""

import random

import pytest
from sam2.modeling.sam2_utils import select_closest_cond_frames

from virst_engine.model.anchor_choice import choose_anchors


def test_the_rules_differ_where_one_side_has_all_the_near_anchors() -> None:
    anchors = [0, 10, 12, 14, 31]
    assert choose_anchors(anchors, 11, 3, "nearest") == [10, 12, 14]
    assert choose_anchors(anchors, 16, 3, "nearest") == [10, 12, 14]
    assert choose_anchors(anchors, 16, 3, "bracketing") == [12, 14, 31]
    assert choose_anchors(anchors, 14, 3, "bracketing") == [10, 12, 14]  # an anchor itself counts as after


@pytest.mark.parametrize("seed", range(30))
def test_bracketing_is_what_sam2_selects(seed: int) -> None:
    chance = random.Random(seed)
    step = chance.randrange(60)
    distances = chance.sample(range(1, 60), 9)  # no two alike: there SAM 2 goes by the order in which anchors came
    anchors = [anchor for distance in distances if 0 <= (anchor := step + chance.choice((-1, 1)) * distance) < 60]
    selected, _ = select_closest_cond_frames(step, dict.fromkeys(anchors), 3)
    assert choose_anchors(anchors, step, 3, "bracketing") == sorted(selected)


@pytest.mark.parametrize("seed", range(10))
def test_without_anchors_of_the_future_both_rules_are_one(seed: int) -> None:
    chance = random.Random(seed)
    step = chance.randrange(10, 60)
    anchors = chance.sample(range(step), chance.randint(1, 9))
    newest = sorted(anchors)[-3:]
    assert choose_anchors(anchors, step, 3, "nearest") == choose_anchors(anchors, step, 3, "bracketing") == newest


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="one of nearest, bracketing"):
        choose_anchors([1], 2, 3, "farthest")
    with pytest.raises(ValueError, match="count must be >= 1"):
        choose_anchors([1], 2, 0, "nearest")
    assert choose_anchors([], 2, 3, "nearest") == []
