# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from virst_engine.config import ReasonerParameters
from virst_engine.slow.request_book import RequestBook
from virst_engine.types import Clip, Goal, Prompt, ReasonerAnswer, ReasonerRequest

SECOND = 1_000_000_000


def clip_at(stamp_ns: int) -> Clip:
    stamps = np.array([stamp_ns], dtype=np.int64)
    return Clip(stamps // 10, stamps, np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 1, 2, 2), np.float16))


def answer_to(request: ReasonerRequest, **changes: int | str) -> ReasonerAnswer:
    fields = {"request_id": request.request_id, "epoch": request.epoch, "goal_id": request.goal_id, **changes}
    return ReasonerAnswer(prompts=(Prompt(0, 0, np.zeros((1, 2), np.float32)),), **fields)


@pytest.fixture
def book() -> RequestBook:
    """Knows goal g. Period 1 s, retry 0.3 s, ttl 5 s."""
    book = RequestBook(ReasonerParameters())
    book.add(Goal("g", "g", "the red ball"))
    return book


def test_a_new_goal_is_due_and_then_waits_its_period(book: RequestBook) -> None:
    assert book.is_due("g", 0, is_tracked=False)
    request = book.open_request("g", clip_at(0), is_full_window=True)
    assert not book.is_due("g", 100 * SECOND, is_tracked=False)  # in flight
    assert book.take_answer(answer_to(request)) is not None
    assert not book.is_due("g", SECOND - 1, is_tracked=True)
    assert book.is_due("g", SECOND, is_tracked=True)
    assert not book.is_due("g", 3 * SECOND // 10 - 1, is_tracked=False)
    assert book.is_due("g", 3 * SECOND // 10, is_tracked=False)
    book.ask_again("g")
    assert book.is_due("g", 1, is_tracked=True)
    book.ask_again("no such goal")


def test_an_answer_counts_once_and_only_for_the_request_in_flight(book: RequestBook) -> None:
    first = book.open_request("g", clip_at(0), is_full_window=False)
    assert book.take_answer(answer_to(first, request_id=first.request_id + 1)) is None
    assert book.take_answer(answer_to(first, epoch=first.epoch + 1)) is None
    assert book.take_answer(answer_to(first, goal_id="h")) is None
    taken = book.take_answer(answer_to(first))
    assert taken is not None
    assert (taken.request_id, taken.is_full_window) == (first.request_id, False)
    assert book.take_answer(answer_to(first)) is None


def test_a_goal_set_anew_and_a_reset_make_answers_old(book: RequestBook) -> None:
    first = book.open_request("g", clip_at(0), is_full_window=True)
    book.remove("g")
    book.add(Goal("g", "g", "the blue can"))
    assert book.take_answer(answer_to(first)) is None
    second = book.open_request("g", clip_at(0), is_full_window=True)
    assert second.epoch > first.epoch
    book.new_epoch()
    assert book.take_answer(answer_to(second)) is None
    assert book.is_due("g", 0, is_tracked=True)


def test_a_request_without_an_answer_is_given_up_and_asked_again(book: RequestBook) -> None:
    lost = book.open_request("g", clip_at(0), is_full_window=True)
    assert book.give_up(5 * SECOND - 1) == []
    assert [goal.goal_id for goal in book.give_up(5 * SECOND)] == ["g"]
    assert book.is_due("g", 5 * SECOND, is_tracked=True)
    assert book.take_answer(answer_to(lost)) is not None  # it was only slow
    assert book.take_answer(answer_to(lost)) is None
    book.open_request("g", clip_at(5 * SECOND), is_full_window=True)
    assert [goal.goal_id for goal in book.give_up(5 * SECOND, everything=True)] == ["g"]


def test_a_late_answer_counts_until_a_newer_one_came(book: RequestBook) -> None:
    requests = []
    for _ in range(3):
        requests.append(book.open_request("g", clip_at(0), is_full_window=True))
        book.give_up(0, everything=True)
    requests.append(book.open_request("g", clip_at(0), is_full_window=True))
    late = book.take_answer(answer_to(requests[1]))
    assert late is not None
    assert late.request_id == requests[1].request_id
    assert not book.is_due("g", 0, is_tracked=False)  # the newest stays in flight
    assert book.take_answer(answer_to(requests[0])) is None
    assert book.take_answer(answer_to(requests[3])) is not None
    assert book.take_answer(answer_to(requests[2])) is None
    requests.append(book.open_request("g", clip_at(0), is_full_window=True))
    book.new_epoch()
    assert book.take_answer(answer_to(requests[4])) is None


def test_requests_without_an_answer_do_not_pile_up(book: RequestBook) -> None:
    requests = []
    for _ in range(20):
        requests.append(book.open_request("g", clip_at(0), is_full_window=True))
        book.give_up(0, everything=True)
    assert book.take_answer(answer_to(requests[11])) is None
    assert book.take_answer(answer_to(requests[12])) is not None
