# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virst_engine.sim.grammar import PHRASINGS, PLURALS, finish
from virst_engine.slow.plurals import is_plural


@pytest.mark.parametrize(
    "sentence",
    [
        "the balls",
        "both cans",
        "all red things",
        "two boxes",
        "Find the two red boxes on the table.",
        "please track all the screws",
        "every bottle",
        "each cup on the tray",
        "those",
        "3 apples",
        "the ones next to the laptop",
        "balls standing still",
        "the children who wave",
        "knives left of the plate",
        "the car\N{RIGHT SINGLE QUOTATION MARK}s wheels",
    ],
)
def test_plurals_are_recognised(sentence: str) -> None:
    assert is_plural(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "the red ball",
        "the cup left of the bottles",
        "the ball that left the boxes",
        "the box the cans are in",
        "the leftmost of the balls",
        "one of the balls",
        "the glass",
        "the glasses case",
        "the bus",
        "the scissors",
        "the lens",
        "my mother's cup",
        "the bottle with red stripes",
        "a 5 litre can",
        "the cup and the plate",
        "a pair of socks",
        "the box between two cans",
        "where is the ball",
        "die roten Kugeln",
        "赤いボール",
        "\N{SMIRKING FACE}",
    ],
)
def test_singulars_and_what_is_not_understood_are_not(sentence: str) -> None:
    assert not is_plural(sentence)


def filled(template: str, many: bool) -> list[str]:
    nouns = PLURALS.values() if many else PLURALS
    slots = {"ts": "things", "n": "two", "c": "red", "h": "object", "z": "small", "t": "red ball", "a": "blue can"}
    return [finish(template.format(**{**slots, "ts" if many else "s": noun})) for noun in nouns]


@pytest.mark.parametrize("name", PHRASINGS)
def test_every_sentence_of_the_simulator_is_told_right(name: str) -> None:
    phrasings = PHRASINGS[name]
    for template in (*phrasings.train, *phrasings.held_out):
        many = phrasings.kind == "plural"
        for sentence in filled(template, many):
            assert is_plural(sentence) == many, sentence


@given(st.text(max_size=300))
def test_any_text_is_taken(text: str) -> None:
    assert is_plural(text) in (True, False)


@pytest.mark.parametrize("words", list(itertools.product(["find", "please show me", ""], ["balls", "ball"])))
def test_a_request_before_it_changes_nothing(words: tuple[str, str]) -> None:
    assert is_plural(" the ".join(words)) == (words[1] == "balls")
