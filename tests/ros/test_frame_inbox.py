# SPDX-License-Identifier: Apache-2.0
import threading
import time

from virst_ros.frame_inbox import FrameInbox


def test_the_newest_wins_and_the_rest_is_counted():
    inbox = FrameInbox()
    for item in ("first", "second", "third"):
        inbox.put(item)
    assert inbox.take(timeout_s=0.0) == "third"
    assert inbox.take(timeout_s=0.0) is None
    assert (inbox.received, inbox.dropped) == (3, 2)


def test_take_returns_as_soon_as_something_comes():
    inbox = FrameInbox()
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(inbox.take(timeout_s=30.0)))
    waiting.start()
    inbox.put("late")
    waiting.join(5.0)
    assert taken == ["late"]


def test_close_and_wake_end_the_wait():
    for end in (FrameInbox.close, FrameInbox.wake):
        inbox = FrameInbox()
        taken = []
        waiting = threading.Thread(target=lambda box=inbox, out=taken: out.append(box.take(timeout_s=30.0)))
        waiting.start()
        while waiting.is_alive():  # wake is lost on who does not wait yet
            end(inbox)
            time.sleep(0.01)
        assert taken == [None]


def test_after_close_everything_is_dropped():
    inbox = FrameInbox()
    inbox.put("inside")
    inbox.close()
    inbox.put("too late")
    assert inbox.take(timeout_s=0.0) is None
    assert (inbox.received, inbox.dropped) == (2, 2)
