# SPDX-License-Identifier: Apache-2.0
"""The one thread that calls the Session: takes the newest frame of each camera, steps, hands the results on."""

import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from virst_engine import Frame, FrameResult
from virst_engine.errors import BadFrame
from virst_ros.frame_inbox import FrameInbox

logger = logging.getLogger(__name__)

Header = TypeVar("Header")


class Steps(Protocol):
    """The part of a Session that this thread calls by itself."""

    def step(self, frame: Frame) -> FrameResult: ...

    def check_frame(self, frame: Frame) -> None: ...

    def skips(self, frame: Frame, *, waited: bool | None = None) -> bool: ...

    def step_together(self, frames: Sequence[Frame]) -> list[FrameResult]: ...


class InferenceThread(Generic[Header]):
    """The only one who steps a session while it runs. Frames of several cameras that wait are stepped together.

    A frame that the session rejects (BadFrame) is counted and skipped. Any other failure skips the frames of its step
    too; the same failure `stop_after_failures` times in a row ends the thread, with the last traceback kept in
    `failure_traceback`. A frame that the session wants to leave out, to keep `tracking.deadline_ms`, is counted in the
    inbox, and nothing comes of it.

    A result that `on_result` fails on is counted and lost, and that is all: the results of the other cameras go out,
    and the thread goes on, however often it happens.

    Args:
        session: steps on this thread.
        inbox: frames together with what the receiver of the result needs to know about them (the header).
        on_result: called on this thread with the header, the frame and its result.
        on_bad_frame: called on this thread for each frame that was skipped, with the reason.
        on_lost_result: called on this thread for each frame whose result `on_result` failed on, with the reason.
    """

    def __init__(
        self,
        session: Steps,
        inbox: FrameInbox[tuple[Header, Frame]],
        on_result: Callable[[Header, Frame, FrameResult], None],
        on_bad_frame: Callable[[Frame, str], None],
        on_lost_result: Callable[[Frame, str], None],
        stop_after_failures: int = 5,
    ) -> None:
        self._session = session
        self._inbox = inbox
        self._on_result = on_result
        self._on_bad_frame = on_bad_frame
        self._on_lost_result = on_lost_result
        self._stop_after_failures = stop_after_failures
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.failure_traceback = ""
        self.lost_results: Counter[str] = Counter()  # by camera
        self._lost_reasons: dict[str, str] = {}  # by camera, of its newest result; empty: it was not lost
        self.step_s = 0.0  # how long the newest step took; for `on_result`

    @property
    def failed(self) -> bool:
        """The thread has given up; `failure_traceback` says on what."""
        return bool(self.failure_traceback)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """It was told to stop."""
        return self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Finish the frame at hand and end; False when that took longer than `timeout_s`."""
        self._stopping.set()
        self._inbox.close()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self.running

    def _run(self) -> None:
        failure, times = "", 0
        try:
            while not self._stopping.is_set():
                waited = self._inbox.holds_any
                items = self._inbox.take(timeout_s=0.1)
                if not items:
                    continue
                try:
                    items = self._usable(items, waited=waited)
                    results = self._step([frame for _, frame in items])
                    failure, times = "", 0
                except BadFrame as error:
                    self._skip(items, str(error))
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"
                    failure, times = text, times + 1 if text == failure else 1
                    self._skip(items, f"unexpected failure, frame skipped: {text}")
                    logger.exception("a frame failed (%d in a row)", times)
                    if times >= self._stop_after_failures:
                        self.failure_traceback = traceback.format_exc()
                        logger.critical("inference stopped after the same failure %d times in a row: %s", times, text)
                        return
                else:
                    for (header, frame), result in zip(items, results, strict=True):
                        self._hand_on(header, frame, result)
        finally:
            self._inbox.close()

    def _usable(self, items: list[tuple[Header, Frame]], *, waited: bool) -> list[tuple[Header, Frame]]:
        """Without those that are bad or left out; both are told here."""
        if len(items) > 1:  # one that cannot be used must not keep the others back
            items = [item for item in items if self._is_good(item[1])]
        return [item for item in items if not self._is_left_out(item[1], waited=waited)]

    def _step(self, frames: list[Frame]) -> list[FrameResult]:
        if not frames:
            return []
        begin_s = time.perf_counter()
        results = [self._session.step(frames[0])] if len(frames) == 1 else self._session.step_together(frames)
        self.step_s = time.perf_counter() - begin_s
        return results

    def _hand_on(self, header: Header, frame: Frame, result: FrameResult) -> None:
        try:
            self._on_result(header, frame, result)
            reason = ""
        except Exception as error:
            reason = f"the result of camera {frame.camera!r} is lost: {type(error).__name__}: {error}"
            self.lost_results[frame.camera] += 1
            if reason != self._lost_reasons.get(frame.camera):
                logger.exception("%s; further results lost for this reason are counted in /diagnostics", reason)
            self._on_lost_result(frame, reason)
        self._lost_reasons[frame.camera] = reason

    def _skip(self, items: list[tuple[Header, Frame]], reason: str) -> None:
        for _, frame in items:
            self._on_bad_frame(frame, reason)

    def _is_left_out(self, frame: Frame, *, waited: bool) -> bool:
        is_left_out = self._session.skips(frame, waited=waited)
        if is_left_out:
            self._inbox.leave_out(frame.camera)
        return is_left_out

    def _is_good(self, frame: Frame) -> bool:
        try:
            self._session.check_frame(frame)
        except BadFrame as error:
            self._on_bad_frame(frame, str(error))
            return False
        return True
