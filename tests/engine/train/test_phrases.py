# SPDX-License-Identifier: Apache-2.0
"""What a detector is taught: phrases that fit what a frame shows, and of sentences about time their nouns."""

import numpy as np
import pytest

from tests.engine.data.fake_scenes import THE_BALL, FakeScene
from virst_engine.sim.expressions import VOCABULARY, Expression
from virst_engine.sim.spec import COLOURS, SHAPES
from virst_engine.train.phrases import NounPhrase, PhraseScene, noun_of, strange_word

NAMES = dict(enumerate(zip(COLOURS, SHAPES, strict=False), start=1))  # of the fake objects, by their labels


def said(text: str, topic: str, targets: tuple[int, ...] = (0,)) -> Expression:
    return Expression(text, topic if targets else "absent", targets, f"{topic}/0", False, "", topic)


@pytest.mark.parametrize(
    ("sentence", "noun"),
    [
        ("track the red ball that stopped before the can", ("red", "ball")),
        ("please look for the thing that is moving", ("", "")),
        ("all moving boxes", ("", "box")),
        ("something in motion", ("", "")),
        ("show me the small yellow plates that move", ("yellow", "plate")),
    ],
)
def test_the_first_noun_is_what_a_detector_looks_for(sentence: str, noun: tuple[str, str]) -> None:
    assert noun_of(sentence) == noun


def test_phrases_mean_all_that_they_fit() -> None:
    two_alike = FakeScene(0)
    two_alike.shapes = (two_alike.shapes[0],) * 2
    scene, rng = PhraseScene(two_alike), np.random.default_rng(0)
    seen = {1: 0, 2: 0, 0: 0}
    for phrase in (phrase for _ in range(10) for phrase in scene.sentences(0, 60, rng)):
        if not isinstance(phrase, NounPhrase):
            continue
        words = phrase.text.split()
        singular = {word.removesuffix("s") for word in words} | {word.removesuffix("es") for word in words}
        if any(word not in VOCABULARY for word in words):
            assert phrase.kind == "absent"
            continue
        colours, shapes = singular & set(COLOURS), singular & set(SHAPES)
        fits = tuple(i for i in (0, 1) if colours <= {NAMES[i + 1][0]} and shapes <= {NAMES[1][1]})
        assert phrase.target_ids == fits, phrase.text
        assert phrase.kind == ("phrase" if fits else "absent")
        seen[len(fits)] += 1
    assert min(seen.values()) > 5, seen


def test_what_left_the_picture_is_not_meant() -> None:
    scene = PhraseScene(FakeScene(0))  # object 1 is gone upwards in the last frames
    rng = np.random.default_rng(0)
    said = [phrase for _ in range(10) for phrase in scene.sentences(20, 20, rng)]
    assert {i for phrase in said if isinstance(phrase, NounPhrase) for i in phrase.target_ids} == {0}


def test_sentences_about_time_are_their_nouns_and_others_stay() -> None:
    colour, shape = NAMES[1]
    moved = said(f"the {colour} {shape} that moved first", "order", ())
    timeless = said(f"the {shape} at the far left", "superlative")
    scene = PhraseScene(FakeScene(0, (moved, timeless, THE_BALL)))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    found = {sentence.text: sentence for _ in range(10) for sentence in scene.sentences(0, 40, rng)}
    assert (found[moved.text].target_ids, found[moved.text].kind) == ((0,), "order")
    assert found[timeless.text] == timeless
    assert found[THE_BALL.text] == THE_BALL


def test_strange_words_are_in_no_sentence() -> None:
    rng = np.random.default_rng(0)
    words = [strange_word(rng) for _ in range(200)]
    assert len(set(words)) > 150
    assert not set(words) & set(VOCABULARY)
