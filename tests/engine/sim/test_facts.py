# SPDX-License-Identifier: Apache-2.0
"""What sentences mean in hand-made trajectories whose truth is plain to see."""

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim.expressions import expressions, find_meaning
from virst_engine.sim.facts import NO, UNCLEAR, YES, Facts, both, the_only, tri

LAST = 21


def line(start, end, first=0, last=21, frames=22):
    """Still at `start`, then evenly to `end` between two frames, then still there."""
    u = np.clip((np.arange(frames) - first) / (last - first), 0, 1)[:, None]
    return [tuple(p) for p in (1 - u) * np.array(start) + u * np.array(end)]


def means(recording, sentence):
    """Target ids of a sentence of the grammar; None if it is unclear."""
    expression = find_meaning(recording, sentence, query_frame=LAST)
    return None if expression is None else expression.target_ids


def test_three_valued_logic():
    values = np.array([NO, UNCLEAR, YES], np.int8)
    table = both(values[:, None], values[None, :])
    np.testing.assert_array_equal(table, [[NO, NO, NO], [NO, UNCLEAR, UNCLEAR], [NO, UNCLEAR, YES]])
    np.testing.assert_array_equal(
        tri(np.array([True, False, False]), np.array([False, True, False])), [YES, NO, UNCLEAR]
    )
    assert the_only(np.array([NO, YES, NO])) == 1
    assert the_only(np.array([YES, YES])) is None
    assert the_only(np.array([YES, UNCLEAR])) is None
    assert the_only(np.array([NO, NO])) is None


def test_attributes(make_recording, thing):
    r = make_recording(
        [thing("red", "ball", (-0.1, 0)), thing("red", "box", (0.1, 0)), thing("blue", "ball", (0, 0.1))]
    )
    assert means(r, "the red ball") == (0,)
    assert means(r, "show me the box") == (1,)
    assert means(r, "the blue thing") == (2,)
    assert means(r, "the blue box") == ()
    assert means(r, "the purple egg") == ()
    assert means(r, "the ball") is None  # two of them
    assert means(r, "the red object") is None
    assert means(r, "a sentence outside of the grammar") is None


def test_left_and_right_are_as_the_camera_sees_them(make_recording, thing):
    r = make_recording(
        [thing("red", "box", (-0.15, 0)), thing("blue", "can", (0, 0)), thing("green", "box", (0.15, 0))]
    )
    assert r.centre_px[0, 0, 0] < r.centre_px[0, 1, 0] < r.centre_px[0, 2, 0]
    assert means(r, "the box left of the blue can") == (0,)
    assert means(r, "the box right of the blue can") == (2,)
    assert means(r, "the leftmost object") == (0,)
    assert means(r, "the rightmost box") == (2,)
    assert means(r, "the green box left of the blue can") == ()


def test_a_small_difference_makes_no_sentence(make_recording, thing):
    r = make_recording([thing("red", "box", (-0.02, -0.1)), thing("blue", "can", (0, 0.1))])
    assert means(r, "the box left of the blue can") is None
    assert means(r, "the leftmost object") is None


def test_near_and_far(make_recording, thing):
    r = make_recording(
        [thing("red", "ball", (0, -0.12)), thing("blue", "can", (-0.12, 0)), thing("green", "ball", (0.03, 0.12))]
    )
    assert means(r, "the ball behind the blue can") == (2,)
    assert means(r, "the ball in front of the blue can") == (0,)
    assert means(r, "the object nearest to the camera") == (0,)
    assert means(r, "the farthest ball") == (2,)
    assert means(r, "the can behind the green ball") == ()


def test_nearest_to_something(make_recording, thing):
    r = make_recording(
        [thing("red", "ball", (0.05, 0)), thing("blue", "can", (0.15, 0)), thing("green", "ball", (-0.15, 0))]
    )
    assert means(r, "the ball closest to the blue can") == (0,)


def test_sizes(make_recording, thing):
    r = make_recording(
        [
            thing("red", "ball", (-0.1, 0), size="small"),
            thing("red", "ball", (0.1, 0), size="large", scale=1.6),
            thing("blue", "box", (0, 0.1), size="small"),
        ]
    )
    assert means(r, "the large ball") == (1,)
    assert means(r, "the little red ball") == (0,)
    assert means(r, "the biggest object") == (1,)
    assert means(r, "the small box") is None  # no other box to compare it with


def test_moving_in_the_image(make_recording, thing):
    r = make_recording(
        [
            thing("red", "ball", line((0.15, 0), (0.0, 0))),
            thing("blue", "box", (-0.15, 0.1)),
            thing("green", "can", line((-0.1, -0.1), (0.1, -0.1))),
        ]
    )
    assert means(r, "the object moving to the left") == (0,)
    assert means(r, "the object moving to the right") == (2,)
    assert means(r, "the thing that does not move") == (1,)
    assert means(r, "the can moving to the left") == ()
    assert means(r, "the object moving away") == ()
    assert means(r, "the moving object") is None  # two move


def test_moving_away_and_toward(make_recording, thing):
    r = make_recording([thing("red", "ball", line((0.1, -0.1), (0.1, 0.1))), thing("blue", "ball", (-0.1, 0))])
    assert means(r, "the ball moving away") == (0,)
    assert means(r, "the object that moves toward the camera") == ()
    back = make_recording([thing("red", "ball", line((0.1, 0.1), (0.1, -0.1))), thing("blue", "ball", (-0.1, 0))])
    assert means(back, "the object coming closer") == (0,)


