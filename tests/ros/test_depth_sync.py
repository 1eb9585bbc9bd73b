# SPDX-License-Identifier: Apache-2.0
from virst_ros.depth_sync import SILENT_S, DepthSync, Match

MS = 1_000_000


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def sync(slop_ms=0, period_ms=33, queue_size=10):
    clock = Clock()
    made = DepthSync(queue_size, slop_ms * MS, clock)
    for number in range(6):
        made.image_came(number * period_ms * MS)
    return made, clock


def test_equal_stamps_belong_together_whichever_comes_first():
    made, _ = sync()
    assert made.put_depth(100, "depth 100") == []
    assert made.put_frame(100, "frame 100") == [Match("frame 100", "depth 100")]
    assert made.put_frame(200, "frame 200") == []
    assert made.put_depth(200, "depth 200") == [Match("frame 200", "depth 200")]
    assert made.put_depth(300, "depth 300") == [], "a frame is given back once"


def test_without_slop_one_nanosecond_is_too_much():
    made, _ = sync()
    made.put_depth(101, "depth")
    assert made.put_frame(100, "frame") == [Match("frame", None)]
    made.put_depth(199, "depth")
    assert made.put_frame(200, "frame") == [], "its own may still come"
    assert made.put_depth(201, "depth") == [Match("frame", None)], "but not any more"


def test_with_slop_the_nearest_depth_is_taken():
    made, _ = sync(slop_ms=10)
    made.put_depth(1000 * MS, "far")
    made.put_depth(1008 * MS, "near")
    assert made.put_frame(1006 * MS, "frame") == [Match("frame", "near")]
    assert made.put_frame(1019 * MS, "late") == [], "11 ms are too much, but depth is still on its way"
    assert made.put_depth(1025 * MS, "next") == [Match("late", "next")]


def test_the_slop_is_never_more_than_half_a_frame():
    made, _ = sync(slop_ms=500, period_ms=33)
    assert made.slop_ns == 33 * MS // 2
    made.put_depth(1000 * MS, "depth")
    made.put_depth(1100 * MS, "past")
    assert made.put_frame(1017 * MS, "frame") == [Match("frame", None)]
    assert made.put_frame(1016 * MS, "frame") == [Match("frame", "depth")]


def test_before_the_rate_is_known_only_equal_stamps_count():
    made = DepthSync(10, 10 * MS)
    made.image_came(0)
    assert made.slop_ns == 0
    made.put_depth(5 * MS, "depth")
    assert made.put_frame(4 * MS, "frame") == [Match("frame", None)]
    assert made.put_frame(5 * MS, "frame") == [Match("frame", "depth")]


def test_the_next_frame_ends_the_wait_of_the_one_before():
    made, _ = sync()
    made.put_depth(100, "depth 100")
    assert made.put_frame(200, "frame 200") == []
    assert made.put_frame(300, "frame 300") == [Match("frame 200", None)]
    assert made.put_depth(300, "depth 300") == [Match("frame 300", "depth 300")]


def test_depth_that_does_not_come_any_more_is_not_waited_for():
    made, clock = sync()
    assert made.put_frame(100, "frame 100") == [Match("frame 100", None)], "none has ever come"
    made.put_depth(100, "depth 100")
    assert made.put_frame(200, "frame 200") == []
    clock.now_s += 2 * SILENT_S
    assert made.put_frame(300, "frame 300") == [Match("frame 200", None), Match("frame 300", None)]


def test_old_depth_is_forgotten():
    made, _ = sync(queue_size=2)
    for stamp in (100, 200, 300):
        made.put_depth(stamp, stamp)
    assert made.put_frame(100, "frame") == [Match("frame", None)]
    assert made.put_frame(200, "frame") == [Match("frame", 200)]
    assert made.nearest_gap_ns(240) == 40
    assert DepthSync(1, 0).nearest_gap_ns(0) is None


def test_what_is_cleared_does_not_come_back():
    made, _ = sync()
    made.put_depth(100, "depth 100")
    assert made.put_frame(200, "frame 200") == []
    made.clear()
    assert made.put_depth(200, "depth 200") == []
    assert made.put_frame(200, "another") == [Match("another", "depth 200")]


def test_time_that_goes_back_starts_over():
    made, _ = sync()
    made.put_depth(1000, "before")
    made.put_depth(10, "after")
    assert made.put_frame(10, "frame") == [Match("frame", "after")]
    assert made.put_frame(20, "frame") == [], "depth is on its way again"
    made.image_came(5)
    made.image_came(5 + 33 * MS)
    assert made.put_depth(20, "own") == [Match("frame", "own")]
