# SPDX-License-Identifier: Apache-2.0
"""Questions about one camera that are not answered yet. Not thread-safe: the session holds a lock.

Goals go on beside them. The reasoner has one question at a time, so that the request of a goal waits for one at most;
no goal can have the id of a question; and a question is taken up by a frame, as goals are, and seen with its clip.
Time is the stamps of the frames.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field

from virst_engine.errors import Unanswered, VirstError
from virst_engine.types import Clip, ReasonerAnswer, ReasonerRequest

MOST_OPEN = 4
ID_MARK = "\x1f"  # ids of goals hold no control characters (goals.py)


@dataclass(eq=False)
class Question:
    """It is settled without the session's lock: whoever waits for the answer may do anything then."""

    question_id: str
    sentence: str
    answer: Future[str] = field(default_factory=Future)
    met_ns: int | None = None  # stamp of the first frame since it was asked
    requests: int = 0  # that were made of it; more than one where the reasoner went away and came back

    def settle(self, answer: ReasonerAnswer) -> None:
        """With the reasoner's words, or with why there are none."""
        if answer.words:
            self.answer.set_result(answer.words)
        else:
            self.fail(Unanswered(answer.error or "the reasoner answered with masks, not with words"))

    def fail(self, error: VirstError) -> None:
        # One that waits may be cancelled by whoever asked; one that the reasoner has got cannot be any more.
        if self.answer.running() or self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class QuestionBook:
    def __init__(self) -> None:
        self._open: list[Question] = []  # oldest first
        self._asked: Question | None = None  # the one that the reasoner has; it is among those
        self._worthless: list[str] = []  # ids of questions whose requests nobody waits for any more
        self._named = 0

    def __bool__(self) -> bool:
        """Whether there is anything to do. The frame path looks at this without the lock."""
        return bool(self._open or self._worthless)

    def add(self, sentence: str) -> Question:
        """A question for the next frame. Raises Unanswered when too many are open."""
        self._open = [each for each in self._open if not each.answer.cancelled()]
        if len(self._open) >= MOST_OPEN:
            raise Unanswered(f"{MOST_OPEN} questions are open already; ask again when one of them is answered")
        self._named += 1
        question = Question(f"{ID_MARK}question_{self._named}", sentence)
        self._open.append(question)
        return question

    def meet(self, now_ns: int, ttl_s: float) -> list[Question]:
        """Note the frame of that stamp. Questions that have had no answer for `ttl_s` are closed and returned."""
        self._open = [each for each in self._open if not each.answer.cancelled()]
        late = []
        for question in self._open:
            question.met_ns = now_ns if question.met_ns is None else question.met_ns
            if now_ns - question.met_ns >= round(ttl_s * 1e9):
                late.append(question)
        return self._drop(late)

    def next(self) -> Question | None:
        """The one to make a request of now; None while the reasoner has another one."""
        while self._open and self._asked is None:
            question = self._open[0]
            if question.answer.running() or question.answer.set_running_or_notify_cancel():
                return question
            self._open.remove(question)  # cancelled a moment ago
        return None

    def request(self, question: Question, request_id: int, clip: Clip) -> ReasonerRequest:
        """Note that it asks about this clip."""
        self._asked = question
        question.requests += 1
        return ReasonerRequest(request_id, 0, question.question_id, question.sentence, clip, wants_words=True)

    def take_answer(self, answer: ReasonerAnswer) -> Question | None:
        """The question that it answers, which is closed then; None for an answer that nobody waits for.

        Where the reasoner came back, any of its requests may be answered.
        """
        question = next((each for each in self._open if each.question_id == answer.goal_id and each.requests), None)
        if question is not None:
            self._close(question, requests_left=question.requests - 1)
        return question

    def ask_again(self) -> None:
        """The reasoner was away: what it had been asked may be lost."""
        self._asked = None

    def drop_all(self) -> list[Question]:
        """Close those that are open; they are returned."""
        return self._drop(list(self._open))

    def drop_waiting(self) -> list[Question]:
        """Close those that the reasoner has not got; they are returned."""
        return self._drop([each for each in self._open if not each.requests])

    def take_worthless(self) -> list[str]:
        """Ids under which the reasoner may still have requests that it is not to compute."""
        taken, self._worthless = self._worthless, []
        return taken

    def _drop(self, questions: list[Question]) -> list[Question]:
        for question in questions:
            self._close(question, requests_left=question.requests)
        return questions

    def _close(self, question: Question, requests_left: int) -> None:
        self._open.remove(question)
        if question is self._asked:
            self._asked = None
        if requests_left:
            self._worthless.append(question.question_id)
