# SPDX-License-Identifier: Apache-2.0
"""The goals that are set, and when to ask the reasoner about each. Not thread-safe: the session holds a lock.

Time is the stamps of the frames, so a recording gives the same requests at any speed. A goal has at most one request in
flight. One without an answer is given up, and another is asked, for the reasoner may have lost it; but a reasoner that
is only slow does answer, so the answer to a request that was given up is taken until a newer one is answered. Setting a
goal and `new_epoch` give it a new epoch, and answers of older ones are worth nothing.
"""

import unicodedata
from dataclasses import dataclass, field

from virst_engine.config import GoalParameters, ReasonerParameters
from virst_engine.errors import BadGoal, UnknownGoal
from virst_engine.types import Clip, Goal, ReasonerAnswer, ReasonerRequest

MAX_ID_LENGTH = 128
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


def _control_character(text: str) -> str | None:
    # Cc control, Cs lone surrogate (cannot be encoded), Zl and Zp line and paragraph separators
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


class GoalBook:
    def __init__(self, goal: GoalParameters, reasoner: ReasonerParameters, max_goals: int) -> None:
        self._parameters, self._reasoner, self._max_goals = goal, reasoner, max_goals
        self._entries: dict[str, _Entry] = {}
        self._epoch = 0
        self._request_id = 0
        self._named = 0

    def reconfigure(self, reasoner: ReasonerParameters) -> None:
        """Take other times between requests; those in flight are judged by them too."""
        self._reasoner = reasoner

    def prepare(
        self,
        sentence: str,
        *,
        goal_id: str = "",
        object_id: str = "",
        camera: str = "",
        replace: bool = False,
        is_pointed_out: bool = False,
    ) -> Goal:
        """A goal that may be `put`: ids filled in, no instance id yet. Changes nothing.

        With `replace`, every other goal is to be cleared first, also the one of the same id. One that `is_pointed_out`
        needs no sentence.

        Raises:
            BadGoal: it cannot be set; the message says what to change.
        """
        text = sentence.strip()
        if not text and not is_pointed_out:
            raise BadGoal("a goal must be a sentence, got an empty one; describe the object, like 'the red ball'")
        if len(text) > self._parameters.max_length:
            limit = self._parameters.max_length
            raise BadGoal(f"a goal may have {limit} characters, got {len(text)}; shorten it or raise goal.max_length")
        bad = _control_character(text)
        if bad is not None:
            raise BadGoal(f"a goal must be one line of text, got the character U+{ord(bad):04X}; remove it")
        for name, value in (("goal id", goal_id), ("object id", object_id), ("camera", camera)):
            if len(value) > MAX_ID_LENGTH or _control_character(value) is not None:
                raise BadGoal(f"a {name} must be one line of at most {MAX_ID_LENGTH} characters, got {value[:40]!r}")

        alive = {} if replace else self._entries
        if goal_id in alive:
            raise BadGoal(f"goal id {goal_id!r} is set already; clear it first or choose another")
        if len(alive) >= self._max_goals:
            raise BadGoal(f"{self._max_goals} goals are set; clear one or raise tracking.max_objects")
        goal_id = goal_id or self._free_name()
        object_id = object_id or goal_id
        owner = next((e.goal.goal_id for e in alive.values() if e.goal.object_id == object_id), None)
        if owner is not None:
            raise BadGoal(f"object id {object_id!r} belongs to goal {owner!r}; choose another or clear that goal first")
        return Goal(goal_id, object_id, text, camera)

    def put(self, goal: Goal) -> None:
        """Set a goal that `prepare` allowed; it is due at once."""
        self._epoch += 1
        self._entries[goal.goal_id] = _Entry(goal, self._epoch)

    def clear(self, goal_id: str) -> Goal:
        """Raises UnknownGoal."""
        entry = self._entries.pop(goal_id, None)
        if entry is None:
            known = ", ".join(map(repr, self._entries)) or "none"
            raise UnknownGoal(f"goal id {goal_id[:MAX_ID_LENGTH]!r} is not set; goals that are: {known}")
        return entry.goal

    def goals(self) -> tuple[Goal, ...]:
        """In the order in which they were set."""
        return tuple(entry.goal for entry in self._entries.values())

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

    def open_request(self, goal_id: str, clip: Clip, *, is_full_window: bool) -> ReasonerRequest:
        """Note that this goal asks about the clip, at the stamp of its newest frame."""
        entry = self._entries[goal_id]
        self._request_id += 1
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

    def _free_name(self) -> str:
        while True:
            self._named += 1
            name = f"goal_{self._named}"
            if name not in self._entries:
                return name
