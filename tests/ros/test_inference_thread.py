# SPDX-License-Identifier: Apache-2.0
import threading

import numpy as np

from virst_engine.errors import BadFrame
from virst_engine.types import Frame, FrameResult
from virst_ros.frame_inbox import FrameInbox
from virst_ros.inference_thread import InferenceThread


def frame(stamp_ns):
    return Frame(np.zeros((4, 6, 3), np.uint8), stamp_ns)


class Scripted:
    """A session whose step does what the script says for each stamp: an exception is raised, the rest succeeds."""

    def __init__(self, script):
        self.script = script
        self.threads = set()
        self.batches = []
        self.skipped_stamps = set()
        self.waited = {}  # stamp -> what the session was told

    def step(self, frame):
        self.threads.add(threading.current_thread().name)
        outcome = self.script.get(frame.stamp_ns)
        if outcome is not None:
            raise outcome
        return FrameResult(frame.stamp_ns, 0, frame.camera, (), {})

    def check_frame(self, frame):
        outcome = self.script.get(frame.stamp_ns)
        if isinstance(outcome, BadFrame):
            raise outcome

    def skips(self, frame, *, waited=None):
        self.waited[frame.stamp_ns] = waited
        return frame.stamp_ns in self.skipped_stamps

    def step_together(self, frames):
        self.batches.append(len(frames))
        return [self.step(frame) for frame in frames]


class Running:
    """The thread, with a way to give it one frame at a time."""

    def __init__(self, script, stop_after_failures=3):
        self.session = Scripted(script)
        self.inbox = FrameInbox(("camera", "left", "right"))
        self.results, self.rejected = [], []
        self._done = threading.Semaphore(0)
        self.lost, self.unpublished = [], {}  # what is lost; the failure of on_result by camera
        self.thread = InferenceThread(
            self.session, self.inbox, self._result, self._reject, self._lose, stop_after_failures
        )
        self.thread.start()

    def _lose(self, frame, reason):
        self.lost.append((frame.camera, reason))
        self._done.release()

    def _result(self, header, frame, result):
        if frame.camera in self.unpublished:
            raise self.unpublished[frame.camera]
        self.results.append((header, result.stamp_ns))
        self._done.release()

    def _reject(self, frame, reason):
        self.rejected.append(reason)
        self._done.release()

    def give(self, *stamps):
        for stamp_ns in stamps:
            self.inbox.put((f"header {stamp_ns}", frame(stamp_ns)), "camera")
            assert self._done.acquire(timeout=10.0)


def test_results_come_with_the_header_of_their_frame_from_one_thread():
    running = Running({})
    running.give(1, 2)
    assert running.thread.stop(10.0)
    assert running.results == [("header 1", 1), ("header 2", 2)]
    assert running.session.threads == {"inference"}


def test_a_bad_frame_is_skipped_and_the_next_one_works():
    running = Running({1: BadFrame("no pixels")})
    running.give(1, 2)
    assert running.thread.stop(10.0)
    assert running.rejected == ["no pixels"]
    assert running.results == [("header 2", 2)]


def test_the_same_failure_in_a_row_stops_with_its_traceback():
    running = Running({stamp: RuntimeError("boom") for stamp in (1, 2, 3)})
    running.give(1, 2, 3)
    running.thread._thread.join(10.0)
    assert not running.thread.running
    assert running.thread.failed
    assert "RuntimeError: boom" in running.thread.failure_traceback
    assert "in step" in running.thread.failure_traceback


def test_failures_that_differ_or_are_interrupted_do_not_stop():
    failures = {
        1: RuntimeError("a"),
        2: RuntimeError("b"),
        3: RuntimeError("b"),
        5: RuntimeError("b"),
        6: RuntimeError("b"),
    }
    running = Running(failures)
    running.give(1, 2, 3, 4, 5, 6, 7)
    assert running.thread.stop(10.0)
    assert not running.thread.failed
    assert [stamp for _, stamp in running.results] == [4, 7]


