# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary: what it reads, what it refuses and how rows are padded."""

import pytest
import torch

from virst_engine.errors import BadGoal
from virst_engine.model.words import ANSWER, END, PAD, SPECIAL_TOKENS, UNKNOWN, WordTokenizer, pad_rows
from virst_engine.sim.expressions import VOCABULARY

TOKENIZER = WordTokenizer(("the", "red", "ball"))


def test_words_follow_the_special_tokens_in_their_order() -> None:
    assert TOKENIZER.encode("the red ball") == [4, 5, 6]
    assert sorted({PAD, UNKNOWN, ANSWER, END}) == list(range(SPECIAL_TOKENS))


def test_case_and_punctuation_do_not_matter() -> None:
    assert TOKENIZER.encode(" The RED, ball?! ") == TOKENIZER.encode("the red ball")
    assert TOKENIZER.encode("red-ball") == TOKENIZER.encode("red ball")
    assert TOKENIZER.encode("red_ball") == TOKENIZER.encode("red ball")


def test_decoding_gives_the_words_up_to_the_end() -> None:
    assert TOKENIZER.decode([ANSWER, 4, 5, 6, END, 4, PAD]) == "the red ball"


def test_unknown_words_are_marked_in_training_and_refused_in_goals() -> None:
    assert TOKENIZER.encode("the green ball") == [4, UNKNOWN, 6]
    with pytest.raises(BadGoal, match=r"does not know 'green', 'cube'.*3 words.*virst words"):
        TOKENIZER.encode_goal("the green red cube", 10)


@pytest.mark.parametrize("sentence", ["", "   ", "?!", "\n\t", "🙂"])
def test_a_goal_without_a_word_is_refused(sentence: str) -> None:
    with pytest.raises(BadGoal, match="no word at all"):
        TOKENIZER.encode_goal(sentence, 10)


@pytest.mark.parametrize("sentence", ["красный мяч", "红色的球", "الكرة الحمراء", "le ballon coloré"])
def test_a_goal_in_another_language_is_refused_by_its_words(sentence: str) -> None:
    first = WordTokenizer.split(sentence)[0]
    with pytest.raises(BadGoal, match=f"does not know '{first}'"):
        TOKENIZER.encode_goal(sentence, 10)


def test_a_goal_that_is_too_long_is_refused_and_one_at_the_limit_is_not() -> None:
    assert TOKENIZER.encode_goal("red " * 5, 5) == [5] * 5
    with pytest.raises(BadGoal, match="at most 5 words, got 6"):
        TOKENIZER.encode_goal("red " * 6, 5)


def test_thousands_of_unknown_words_make_a_short_message() -> None:
    with pytest.raises(BadGoal) as caught:
        TOKENIZER.encode_goal(" ".join(f"word{i}" for i in range(5000)), 10)
    assert len(str(caught.value)) < 400


def test_an_endless_word_makes_a_short_message() -> None:
    with pytest.raises(BadGoal, match="does not know 'aaaa") as caught:
        TOKENIZER.encode_goal("a" * 200_000 + " " + "b" * 200_000, 10)
    assert len(str(caught.value)) < 300


def test_padding_on_either_side() -> None:
    tokens, valid = pad_rows([[4, 5, 6], [7]])
    assert tokens.tolist() == [[4, 5, 6], [7, PAD, PAD]]
    assert valid.tolist() == [[True, True, True], [True, False, False]]
    tokens, valid = pad_rows([[4, 5, 6], [7]], left=True)
    assert tokens.tolist() == [[4, 5, 6], [PAD, PAD, 7]]
    assert valid.tolist() == [[True, True, True], [False, False, True]]
    assert tokens.dtype == torch.long


def test_the_vocabulary_of_the_tabletop_is_read_without_loss() -> None:
    tokenizer = WordTokenizer(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    sentence = " ".join(VOCABULARY)
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    assert UNKNOWN not in tokenizer.encode(sentence)
