# SPDX-License-Identifier: Apache-2.0
"""When to ask the reasoner about each goal of one camera. Not thread-safe: the session holds a lock.

Time is the stamps of the frames, so a recording gives the same requests at any speed. A goal has at most one request in
flight. One without an answer is given up, and another is asked, for the reasoner may have lost it; but a reasoner that
is only slow does answer, so the answer to a request that was given up is taken until a newer one is answered. Adding a
goal and `new_epoch` give it a new epoch, and answers of older ones are worth nothing.
"""

from dataclasses import dataclass, field

from virst_engine.config import ReasonerParameters
from virst_engine.types import Clip, Goal, ReasonerAnswer, ReasonerRequest

MAX_OPEN_REQUESTS = 8  # per goal, the one in flight and those given up; answers to older ones are dropped


@dataclass(frozen=True)
class OpenRequest:
    """A request in flight, or the one that an answer belongs to."""

    request_id: int
    asked_ns: int
    is_full_window: bool
    newest_step: int


@dataclass
class _Entry:
    goal: Goal
    epoch: int
    in_flight: OpenRequest | None = None
    unanswered: list[OpenRequest] = field(default_factory=list)  # oldest first, the one in flight is the last
    asked_ns: int | None = None
    must_ask: bool = True


class RequestBook:
    def __init__(self, parameters: ReasonerParameters) -> None:
        self._reasoner = parameters
        self._entries: dict[str, _Entry] = {}
        self._epoch = 0
        self._request_id = 0

    def reconfigure(self, parameters: ReasonerParameters) -> None:
        """Take other times between requests; those in flight are judged by them too."""
        self._reasoner = parameters

    def add(self, goal: Goal) -> None:
        """A goal that is to be asked about; it is due at once."""
        self._epoch += 1
        self._entries[goal.goal_id] = _Entry(goal, self._epoch)

    def remove(self, goal_id: str) -> None:
        """It is not asked about any more. KeyError when it was not: that is our own mistake."""
        del self._entries[goal_id]

    def new_epoch(self) -> None:
        """Answers to all requests so far are worthless; every goal is due at once."""
        self._epoch += 1
        for entry in self._entries.values():
            entry.epoch, entry.in_flight, entry.asked_ns, entry.must_ask = self._epoch, None, None, True
            entry.unanswered.clear()

    def give_up(self, now_ns: int, *, everything: bool = False) -> list[Goal]:
        """Goals whose request went without an answer for `reasoner.ttl_s`, or all in flight. They are due again."""
        given_up = []
        ttl_ns = 0 if everything else round(self._reasoner.ttl_s * 1e9)
        for entry in self._entries.values():
            if entry.in_flight is not None and now_ns - entry.in_flight.asked_ns >= ttl_ns:
                entry.in_flight, entry.must_ask = None, True
                given_up.append(entry.goal)
        return given_up

    def is_due(self, goal_id: str, now_ns: int, *, is_tracked: bool) -> bool:
        """Whether to ask now: nothing in flight, and never asked, told to ask again, or long enough ago."""
        entry = self._entries[goal_id]
        if entry.in_flight is not None:
            return False
        if entry.must_ask or entry.asked_ns is None:
            return True
        wait_s = self._reasoner.period_s if is_tracked else self._reasoner.retry_s
        return now_ns - entry.asked_ns >= round(wait_s * 1e9)

    def new_request_id(self) -> int:
        """One that no request of this camera has had, about a goal or otherwise."""
        self._request_id += 1
        return self._request_id

    def open_request(self, goal_id: str, clip: Clip, *, is_full_window: bool) -> ReasonerRequest:
        """Note that this goal asks about the clip, at the stamp of its newest frame."""
        entry = self._entries[goal_id]
        self.new_request_id()
        now_ns = int(clip.stamps_ns[-1])
        entry.in_flight = OpenRequest(self._request_id, now_ns, is_full_window, int(clip.steps[-1]))
        entry.unanswered = [*entry.unanswered, entry.in_flight][-MAX_OPEN_REQUESTS:]
        entry.asked_ns, entry.must_ask = now_ns, False
        return ReasonerRequest(self._request_id, entry.epoch, goal_id, entry.goal.sentence, clip)

    def take_answer(self, answer: ReasonerAnswer) -> OpenRequest | None:
        """The request that it answers; None for an answer that nobody waits for any more.

        That request is closed then, and so are older ones. A newer one stays in flight.
        """
        entry = self._entries.get(answer.goal_id)
        if entry is None or entry.epoch != answer.epoch:
            return None
        request = next((r for r in entry.unanswered if r.request_id == answer.request_id), None)
        if request is None:
            return None
        entry.unanswered = [r for r in entry.unanswered if r.request_id > request.request_id]
        if entry.in_flight == request:
            entry.in_flight = None
        return request

    def drop_requests(self, goal_id: str, now_ns: int) -> None:
        """What is on its way about this goal is worth nothing any more; the next request has the usual time to wait."""
        entry = self._entries.get(goal_id)
        if entry is not None:
            entry.in_flight, entry.asked_ns, entry.must_ask = None, now_ns, False
            entry.unanswered.clear()

    def ask_again(self, goal_id: str) -> None:
        """The answer was of no use: the goal, if it is still set, is due at the next frame."""
        if goal_id in self._entries:
            self._entries[goal_id].must_ask = True