def give_together(running, *frames):
    """Frame 1 of "camera", and while it is stepped those of (stamp, camera), which are then taken in one go."""
    holding = threading.Event()
    real_step = running.session.step

    def slow_step(one):
        if one.stamp_ns == 1:
            holding.wait(10.0)
        return real_step(one)

    running.session.step = slow_step
    running.inbox.put(("header 1", frame(1)), "camera")
    for _ in range(1000):
        if running.inbox._items["camera"] is None:
            break
        holding.wait(0.01)
    for stamp_ns, camera in frames:
        running.inbox.put((f"header {stamp_ns}", Frame(np.zeros((4, 6, 3), np.uint8), stamp_ns, camera)), camera)
    holding.set()
    for _ in range(1 + len(frames)):
        assert running._done.acquire(timeout=10.0)
    assert running.thread.stop(10.0)


def test_frames_of_several_cameras_that_wait_are_stepped_together():
    running = Running({12: BadFrame("no pixels")})
    give_together(running, (10, "left"), (11, "right"), (12, "camera"))
    assert running.session.batches == [2]
    assert running.rejected == ["no pixels"]
    assert sorted(stamp for _, stamp in running.results) == [1, 10, 11]


def test_a_result_that_is_lost_keeps_back_no_other_camera_and_stops_nothing():
    running = Running({}, stop_after_failures=1)
    running.unpublished["left"] = RuntimeError("no publisher")
    give_together(running, (10, "left"), (11, "right"))
    assert [stamp for _, stamp in running.results] == [1, 11]
    assert running.lost == [("left", "the result of camera 'left' is lost: RuntimeError: no publisher")]
    assert running.thread.lost_results == {"left": 1}
    assert (running.rejected, running.thread.failed) == ([], False)


def test_the_session_is_told_which_frames_waited_whatever_the_thread_did_meanwhile():
    running = Running({})
    is_publishing, go_on = threading.Event(), threading.Event()
    publish = running.thread._on_result

    def slow(header, one, result):
        is_publishing.set()
        assert go_on.wait(10.0)
        publish(header, one, result)

    running.thread._on_result = slow
    for _ in range(1000):  # until the thread waits for a frame
        if running.inbox._changed._waiters:
            break
        threading.Event().wait(0.01)
    running.inbox.put(("header 1", frame(1)), "camera")
    assert is_publishing.wait(10.0)
    running.inbox.put(("header 2", frame(2)), "camera")
    go_on.set()
    for _ in range(2):
        assert running._done.acquire(timeout=10.0)
    assert running.thread.stop(10.0)
    assert running.session.waited == {1: False, 2: True}


def test_a_failing_step_skips_each_of_its_frames_once():
    running = Running({10: RuntimeError("boom"), 12: BadFrame("no pixels")})
    give_together(running, (10, "left"), (11, "right"), (12, "camera"))
    failure = "unexpected failure, frame skipped: RuntimeError: boom"
    assert sorted(running.rejected) == ["no pixels", failure, failure]


def test_a_frame_that_the_session_leaves_out_is_counted_and_nothing_comes_of_it():
    running = Running({})
    running.session.skipped_stamps = {2, 3}
    running.give(1)
    for stamp_ns in (2, 3):
        running.inbox.put((f"header {stamp_ns}", frame(stamp_ns)), "camera")
        for _ in range(1000):
            if running.inbox.left_out("camera") == stamp_ns - 1:
                break
            threading.Event().wait(0.01)
    running.give(4)
    assert running.thread.stop(10.0)
    assert [stamp for _, stamp in running.results] == [1, 4]
    assert running.rejected == []
    assert (running.inbox.received("camera"), running.inbox.dropped("camera")) == (4, 2)
    assert (running.inbox.left_out("camera"), running.inbox.left_out("left")) == (2, 0)