def test_what_stopped_is_not_said_to_be_moving(make_recording, thing):
    r = make_recording(
        [thing("red", "ball", line((0.15, 0), (0.0, 0), last=10)), thing("blue", "ball", (-0.1, 0))], family="full"
    )
    assert means(r, "the object moving to the left") is None
    assert means(r, "the object that stopped") == (0,)
    assert means(r, "the ball that started moving") == ()


def test_what_can_roll_follows_shape_and_pose(make_recording, thing):
    standing = make_recording(
        [thing("red", "can", (-0.1, 0)), thing("blue", "box", (0, 0)), thing("green", "egg", (0.1, 0))]
    )
    assert means(standing, "the thing that can roll") == (2,)
    assert means(standing, "something that can roll") == (2,)
    assert means(standing, "the one you could stack a box on") is None  # can and box
    lying = make_recording([thing("red", "can", (-0.1, 0), lying=True), thing("blue", "box", (0.1, 0))])
    assert means(lying, "the thing that can roll") == (0,)
    assert means(lying, "the one you could stack a box on") == (1,)
    assert means(lying, "the thing a hen could lay") == ()
    both_roll = make_recording([thing("red", "ball", (-0.1, 0)), thing("green", "egg", (0.1, 0))], family="full")
    assert means(both_roll, "the thing that can roll") is None
    assert means(both_roll, "the things that can roll") == (0, 1)


def test_hanging_and_fallen(make_recording, thing):
    up, down = (0.12,) * 22, (0.12,) * 8 + (0.05,) + (0.0,) * 13
    r = make_recording([thing("red", "box", (-0.1, 0), lift_m=up), thing("blue", "box", (0.1, 0))])
    assert means(r, "the thing that is about to fall") == (0,)
    assert means(r, "the object that fell") == ()
    fallen = make_recording([thing("red", "box", (-0.1, 0), lift_m=down), thing("blue", "box", (0.1, 0))])
    assert means(fallen, "the object that fell") == (0,)
    assert means(fallen, "whatever is about to fall") == ()


def test_order(make_recording, thing):
    r = make_recording(
        [
            thing("blue", "can", line((-0.15, 0), (-0.05, 0), first=3, last=7)),
            thing("red", "ball", line((0.15, 0), (0.05, 0), first=13, last=18)),
            thing("green", "can", (0, 0.12)),
        ],
        family="full",
    )
    assert means(r, "the can that stopped before the ball moved") == (0,)
    assert means(r, "the can that moved before the ball") == (0,)
    assert means(r, "the ball that moved after the blue can") == (1,)
    assert means(r, "the object that moved first") == (0,)
    assert means(r, "the object that moved last") == (1,)
    assert means(r, "the ball that moved before the blue can") == ()
    assert means(r, "the object that moved before the green can") is None  # it never moved


def test_count(make_recording, thing):
    out = line((0.15, 0), (0.05, 0), first=2, last=6)
    back = line((0.05, 0), (0.15, 0), first=12, last=16)
    twice = out[:10] + back[10:]
    r = make_recording(
        [thing("red", "ball", twice), thing("blue", "ball", line((-0.15, 0), (-0.05, 0), first=4, last=9))],
        family="full",
    )
    assert means(r, "the object that moved twice") == (0,)
    assert means(r, "the ball that moved once") == (1,)


def test_plural(make_recording, thing):
    r = make_recording(
        [thing("red", "box", (-0.15, 0)), thing("blue", "box", (-0.05, 0)), thing("red", "ball", (0.12, 0))],
        family="full",
    )
    assert means(r, "the two boxes") == (0, 1)
    assert means(r, "all red objects") == (0, 2)
    assert means(r, "the boxes left of the ball") == (0, 1)
    assert means(r, "the three boxes") is None
    assert means(r, "the balls") is None  # there is one


def test_hidden_and_returned(make_recording, thing):
    shown = (1.0,) * 6 + (0.0,) * 8 + (1.0,) * 8
    r = make_recording([thing("red", "ball", (-0.1, 0), visible=shown), thing("blue", "ball", (0.1, 0))], family="full")
    assert means(r, "the ball that was hidden") == (0,)
    assert means(r, "the ball that left and came back") is None or means(r, "the ball that left and came back") == ()


def test_what_never_shows_does_not_exist(make_recording, thing):
    r = make_recording([thing("red", "ball", (-0.1, 0), visible=(0.0,) * 22), thing("blue", "ball", (0.1, 0))])
    assert means(r, "the ball") == (1,)
    assert means(r, "the red ball") == ()
    half = make_recording([thing("red", "ball", (-0.1, 0), visible=(0.3,) * 22), thing("blue", "ball", (0.1, 0))])
    assert means(half, "the red ball") is None


def test_a_short_window_says_nothing_of_motion(make_recording, thing):
    r = make_recording([thing("red", "ball", line((0.15, 0), (0, 0))), thing("blue", "ball", (-0.1, 0))])
    found = expressions(r, query_frame=0, rng=np.random.default_rng(0))
    assert found
    assert not [e for e in found if e.topic == "motion"]


def test_wrong_frames_are_refused(make_recording, thing):
    r = make_recording([thing("red", "ball", (0, 0))])
    with pytest.raises(SceneError, match=r"query frame 22 is not in 0\.\.21"):
        Facts(r, 22, 22)
    with pytest.raises(SceneError, match="at least 1 frame"):
        Facts(r, 2, 0)
