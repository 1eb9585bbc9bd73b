# SPDX-License-Identifier: Apache-2.0
"""Who answers requests (`Reasoner`), how the session reaches it (`ReasonerClient`), two clients without a process."""

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from virst_engine.errors import VirstError
from virst_engine.types import Prompt, ReasonerAnswer, ReasonerRequest

logger = logging.getLogger(__name__)


@runtime_checkable  # the type checker of the tests asks for it
class Reasoner(Protocol):
    """A sentence and a clip become prompts. Methods (VIRST, detectors, ...) differ behind this one call."""

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        """Prompts for frames of the clip, or words where the request wants them (`refuse_words`, if it has none).

        Pure and synchronous; a VirstError says why it cannot answer.
        """
        ...


@runtime_checkable  # the type checker of the tests asks for it
class ReasonerClient(Protocol):
    """The session's side of the border. No method waits for the reasoner; all are called by one thread."""

    def submit(self, request: ReasonerRequest) -> None:
        """Leave a request. Where the previous one of the same goal has not been started yet, this one replaces it."""
        ...

    def cancel(self, goal_id: str) -> None:
        """The goal is gone: its waiting request is dropped. One that runs already may still be answered."""
        ...

    def poll(self) -> list[ReasonerAnswer]:
        """The answers that came since the last call, oldest first. Requests may be lost and then never answered."""
        ...

    def status(self) -> str:
        """Empty while a reasoner listens; otherwise what is wrong and what to do about it."""
        ...

    def close(self) -> None:
        """Give back threads and sockets; requests still open are dropped. May be called twice."""
        ...


def refuse_words(request: ReasonerRequest, method: str) -> None:
    """For methods that only segment. Raises VirstError for a request that wants words."""
    if request.wants_words:
        raise VirstError(
            f"{method} has no words for an answer: tell it what to segment (set_goal), or ask tabletop-tiny or "
            "virst-7b with reasoner.method virst"
        )


def are_frames_of(prompts: Sequence[Prompt], clip: Iterable[tuple[int, int]]) -> bool:
    """Whether prompts are of a clip's frames (step, stamp_ns), in their order; a reasoner may leave some out."""
    rest = iter(clip)
    return all((prompt.step, prompt.stamp_ns) in rest for prompt in prompts)


def refusal(request: ReasonerRequest, error: str) -> ReasonerAnswer:
    """The answer that says why `request` could not be answered."""
    return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts=(), error=error)


def _answer_or_refuse(reasoner: Reasoner, request: ReasonerRequest) -> ReasonerAnswer:
    # Only VirstError: in the caller's own process a programming error should reach the caller with its traceback.
    try:
        return reasoner.answer(request)
    except VirstError as error:
        logger.warning("goal %a was not answered: %s", request.goal_id, error)
        return refusal(request, str(error))


class InProcessClient:
    """Answers within `submit`, in the caller's thread: for offline evaluation and tests."""

    def __init__(self, reasoner: Reasoner) -> None:
        self._reasoner = reasoner
        self._answers: dict[str, ReasonerAnswer] = {}

    def submit(self, request: ReasonerRequest) -> None:
        self._answers.pop(request.goal_id, None)
        self._answers[request.goal_id] = _answer_or_refuse(self._reasoner, request)

    def cancel(self, goal_id: str) -> None:
        self._answers.pop(goal_id, None)

    def poll(self) -> list[ReasonerAnswer]:
        answers = list(self._answers.values())
        self._answers.clear()
        return answers

    def status(self) -> str:
        return ""

    def close(self) -> None:
        self._answers.clear()


class NoReasoner:
    """For models that understand no sentences: objects are pointed out."""

    def submit(self, request: ReasonerRequest) -> None:
        raise VirstError("this model has no reasoner; point objects out with a box, points or a mask")

    def cancel(self, goal_id: str) -> None: ...

    def poll(self) -> list[ReasonerAnswer]:
        return []

    def status(self) -> str:
        return ""

    def close(self) -> None: ...


class DelayedClient:
    """One reasoner that takes `delay_s` of *frame time* per request: realtime evaluation, repeatable on any machine.

    Time is the newest stamp of the frames in the requests, or what `advance` was told. Like the reasoner process it
    works on one request at a time, in order of arrival, so several goals share it: the second waits for the first.
    """

    def __init__(self, reasoner: Reasoner, delay_s: float) -> None:
        if not delay_s >= 0.0:
            raise ValueError(f"delay_s must be >= 0, got {delay_s}")
        self._reasoner = reasoner
        self._delay_ns = round(delay_s * 1e9)
        self._now_ns: int | None = None
        self._waiting: dict[str, ReasonerRequest] = {}
        self._running: ReasonerRequest | None = None
        self._done_ns = 0
        self._answers: list[ReasonerAnswer] = []

    def advance(self, stamp_ns: int) -> None:
        """Let frame time reach `stamp_ns` (the stamp of the frame about to be processed); it never runs backwards."""
        self._now_ns = stamp_ns if self._now_ns is None else max(self._now_ns, stamp_ns)
        while self._running is not None and self._done_ns <= self._now_ns:
            self._answers.append(_answer_or_refuse(self._reasoner, self._running))
            self._start_next(self._done_ns)

    def submit(self, request: ReasonerRequest) -> None:
        newest_ns = int(request.clip.stamps_ns[-1])
        self.advance(newest_ns)
        self._waiting[request.goal_id] = request  # keeps its place in the queue: a busy goal must not starve itself
        if self._running is None:
            self._start_next(newest_ns if self._now_ns is None else self._now_ns)
            self.advance(newest_ns)  # a delay of 0 is due at once

    def cancel(self, goal_id: str) -> None:
        self._waiting.pop(goal_id, None)

    def poll(self) -> list[ReasonerAnswer]:
        answers, self._answers = self._answers, []
        return answers

    def status(self) -> str:
        return ""

    def close(self) -> None:
        self._waiting.clear()
        self._running = None
        self._answers = []

    def _start_next(self, start_ns: int) -> None:
        if not self._waiting:
            self._running = None
            return
        self._running = self._waiting.pop(next(iter(self._waiting)))
        self._done_ns = start_ns + self._delay_ns
