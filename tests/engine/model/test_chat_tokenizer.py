# SPDX-License-Identifier: Apache-2.0
"""The chat around a clip: marks, places of the [ST] tokens, and sentences that are refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.engine.model.small_virst_7b import BYTES, VOCABULARY, byte_vocabulary, write_tokenizer
from virst_engine.errors import BadGoal, WeightsError
from virst_engine.model.chat_tokenizer import LONGEST_GOAL_TOKENS, ChatTokenizer

END_OF_TEXT, START, END, SEG = range(BYTES, VOCABULARY)


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer(write_tokenizer(tmp_path), VOCABULARY)


def text_of(tokens: tuple[int, ...]) -> str:
    characters = {number: character for character, number in byte_vocabulary().items()}
    marks = {END_OF_TEXT: "<|endoftext|>", START: "<|im_start|>", END: "<|im_end|>", SEG: "[SEG]"}
    return "".join(marks.get(token) or characters[token] for token in tokens).replace("Ġ", " ").replace("Ċ", "\n")


def test_the_clip_stands_in_the_question_and_the_answer_is_already_there(tokenizer: ChatTokenizer) -> None:
    row = tokenizer.row("The  Red\tBall ", 3)
    assert text_of(row.before) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nReference image: "
    )
    assert text_of(row.after) == (
        "\nWhat is the red ball in the Reference image? Please respond with segmentation mask in the Target Image."
        "<|im_end|>\n<|im_start|>assistant\nSure, (0) [SEG], (1) [SEG], (2) [SEG]"
    )
    assert [row.after[place] for place in row.st] == [SEG] * 3
    assert row.st[-1] == len(row.after) - 1


def test_a_question_is_asked_as_it_is(tokenizer: ChatTokenizer) -> None:
    assert "\nWhich one rolls".lower() + "? Please respond" in text_of(tokenizer.row("Which one rolls?", 3).after)


def test_a_question_in_words_keeps_its_capitals_and_leaves_the_answer_to_the_model(tokenizer: ChatTokenizer) -> None:
    row = tokenizer.question(" What is  on\tthe Table?")
    assert text_of(row.before) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert text_of(row.after) == "\nWhat is on the Table?<|im_end|>\n<|im_start|>assistant\n"
    assert row.st == ()


def test_tokens_of_an_answer_become_text_without_marks(tokenizer: ChatTokenizer) -> None:
    said = tokenizer.question("Two red boxes.").after
    assert tokenizer.words(said) == "Two red boxes.\nassistant"
    assert tokenizer.words([*said, SEG, END]) == "Two red boxes.\nassistant"
    assert tokenizer.words([]) == ""
    assert set(tokenizer.marks) == {END_OF_TEXT, START, END, SEG}
    assert set(tokenizer.ends) == {END_OF_TEXT, END}


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "[SEG]", "[seg]"])
def test_a_sentence_cannot_end_its_turn_or_ask_for_masks_itself(tokenizer: ChatTokenizer, mark: str) -> None:
    with pytest.raises(BadGoal, match="may not hold the marks"):
        tokenizer.row(f"the ball{mark} and more", 3)
    with pytest.raises(BadGoal, match="may not hold the marks"):
        tokenizer.question(f"the ball{mark} and more")


@pytest.mark.parametrize(("sentence", "why"), [("", "no word"), (" \n", "no word"), ("a" * 201, "at most 200 tokens")])
def test_empty_and_endless_sentences_are_refused(tokenizer: ChatTokenizer, sentence: str, why: str) -> None:
    with pytest.raises(BadGoal, match=why):
        tokenizer.row(sentence, 3)
    tokenizer.row("a" * LONGEST_GOAL_TOKENS, 3)


def test_the_two_older_files_of_a_tokenizer_are_read_too(tmp_path: Path) -> None:
    words = byte_vocabulary()
    words["ba"] = len(words)
    words["ball"] = len(words)
    words["ll"] = len(words)
    (tmp_path / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb a\nl l\nba ll\n", encoding="utf-8")
    tokenizer = ChatTokenizer(tmp_path, len(words) + 4)
    after = tokenizer.row("ball", 1).after
    assert words["ball"] in after  # "is ball" is split before the space: " ball" is not one word of this vocabulary
    assert after[-1] == len(words) + 3


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"would be its token 259, and is 151646 in the weights; convert"):
        ChatTokenizer(write_tokenizer(tmp_path), 151647)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither tokenizer.json nor vocab.json with merges.txt; convert"):
        ChatTokenizer(tmp_path, VOCABULARY)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="cannot be read"):
        ChatTokenizer(tmp_path, VOCABULARY)


def test_marks_that_a_file_already_has_keep_their_numbers(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    own = Tokenizer.from_file(str(file))
    own.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    own.save(str(file))
    assert ChatTokenizer(tmp_path, VOCABULARY).row("a ball", 2).before[0] == START
