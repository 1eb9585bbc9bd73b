# SPDX-License-Identifier: Apache-2.0
"""Which reasoner of a pool answers which request, and what happens when one dies or hangs. No sockets, no clock.

Robots (clients) talk to the pool as they talk to a single reasoner. Reasoners (members) join by sending heartbeats and
get one request at a time. The least loaded one is first: among the idle ones, that whose last answers came soonest,
which also spares a machine that is busy with something else.

A request outlives the reasoner that works on it:

    died, left, talks nonsense       the request goes to the front of the queue and to the next idle reasoner
    silent for SILENT_S              nothing new for it; another one gets its request too, and the first answer counts
    much slower than it used to be   the same: its process is alive, but the computation may hang (`_Member.patience_s`)

A goal that costs MAX_STRIKES reasoners their lives is refused for a while: it must not take the whole pool down.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from virst_engine.errors import WireError
from virst_engine.slow import wire
from virst_engine.slow.process import RareWarnings
from virst_engine.slow.reasoner import are_frames_of, refusal
from virst_engine.slow.request_queue import RequestQueue, Waiting
from virst_engine.types import ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)

BEAT_S = 0.25  # between heartbeats of a reasoner, and between ticks
SILENT_S = 1.0  # without one: handed over, so within SILENT_S + 2 * BEAT_S
GONE_S = 10.0  # without a message: forgotten; robots too
LEAST_PATIENCE_S, SLOW_FACTOR = 1.5, 4.0
FIRST_PATIENCE_S = 30.0  # the first answer of a process may include compiling
REMEMBERED_ANSWERS = 16
MAX_AT_ONCE = 2  # reasoners that work on one goal
MAX_STRIKES, REFUSED_S, FORGIVEN_S = 2, 30.0, 60.0
BANNED_S = 10.0  # what sends nonsense gets no work
MAX_CLIENTS = MAX_MEMBERS = 256


@dataclass(frozen=True)
class Letter:
    """A message to send: to a reasoner (`to_member`) or to a robot, by ZeroMQ's name of its connection."""

    to_member: bool
    peer: bytes
    message: wire.Message


@dataclass(eq=False)
class _Attempt:
    """A reasoner at a request. The ticket stands in for the request's id, which is unique to its robot only."""

    ticket: int
    waiting: Waiting
    started_s: float
    is_doubted: bool = False


@dataclass
class _Goal:
    """What is under way for one goal of one robot; an attempt that is not in here any more is not wanted."""

    attempts: list[_Attempt] = field(default_factory=list)
    strikes: int = 0  # reasoners lost over it since the last answer
    struck_s: float = 0.0


@dataclass
class _Client:
    model: str
    heard_s: float


@dataclass
class _Member:
    name: str
    model: str
    heard_s: float
    is_busy: bool  # as its last heartbeat says: with what an earlier pool gave it, if there is no attempt
    attempt: _Attempt | None = None
    answers_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_ANSWERS))

    @property
    def expected_s(self) -> float:
        return sum(self.answers_s) / len(self.answers_s) if self.answers_s else 0.0

    @property
    def patience_s(self) -> float:
        """How long a request may take until another reasoner gets it as well."""
        return max(LEAST_PATIENCE_S, SLOW_FACTOR * max(self.answers_s)) if self.answers_s else FIRST_PATIENCE_S

    def __str__(self) -> str:
        return f"{self.name!a:.80} ({self.model or 'weights not named'!a:.80})"


