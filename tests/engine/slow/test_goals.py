# SPDX-License-Identifier: Apache-2.0
import pytest

from virst_engine.config import GoalParameters
from virst_engine.errors import BadGoal, UnknownGoal
from virst_engine.slow.goals import GoalBook


@pytest.fixture
def book() -> GoalBook:
    """Knows goal g. Two goals at most."""
    book = GoalBook(GoalParameters(max_length=40), max_goals=2)
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
