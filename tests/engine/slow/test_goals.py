# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from virst_engine.config import GoalParameters, ReasonerParameters
from virst_engine.errors import BadGoal, UnknownGoal
from virst_engine.slow.goals import GoalBook
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

SECOND = 1_000_000_000


def clip_at(stamp_ns: int) -> Clip:
    stamps = np.array([stamp_ns], dtype=np.int64)
    return Clip(stamps // 10, stamps, np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 1, 2, 2), np.float16))


def answer_to(request: ReasonerRequest, **changes: int | str) -> ReasonerAnswer:
    fields = {"request_id": request.request_id, "epoch": request.epoch, "goal_id": request.goal_id, **changes}
    return ReasonerAnswer(prompts=(Prompt(0, 0, np.zeros((1, 2), np.float32)),), **fields)


@pytest.fixture
def book() -> GoalBook:
    """Knows goal g. Period 1 s, retry 0.3 s, ttl 5 s, two goals at most."""
    book = GoalBook(GoalParameters(max_length=40), ReasonerParameters(), max_goals=2)
    book.put(book.prepare("the red ball", goal_id="g"))
    return book


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("", "empty"),
        ("  \t ", "empty"),
        ("x" * 41, "40 characters, got 41"),
        ("the red\nball", r"U\+000A"),
        ("the red\x00ball", r"U\+0000"),
        ("the \ud800 ball", r"U\+D800"),
        ("the red\u2028ball", r"U\+2028"),
    ],
)
def test_a_sentence_that_is_none_is_refused_with_a_remedy(book: GoalBook, sentence: str, words: str) -> None:
    with pytest.raises(BadGoal, match=words) as refused:
        book.prepare(sentence)
    assert ";" in str(refused.value)
    assert len(book.goals()) == 1


def test_any_script_is_a_sentence_here(book: GoalBook) -> None:
    assert book.prepare(" 左の赤いボール ").sentence == "左の赤いボール"
    assert book.prepare("कप 🥤 şişe").sentence == "कप 🥤 şişe"


def test_ids_are_filled_in_and_do_not_collide(book: GoalBook) -> None:
    goal = book.prepare("a box")
    assert goal.goal_id == goal.object_id
    assert goal.goal_id != "g"
    with pytest.raises(BadGoal, match="'g' is set already"):
        book.prepare("a box", goal_id="g")
    with pytest.raises(BadGoal, match="belongs to goal 'g'"):
        book.prepare("a box", object_id="g")
    with pytest.raises(BadGoal, match="one line"):
        book.prepare("a box", goal_id="a\nb")
    with pytest.raises(BadGoal, match="128"):
        book.prepare("a box", camera="c" * 129)


def test_too_many_goals_are_refused_unless_they_replace(book: GoalBook) -> None:
    book.put(book.prepare("a box"))
    with pytest.raises(BadGoal, match="2 goals are set"):
        book.prepare("a can")
    assert book.prepare("a can", goal_id="g", replace=True).goal_id == "g"


def test_an_unknown_goal_cannot_be_cleared(book: GoalBook) -> None:
    with pytest.raises(UnknownGoal, match="'h' is not set; goals that are: 'g'"):
        book.clear("h")
    assert book.clear("g").sentence == "the red ball"
    with pytest.raises(UnknownGoal, match="none"):
        book.clear("g")


def test_a_new_goal_is_due_and_then_waits_its_period(book: GoalBook) -> None:
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


def test_an_answer_counts_once_and_only_for_the_request_in_flight(book: GoalBook) -> None:
    first = book.open_request("g", clip_at(0), is_full_window=False)
    assert book.take_answer(answer_to(first, request_id=first.request_id + 1)) is None
    assert book.take_answer(answer_to(first, epoch=first.epoch + 1)) is None
    assert book.take_answer(answer_to(first, goal_id="h")) is None
    taken = book.take_answer(answer_to(first))
    assert taken is not None
    assert (taken.request_id, taken.is_full_window) == (first.request_id, False)
    assert book.take_answer(answer_to(first)) is None


def test_a_goal_set_anew_and_a_reset_make_answers_old(book: GoalBook) -> None:
    first = book.open_request("g", clip_at(0), is_full_window=True)
    book.clear("g")
    book.put(book.prepare("the blue can", goal_id="g"))
    assert book.take_answer(answer_to(first)) is None
    second = book.open_request("g", clip_at(0), is_full_window=True)
    assert second.epoch > first.epoch
    book.new_epoch()
    assert book.take_answer(answer_to(second)) is None
    assert book.is_due("g", 0, is_tracked=True)


def test_a_request_without_an_answer_is_given_up_and_asked_again(book: GoalBook) -> None:
    lost = book.open_request("g", clip_at(0), is_full_window=True)
    assert book.give_up(5 * SECOND - 1) == []
    assert [goal.goal_id for goal in book.give_up(5 * SECOND)] == ["g"]
    assert book.is_due("g", 5 * SECOND, is_tracked=True)
    assert book.take_answer(answer_to(lost)) is not None  # it was only slow
    assert book.take_answer(answer_to(lost)) is None
    book.open_request("g", clip_at(5 * SECOND), is_full_window=True)
    assert [goal.goal_id for goal in book.give_up(5 * SECOND, everything=True)] == ["g"]


def test_a_late_answer_counts_until_a_newer_one_came(book: GoalBook) -> None:
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


def test_requests_without_an_answer_do_not_pile_up(book: GoalBook) -> None:
    requests = []
    for _ in range(20):
        requests.append(book.open_request("g", clip_at(0), is_full_window=True))
        book.give_up(0, everything=True)
    assert book.take_answer(answer_to(requests[11])) is None
    assert book.take_answer(answer_to(requests[12])) is not None
