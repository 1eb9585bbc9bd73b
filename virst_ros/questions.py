# SPDX-License-Identifier: Apache-2.0
"""Waiting for answers in words without keeping the executor: callbacks await them, other requests are served meanwhile.

The thread that answers wakes the executor by a guard condition. While a question is open, a timer looks at its time,
for answers that never come: a session tells the time by images, and there may be none.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import rclpy
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from virst_engine.errors import Unanswered

CHECK_PERIOD_S = 0.1  # of time-outs while a question is open


@dataclass(eq=False)
class _Waiting:
    answer: Future[str]
    limit_s: float
    since_s: float = field(default_factory=time.monotonic)
    is_over: Any = field(default_factory=rclpy.task.Future)  # what the callback awaits; it has no result
    why_not: str = ""  # there will be no answer

    @property
    def why_late(self) -> str:
        """Why its time is over; empty while it is not."""
        if time.monotonic() - self.since_s < self.limit_s:
            return ""
        news = "" if self.answer.running() else ": no image was processed since"
        return f"no answer within {self.limit_s:g} s{news}; see /diagnostics"


class Questions:
    """The questions of a node that are open.

    Args:
        group: for what wakes those that wait; not the one of the callbacks that do.
    """

    def __init__(self, node: Node, group: CallbackGroup) -> None:
        self._node, self._group = node, group
        self._lock = threading.Lock()  # guards what follows
        self._open: list[_Waiting] = []
        self._timer: Any = None
        self._answered = node.create_guard_condition(self._look, callback_group=group)

    async def answer_of(self, answer: Future[str], limit_s: float) -> str:
        """The words, for a callback to await. Raises Unanswered; also when there are none after `limit_s`."""
        waiting = _Waiting(answer, limit_s)
        with self._lock:
            self._open.append(waiting)
            if self._timer is None:
                # In real time, also where the node's clock is simulated and stands still.
                steady = Clock(clock_type=ClockType.STEADY_TIME)
                self._timer = self._node.create_timer(
                    CHECK_PERIOD_S, self._look, callback_group=self._group, clock=steady
                )
        answer.add_done_callback(lambda _: self._answered.trigger())
        await waiting.is_over
        if waiting.why_not:
            raise Unanswered(waiting.why_not)
        return answer.result(timeout=0)

    def stop(self, reason: str) -> None:
        """End those that are open: the node does not go on."""
        self._release(lambda _: reason)
        self._answered.trigger()  # another thread than the executor's may have said so

    def _look(self) -> None:
        self._release(lambda waiting: waiting.why_late)

    def _release(self, why_not: Callable[[_Waiting], str]) -> None:
        """Let those go on that have their answer, or a reason to get none."""
        with self._lock:
            for waiting in list(self._open):
                is_answered = waiting.answer.done()
                waiting.why_not = "" if is_answered else why_not(waiting)
                if is_answered or waiting.why_not:
                    self._open.remove(waiting)
                    waiting.is_over.set_result(None)
                    waiting.answer.cancel()  # where no frame has taken it up yet
            if not self._open and self._timer is not None:
                self._node.destroy_timer(self._timer)
                self._timer = None
