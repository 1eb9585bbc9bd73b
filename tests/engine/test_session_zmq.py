# SPDX-License-Identifier: Apache-2.0
"""A session and a reasoner over ZeroMQ: the masks never wait."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import FakeReasoner, FakeStages, Video, moving_square, small_config
from virst_engine.session import Session
from virst_engine.slow.zmq_client import ZmqReasonerClient
from virst_engine.slow.zmq_pool import PoolServer
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


ROOT = Path(__file__).parents[2]
REASONER = """
import sys, time
from tests.fakes import FakeReasoner
from virst_engine.slow.zmq_server import serve

class SlowReasoner(FakeReasoner):
    def answer(self, request):
        time.sleep(0.2)  # so that a signal meets it at work
        return super().answer(request)

serve(SlowReasoner, sys.argv[1], joins_pool=True)
"""


@pytest.mark.slow
def test_reasoners_of_a_pool_may_die_and_hang_while_a_session_goes_on(tmp_path: Path) -> None:
    robots, reasoners = f"ipc://{tmp_path}/robots", f"ipc://{tmp_path}/reasoners"
    client = ZmqReasonerClient(robots, heartbeat_s=0.05)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(PoolServer(robots, reasoners))
        thread = threading.Thread(target=pool.run)
        stack.callback(thread.join)
        stack.callback(pool.stop)
        thread.start()

        def start() -> "subprocess.Popen[bytes]":
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen([sys.executable, "-c", REASONER, reasoners], env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        session = stack.enter_context(
            Session(small_config(period_s=0.1, retry_s=0.1, ttl_s=600.0), FakeStages(), client)
        )
        stream = Stream(session)
        session.set_goal("the red square")
        assert "no reasoner" in stream.until(lambda r: r.step == 5).objects[0].message
        running = [start(), start()]
        stream.until(lambda r: r.objects[0].state is ObjectState.TRACKING)
        stream.until(lambda r: _reasoners(client) == 2)
        for how in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
            running.pop(0).send_signal(how)
            stream.until(lambda r: _reasoners(client) == 1)
            lost_step = stream.one().step
            found = stream.until(lambda r, since=lost_step: r.objects[0].prompt_age_s < 0.1 * (r.step - since))
            assert found.objects[0].state is ObjectState.TRACKING  # with an anchor of a frame since then
            running.append(start())
            stream.until(lambda r: _reasoners(client) == 2)
        assert client.status() == ""


def _reasoners(client: ZmqReasonerClient) -> int:
    heartbeat = client.heartbeat()
    return 0 if heartbeat is None else heartbeat.reasoners