class Pool:
    """Tell it what was said, and the time; then send its `letters`. One thread."""

    def __init__(self, name: str = "", first_ticket: int = 1) -> None:
        """Tickets must not repeat those of an earlier pool whose reasoners may still answer it."""
        self.letters: deque[Letter] = deque()
        self.dropped = 0  # messages that broke the protocol
        self.answered = 0
        self.handed_over = 0  # requests taken from a reasoner, or given to a second one
        self._name = name
        self._complaints = RareWarnings(logger)
        self._queue = RequestQueue()
        self._clients: dict[bytes, _Client] = {}
        self._members: dict[bytes, _Member] = {}
        self._goals: dict[tuple[bytes, str], _Goal] = {}
        self._banned_until_s: dict[bytes, float] = {}
        self._next_ticket = first_ticket
        self._ticked_s: float | None = None

    def __str__(self) -> str:
        return (
            f"{len(self._clients)} robots, {len(self._members)} reasoners, {len(self._queue)} requests waiting; since "
            f"the start {self.answered} answered, {self.handed_over} handed over, {self.dropped} messages dropped"
        )

    def robot_says(self, client: bytes, message: wire.Message, now_s: float) -> None:
        """Raises WireError for what a robot may not say."""
        match message:
            case wire.Hello():
                self._greet(client, message.model, now_s)
            case ReasonerRequest():
                self._accept(client, message, now_s)
            case wire.Cancel():
                self._cancel(client, message.goal_id)
            case _:
                raise WireError(f"kind: a client does not send {type(message).__name__}")
        self._assign(now_s)

    def reasoner_says(self, peer: bytes, message: wire.Message, now_s: float) -> None:
        """Raises WireError for what a reasoner may not say; call `ban` then."""
        match message:
            case wire.Heartbeat():
                self._note_heartbeat(peer, message, now_s)
            case ReasonerAnswer():
                self._note_answer(peer, message, now_s)
            case wire.Leave():
                self.lose(peer, "is stopping", now_s, is_its_fault=False)
            case wire.Refusal():
                raise WireError(f"refusal: it does not take our messages: {message.error}")
            case _:
                raise WireError(f"kind: a reasoner does not send {type(message).__name__}")
        self._assign(now_s)

    def ban(self, peer: bytes, error: str, now_s: float) -> None:
        """Take everything from a reasoner that sent nonsense, for BANNED_S."""
        if peer in self._members:
            self.lose(peer, f"sends what we do not understand: {error}", now_s)
            self._banned_until_s[peer] = now_s + BANNED_S

    def lose(self, peer: bytes, why: str, now_s: float, *, is_its_fault: bool = True) -> None:
        """A reasoner is gone: another one gets its request. `is_its_fault`: or that of the request, see MAX_STRIKES."""
        member = self._members.pop(peer, None)
        if member is None:
            return
        logger.log(logging.WARNING if is_its_fault else logging.INFO, "reasoner %s %s", member, why)
        attempt = member.attempt
        goal = self._goal_of(attempt) if attempt is not None else None
        if attempt is not None and goal is not None:
            goal.attempts.remove(attempt)
            if is_its_fault:
                goal.strikes, goal.struck_s = goal.strikes + 1, now_s
            if self._is_refused(goal, now_s):
                self._refuse_newest(attempt.waiting, goal, now_s)
            else:
                self._hand_over(attempt)
        self._assign(now_s)

    def tick(self, now_s: float) -> None:
        """Notice silence. Call it every BEAT_S, after everything that has arrived was told."""
        self._forgive_own_sleep(now_s)
        for peer, member in list(self._members.items()):
            silent_s = now_s - member.heard_s
            if silent_s > GONE_S:
                self.lose(peer, f"has been silent for {silent_s:.0f} s", now_s)
                continue
            self.letters.append(Letter(True, peer, wire.Hello()))  # to a dead one it cannot be sent, which tells us
            attempt = member.attempt
            if attempt is None or attempt.is_doubted:
                continue
            spent_s = now_s - attempt.started_s
            if silent_s > SILENT_S:
                self._doubt(attempt, f"reasoner {member} is silent for {silent_s:.1f} s")
            elif spent_s > member.patience_s:
                self._doubt(attempt, f"reasoner {member} has worked on one request for {spent_s:.1f} s")
        for client, known in list(self._clients.items()):
            if now_s - known.heard_s > GONE_S:
                self._forget(client)
        for key, goal in list(self._goals.items()):
            if not goal.attempts and now_s - goal.struck_s > FORGIVEN_S:
                del self._goals[key]
        self._banned_until_s = {peer: until_s for peer, until_s in self._banned_until_s.items() if until_s > now_s}
        self._assign(now_s)

    def _forgive_own_sleep(self, now_s: float) -> None:
        """When this process was stopped or starved, the silence was its own."""
        slept_s = 0.0 if self._ticked_s is None else now_s - self._ticked_s - BEAT_S
        self._ticked_s = now_s
        if slept_s < BEAT_S:
            return
        for client in self._clients.values():
            client.heard_s = min(now_s, client.heard_s + slept_s)
        for member in self._members.values():
            member.heard_s = min(now_s, member.heard_s + slept_s)
            if member.attempt is not None:
                member.attempt.started_s = min(now_s, member.attempt.started_s + slept_s)

    def _greet(self, client: bytes, model: str, now_s: float) -> None:
        known = self._clients.get(client)
        if known is None:
            if len(self._clients) >= MAX_CLIENTS:
                error = f"the pool serves {MAX_CLIENTS} robots already; start another pool"
                self.letters.append(Letter(False, client, wire.Refusal(error)))
                return
            logger.info("a robot came, %d are here", len(self._clients) + 1)
            known = self._clients[client] = _Client(model, now_s)
        known.model, known.heard_s = model, now_s
        suited = [member for member in self._members.values() if model in ("", member.model)]
        models = {member.model for member in self._members.values()}
        since_s = [attempt.started_s for attempt in self._attempts_of(client)]
        heartbeat = wire.Heartbeat(
            model=model if suited and model else ", ".join(sorted(models))[: wire.MAX_NAME_CHARACTERS],
            busy_s=now_s - min(since_s, default=now_s),
            dropped=self.dropped,
            name=self._name,
            reasoners=sum(self._is_well(member, now_s) for member in suited),
        )
        self.letters.append(Letter(False, client, heartbeat))

    def _accept(self, client: bytes, request: ReasonerRequest, now_s: float) -> None:
        known = self._clients.get(client)
        if known is None:  # forgotten, or one too many; its next hello tells
            raise WireError("kind: a request came before hello")
        known.heard_s = now_s
        waiting = Waiting(client, request, now_s)
        goal = self._goals.get((client, request.goal_id))
        if goal is not None and self._is_refused(goal, now_s):
            self._refuse(waiting, goal, now_s)
            return
        for given_way in self._queue.put(waiting):
            self._complaints.warning("refused a request: %d are waiting", len(self._queue))
            error = f"the pool is overloaded, {len(self._queue)} requests wait; set fewer goals or add a reasoner"
            self.letters.append(Letter(False, given_way.client, refusal(given_way.request, error)))

    def _cancel(self, client: bytes, goal_id: str) -> None:
        self._queue.cancel(client, goal_id)
        for key in [key for key in self._goals if key[0] == client and goal_id in ("", key[1])]:
            del self._goals[key]
        if not goal_id:  # its farewell
            self._clients.pop(client, None)

    def _forget(self, client: bytes) -> None:
        self._cancel(client, "")
        logger.info("a robot went, %d are here", len(self._clients))

    def _note_heartbeat(self, peer: bytes, heartbeat: wire.Heartbeat, now_s: float) -> None:
        if peer in self._banned_until_s:
            return
        member = self._members.get(peer)
        if member is None:
            if len(self._members) >= MAX_MEMBERS:
                self._complaints.warning("%d reasoners are here already; another one is not admitted", MAX_MEMBERS)
                return
            member = _Member(heartbeat.name, heartbeat.model, now_s, is_busy=True)
            self._members[peer] = member
            logger.info("reasoner %s joined, %d are here", member, len(self._members))
        member.model, member.heard_s, member.is_busy = heartbeat.model, now_s, heartbeat.busy_s > 0.0
        attempt = member.attempt
        if attempt is not None and attempt.is_doubted and now_s - attempt.started_s <= member.patience_s:
            attempt.is_doubted = False

    def _note_answer(self, peer: bytes, answer: ReasonerAnswer, now_s: float) -> None:
        member = self._members.get(peer)
        if member is None or member.attempt is None or member.attempt.ticket != answer.request_id:
            logger.debug("dropped an answer that nobody waits for any more")
            return
        attempt = member.attempt
        request = attempt.waiting.request
        _check_answer(answer, request)
        member.attempt, member.is_busy, member.heard_s = None, False, now_s
        member.answers_s.append(now_s - attempt.started_s)
        goal = self._goal_of(attempt)
        if goal is None:
            return
        goal.attempts = [each for each in goal.attempts if each.waiting is not attempt.waiting]
        goal.strikes = 0
        if self._queue.get(attempt.waiting.client, request.goal_id) is attempt.waiting:  # it was handed over
            self._queue.cancel(attempt.waiting.client, request.goal_id)
        waited_ms = {"pool": (attempt.started_s - attempt.waiting.since_s) * 1e3}
        timings_ms = answer.timings_ms | waited_ms if len(answer.timings_ms) < wire.MAX_TIMINGS else answer.timings_ms
        answer = replace(answer, request_id=request.request_id, timings_ms=timings_ms)
        self.letters.append(Letter(False, attempt.waiting.client, answer))
        self.answered += 1

    def _assign(self, now_s: float) -> None:
        idle = [
            (peer, member)
            for peer, member in self._members.items()
            if member.attempt is None and not member.is_busy and self._is_well(member, now_s)
        ]
        for peer, member in sorted(idle, key=lambda each: each[1].expected_s):
            waiting = self._queue.take(partial(self._suits, member))
            if waiting is None:
                continue
            attempt = _Attempt(self._next_ticket, waiting, now_s)
            self._next_ticket += 1
            goal = self._goals.setdefault((waiting.client, waiting.request.goal_id), _Goal())
            goal.attempts.append(attempt)
            member.attempt = attempt
            self.letters.append(Letter(True, peer, replace(waiting.request, request_id=attempt.ticket)))

    def _suits(self, member: _Member, waiting: Waiting) -> bool:
        if self._clients[waiting.client].model not in ("", member.model):
            return False
        goal = self._goals.get((waiting.client, waiting.request.goal_id))
        attempts = goal.attempts if goal is not None else []
        return len(attempts) < MAX_AT_ONCE and all(attempt.is_doubted for attempt in attempts)

    def _is_well(self, member: _Member, now_s: float) -> bool:
        is_doubted = member.attempt is not None and member.attempt.is_doubted
        return not is_doubted and now_s - member.heard_s <= SILENT_S

    def _doubt(self, attempt: _Attempt, why: str) -> None:
        attempt.is_doubted = True
        if self._goal_of(attempt) is not None:
            logger.warning("%s; another one gets the request too", why)
            self._hand_over(attempt)

    def _hand_over(self, attempt: _Attempt) -> None:
        self.handed_over += 1
        self._queue.put_back(attempt.waiting)

    def _refuse_newest(self, lost: Waiting, goal: _Goal, now_s: float) -> None:
        goal_id = lost.request.goal_id
        newest = self._queue.get(lost.client, goal_id) or lost
        self._queue.cancel(lost.client, goal_id)
        if all(attempt.waiting is not newest for attempt in goal.attempts):  # else that one may still be answered
            self._refuse(newest, goal, now_s)

    def _refuse(self, waiting: Waiting, goal: _Goal, now_s: float) -> None:
        again_s = goal.struck_s + REFUSED_S - now_s
        error = (
            f"{goal.strikes} reasoners were lost while they worked on this goal; it is tried again in {again_s:.0f} s; "
            "see their logs"
        )
        self.letters.append(Letter(False, waiting.client, refusal(waiting.request, error)))

    def _is_refused(self, goal: _Goal, now_s: float) -> bool:
        return goal.strikes >= MAX_STRIKES and now_s - goal.struck_s < REFUSED_S

    def _goal_of(self, attempt: _Attempt) -> _Goal | None:
        """None where the answer is not wanted any more."""
        goal = self._goals.get((attempt.waiting.client, attempt.waiting.request.goal_id))
        return goal if goal is not None and attempt in goal.attempts else None

    def _attempts_of(self, client: bytes) -> Iterator[_Attempt]:
        return (attempt for key, goal in self._goals.items() if key[0] == client for attempt in goal.attempts)


def _check_answer(answer: ReasonerAnswer, request: ReasonerRequest) -> None:
    if (answer.epoch, answer.goal_id) != (request.epoch, request.goal_id):
        raise WireError("goal_id: the answer is about another goal or epoch than its request")
    frames = zip(request.clip.steps.tolist(), request.clip.stamps_ns.tolist(), strict=True)
    if not are_frames_of(answer.prompts, frames):
        raise WireError("steps: the answer is about other frames than its request")
    if not answer.error and bool(answer.words) != request.wants_words:
        raise WireError(f"words: the request wants {'words' if request.wants_words else 'prompts'}")
