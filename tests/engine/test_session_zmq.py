# SPDX-License-Identifier: Apache-2.0
"""A session and a reasoner over ZeroMQ: the masks never wait."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import FakeReasoner, FakeStages, Video, moving_square, small_config
from virst_engine.session import Session
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_server import ReasonerServer
from virst_engine.types import FrameResult, ObjectState


@contextlib.contextmanager
def serving(endpoint: str, reasoner: FakeReasoner) -> Iterator[None]:
    with ReasonerServer(endpoint) as server:
        thread = threading.Thread(target=server.run, args=(reasoner,))
        thread.start()
        try:
            yield
        finally:
            server.stop()
            thread.join()


class Stream:
    """A camera of 100 frames per second of real time, 10 per second of its own."""

    def __init__(self, session: Session) -> None:
        self._session, self._video, self._t = session, Video([moving_square()]), 0

    def one(self) -> FrameResult:
        result = self._session.step(self._video.frame(self._t))
        (found,) = result.objects
        assert np.array_equal(found.mask, self._video.truth(self._t)) or found.state is not ObjectState.TRACKING
        self._t += 1
        time.sleep(0.01)
        return result

    def until(self, condition: Callable[[FrameResult], bool], seconds: float = 30.0) -> FrameResult:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition(result := self.one()):
                return result
        pytest.fail(f"it did not happen within {seconds} s")


def test_a_reasoner_may_come_late_go_and_come_back(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/reasoner"
    client = ZmqReasonerClient(endpoint, heartbeat_s=0.05, silent_after_s=0.5)
    with Session(small_config(period_s=1.0, ttl_s=500.0), FakeStages(), client) as session:
        stream = Stream(session)
        session.set_goal("the red square")
        assert "no reasoner answers" in stream.until(lambda r: r.step == 5).objects[0].message

        first = FakeReasoner()
        with serving(endpoint, first):
            stream.until(lambda r: r.objects[0].state is ObjectState.TRACKING)
            stream.until(lambda r: len(first.requests) > 3)
        stream.until(lambda r: client.status() != "")
        for _ in range(30):  # masks go on from memory
            assert stream.one().objects[0].state is ObjectState.TRACKING

        second = FakeReasoner()
        with serving(endpoint, second):
            stream.until(lambda r: len(second.requests) > 1)
            assert stream.until(lambda r: r.objects[0].prompt_age_s < 1.0).objects[0].state is ObjectState.TRACKING
