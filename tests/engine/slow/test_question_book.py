# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from virst_engine.config import GoalParameters
from virst_engine.errors import BadGoal, Unanswered
from virst_engine.slow.goals import GoalBook
from virst_engine.slow.question_book import MOST_OPEN, Question, QuestionBook
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

SECOND = 1_000_000_000
CLIP = Clip(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 1, 2, 2)))


@pytest.fixture
def book() -> QuestionBook:
    return QuestionBook()


def asked(book: QuestionBook, request_id: int = 1) -> ReasonerRequest:
    question = book.next()
    assert question is not None
    return book.request(question, request_id, CLIP)


def words(request: ReasonerRequest, said: str = "red ball", error: str = "") -> ReasonerAnswer:
    return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (), error, words=said)


def why(question: Question) -> str:
    error = question.answer.exception(timeout=0)
    assert isinstance(error, Unanswered)
    return str(error)


def test_a_question_becomes_a_request_for_words_and_its_answer_settles_it(book: QuestionBook) -> None:
    assert not book
    question = book.add("the thing that can roll")
    assert book
    assert book.meet(0, 5.0) == []
    request = asked(book, 7)
    assert (request.request_id, request.sentence, request.wants_words) == (7, "the thing that can roll", True)
    assert request.clip is CLIP
    taken = book.take_answer(words(request))
    assert taken is question
    taken.settle(words(request))
    assert question.answer.result(timeout=0) == "red ball"
    assert not book  # nothing is left to do
    assert book.take_answer(words(request)) is None


def test_the_reasoner_has_one_question_at_a_time_the_oldest_first(book: QuestionBook) -> None:
    questions = [book.add(sentence) for sentence in ("one", "two", "three")]
    for question in questions:
        request = asked(book)
        assert request.sentence == question.sentence
        assert book.next() is None
        assert book.take_answer(words(request)) is question
    assert book.next() is None


def test_no_goal_can_have_the_id_of_a_question(book: QuestionBook) -> None:
    book.add("one")
    with pytest.raises(BadGoal, match="a goal id must be one line"):
        GoalBook(GoalParameters(), 3).prepare("the red ball", goal_id=asked(book).goal_id)


def test_answers_about_something_else_change_nothing(book: QuestionBook) -> None:
    question = book.add("one")
    waiting = book.add("two")
    request = asked(book)
    other = ReasonerAnswer(request.request_id, request.epoch, "goal_1", (), "", words="no")
    assert book.take_answer(other) is None
    not_asked = ReasonerAnswer(request.request_id, request.epoch, waiting.question_id, (), "", words="no")
    assert book.take_answer(not_asked) is None
    assert book.take_answer(words(request)) is question


def test_a_handful_is_open_and_more_are_refused(book: QuestionBook) -> None:
    questions = [book.add(str(number)) for number in range(MOST_OPEN)]
    with pytest.raises(Unanswered, match=f"{MOST_OPEN} questions are open already"):
        book.add("one more")
    assert questions[-1].answer.cancel()
    book.add("one more")
    book.take_answer(words(asked(book)))
    book.add("and one more")


def test_a_question_is_given_up_after_its_time_and_its_request_is_worthless(book: QuestionBook) -> None:
    first, second = book.add("one"), book.add("two")
    assert book.meet(100, 5.0) == []  # the time begins with the first frame, not with the question
    request = asked(book)
    assert book.meet(100 + 5 * SECOND - 1, 5.0) == []
    assert book.meet(100 + 5 * SECOND, 5.0) == [first, second]
    assert book.take_worthless() == [request.goal_id]  # the second one never got to the reasoner
    assert book.take_answer(words(request)) is None
    assert not book


def test_what_is_cancelled_before_it_is_asked_never_is_and_after_that_it_cannot_be(book: QuestionBook) -> None:
    first, second = book.add("one"), book.add("two")
    assert first.answer.cancel()
    assert asked(book).sentence == "two"
    assert not second.answer.cancel()
    third = book.add("three")
    assert third.answer.cancel()
    assert book.meet(0, 5.0) == []
    book.take_answer(words(ReasonerRequest(1, 0, second.question_id, "two", CLIP)))
    assert not book


def test_a_reasoner_that_was_away_is_asked_again_and_any_of_its_answers_counts(book: QuestionBook) -> None:
    question = book.add("one")
    first = asked(book, 1)
    book.ask_again()
    assert book.take_answer(words(first)) is question
    assert book.take_worthless() == []

    question = book.add("two")
    first = asked(book, 2)
    book.ask_again()
    second = asked(book, 3)
    assert (second.sentence, second.goal_id) == ("two", first.goal_id)
    assert book.take_answer(words(first)) is question
    assert book.take_worthless() == [first.goal_id]  # the second request may be waiting


def test_dropping_those_that_wait_leaves_the_one_that_is_asked(book: QuestionBook) -> None:
    first, second = book.add("one"), book.add("two")
    request = asked(book)
    assert book.drop_waiting() == [second]
    assert book.take_answer(words(request)) is first
    third = book.add("three")
    assert book.drop_all() == [third]
    assert not book


def test_failing_tells_why_whatever_has_become_of_it(book: QuestionBook) -> None:
    waiting, running, cancelled = book.add("one"), book.add("two"), book.add("three")
    running.answer.set_running_or_notify_cancel()
    cancelled.answer.cancel()
    for question in (waiting, running, cancelled):
        question.fail(Unanswered("the session was closed"))
    assert why(waiting) == why(running) == "the session was closed"
    assert cancelled.answer.cancelled()


def test_an_answer_without_words_is_no_answer(book: QuestionBook) -> None:
    question = book.add("one")
    request = asked(book)
    question.settle(words(request, "", "this model does not know 'one'"))
    assert why(question) == "this model does not know 'one'"
    question = Question("id", "two")
    question.settle(ReasonerAnswer(1, 0, "id", (Prompt(0, 0, np.zeros((1, 2), np.float32)),)))
    assert "masks, not with words" in why(question)
