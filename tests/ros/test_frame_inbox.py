# SPDX-License-Identifier: Apache-2.0
import threading

from virst_ros.frame_inbox import FrameInbox


def test_the_newest_wins_and_the_rest_is_counted():
    inbox = FrameInbox()
    for item in ("first", "second", "third"):
        inbox.put(item)
    assert inbox.take(timeout_s=0.0) == ["third"]
    assert inbox.take(timeout_s=0.0) == []
    assert (inbox.received(), inbox.dropped()) == (3, 2)


def test_each_camera_has_a_slot_and_counts_of_its_own():
    inbox = FrameInbox(["left", "right"])
    for item in ("l1", "l2"):
        inbox.put(item, "left")
    assert inbox.take(timeout_s=0.0) == ["l2"]
    inbox.put("r1", "right")
    inbox.put("l3", "left")
    assert inbox.take(timeout_s=0.0) == ["l3", "r1"]
    assert [(inbox.received(camera), inbox.dropped(camera)) for camera in ("left", "right")] == [(3, 1), (1, 0)]
    inbox.put("r2", "right")
    inbox.close()
    assert [inbox.dropped(camera) for camera in ("left", "right")] == [1, 1]


def test_take_returns_as_soon_as_something_comes():
    inbox = FrameInbox()
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(inbox.take(timeout_s=30.0)))
    waiting.start()
    inbox.put("late")
    waiting.join(5.0)
    assert taken == [["late"]]


def test_it_tells_whether_take_would_wait():
    inbox = FrameInbox(["left", "right"])
    assert not inbox.holds_any
    inbox.put("r1", "right")
    assert inbox.holds_any
    inbox.take(timeout_s=0.0)
    assert not inbox.holds_any


def test_close_ends_the_wait():
    inbox = FrameInbox()
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(inbox.take(timeout_s=30.0)))
    waiting.start()
    inbox.close()
    waiting.join(5.0)
    assert taken == [[]]


def test_after_close_everything_is_dropped():
    inbox = FrameInbox()
    inbox.put("inside")
    inbox.close()
    inbox.put("too late")
    assert inbox.take(timeout_s=0.0) == []
    assert (inbox.received(), inbox.dropped()) == (2, 2)
