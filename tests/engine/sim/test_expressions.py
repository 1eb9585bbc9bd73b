# SPDX-License-Identifier: Apache-2.0
"""Sentences drawn from rendered scenes, checked against the pixels of the masks and the words of the grammar."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.sim.expressions import (
    KINDS_FULL,
    KINDS_PLAIN,
    VOCABULARY,
    expressions,
    find_meaning,
    sample_expressions,
)
from virst_engine.sim.grammar import HELD_OUT_PREFIXES, PHRASINGS, TRAIN_PREFIXES, finish
from virst_engine.sim.spec import COLOURS, SHAPES

QUERY, FIRST = 34, 13
NOUN = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|object|thing|one)"


def all_of(recording, split="all", seed=0, query=QUERY):
    return expressions(recording, query_frame=query, rng=np.random.default_rng(seed), split=split)


def words_of(templates):
    return {word for template in templates for word in re.sub(r"\{\w+\}", " ", template).split()}


def fitting(recording, colour, shape):
    """Objects that a noun fits, by the words alone."""
    return {
        k
        for k, o in enumerate(recording.spec.objects)
        if colour in (None, o.colour) and shape in ("object", "thing", "one", o.shape)
    }


def centroid(recording, frame, k):
    y, x = np.nonzero(recording.instance_mask[frame] == k + 1)
    return x.mean() / recording.width, y.mean() / recording.height


def test_every_word_is_in_the_vocabulary(rendered):
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert 100 <= len(VOCABULARY) <= 190
    known = set(VOCABULARY)
    for recording in rendered:
        for expression in all_of(recording):
            words = expression.text.split() + expression.answer.split()
            assert set(words) <= known, expression
            assert expression.text == expression.text.lower().strip()
            assert expression.text.isascii()
            assert re.fullmatch(r"[a-z ]+", expression.text)


@pytest.mark.parametrize("name", PHRASINGS)
def test_held_out_phrasings_are_other_sentences_of_the_same_words(name):
    phrasings = PHRASINGS[name]
    assert len(set(phrasings.train)) >= 4
    assert len(set(phrasings.held_out)) >= 2
    assert not {p.replace("{s}", "{t}") for p in phrasings.train} & {
        p.replace("{s}", "{t}") for p in phrasings.held_out
    }
    trained = {
        *words_of(t for p in PHRASINGS.values() for t in p.train),
        *words_of(TRAIN_PREFIXES),
        "object",
        "thing",
        "one",
    }
    assert words_of(phrasings.held_out) <= trained
    assert words_of(HELD_OUT_PREFIXES) <= trained


def test_splits_do_not_share_sentences(rendered):
    train = {e.text for r in rendered for e in all_of(r, "train")}
    held_out = {e.text for r in rendered for e in all_of(r, "held-out")}
    assert train
    assert held_out
    assert not train & held_out
    assert all(not e.held_out for e in all_of(rendered[0], "train"))
    assert all(e.held_out and "/h" in e.template_id for e in all_of(rendered[0], "held-out"))


def test_targets_agree_with_the_pixels(rendered):
    """Left, right and colour-and-shape sentences, read by a parser of their own and judged by mask centroids."""
    checked: Counter[str] = Counter()
    for recording in rendered:
        visible = {k for k in range(len(recording.spec.objects)) if (recording.instance_mask[QUERY] == k + 1).any()}
        for expression in (e for seed in range(3) for e in all_of(recording, seed=seed)):
            name, targets = expression.template_id.split("/")[0], set(expression.target_ids)
            if name == "colour_shape" and targets:
                (target,) = targets
                spec = recording.spec.objects[target]
                assert spec.colour in expression.text.split()
                assert spec.shape in expression.text.split()
                assert fitting(recording, spec.colour, spec.shape) & visible == targets
            elif name in ("left_of", "right_of"):
                match = re.search(rf"the {NOUN} .*the {NOUN}$", expression.text)
                assert match, expression
                (anchor,) = fitting(recording, *match.groups()[2:]) & visible
                x = centroid(recording, QUERY, anchor)[0]
                sign = -1 if name == "left_of" else 1
                candidates = fitting(recording, *match.groups()[:2]) & visible - {anchor}
                assert {k for k in candidates if sign * (centroid(recording, QUERY, k)[0] - x) > 0.03} == targets
            elif name in ("leftmost", "rightmost") and targets:
                match = re.search(rf"{NOUN}(?: that| farthest| at| most|$)", expression.text)
                assert match, expression
                extreme = min if name == "leftmost" else max
                candidates = fitting(recording, *match.groups()) & visible
                assert {extreme(candidates, key=lambda k: centroid(recording, QUERY, k)[0])} == targets
            elif name in ("moving_left", "moving_right") and targets:
                (target,) = targets
                way = centroid(recording, QUERY, target)[0] - centroid(recording, FIRST, target)[0]
                assert way < -0.08 if name == "moving_left" else way > 0.08
            elif name == "smallest" and targets:
                assert len(targets) == 1
            else:
                continue
            checked[name] += 1
    assert min(checked[n] for n in ("colour_shape", "left_of", "right_of", "leftmost", "rightmost")) >= 5, checked


def test_singular_plural_and_absent(rendered):
    kinds = set()
    for recording in rendered:
        for e in all_of(recording):
            kinds.add(e.kind)
            assert (e.kind == "absent") == (not e.target_ids) == (e.answer == "none")
            assert len(e.target_ids) >= 2 if e.kind == "plural" else len(e.target_ids) <= 1
            assert e.topic in KINDS_FULL
            if e.kind in KINDS_PLAIN and recording.spec.family == "plain":
                assert recording.visible_fraction[QUERY, list(e.target_ids)].min() >= 0.5
    assert {"attribute", "relation", "superlative", "reasoning", "plural", "absent"} <= kinds


def test_the_landmark_is_what_the_sentence_tells_the_target_by(rendered):
    told = 0
    for recording in rendered:
        for e in all_of(recording):
            if not any("{a}" in phrasing for phrasing in PHRASINGS[e.template_id.partition("/")[0]].train):
                assert e.landmark_ids == (), e
                continue
            (landmark,) = e.landmark_ids
            assert landmark not in e.target_ids, e
            *_, colour, shape = re.findall(NOUN, e.text)[-1]  # the landmark's noun is the last one
            assert landmark in fitting(recording, colour or None, shape), e
            told += 1
    assert told >= 50


def test_mirrored_text_means_the_same_objects_in_the_mirrored_picture(rendered):
    checked = Counter()
    for recording in rendered:
        centre_px = np.array((recording.width, 0)) - recording.centre_px * np.array((1, -1))
        # The camera's own axes are left alone: no sentence here asks which side of it a place in the world is.
        mirrored = replace(recording, centre_px=centre_px.astype(recording.centre_px.dtype))
        for e in all_of(recording):
            name = e.template_id.partition("/")[0]
            if e.mirrored_text == e.text:
                assert not re.search(r"\b(left|right)", e.text) or name == "came_back", e
                continue
            checked[name] += 1
            assert replace(e, text=e.mirrored_text).mirrored_text == e.text, e
            if checked[name] > 20:
                continue  # finding meanings is slow
            found = find_meaning(mirrored, e.mirrored_text, query_frame=QUERY)
            assert found is not None, e
            assert found.target_ids == e.target_ids, (e, found)
            assert found.landmark_ids == e.landmark_ids, (e, found)
            assert found.kind == e.kind, (e, found)
            assert found.held_out == e.held_out, (e, found)  # else held-out phrasings would be trained
    assert set(checked) == {name for name in PHRASINGS if "left" in name or "right" in name}


def test_a_given_sentence_is_understood_as_it_was_meant(rendered):
    for recording in (rendered[0], rendered[4]):
        for e in all_of(recording)[::37]:
            found = find_meaning(recording, e.text, query_frame=QUERY)
            assert found is not None, e
            assert found.target_ids == e.target_ids, (e, found)


def test_samples_are_balanced_and_repeatable(rendered):
    plain = rendered[0]
    drawn = [e for q in (25, 34, 43) for e in sample_expressions(plain, np.random.default_rng(q), 60, q)]
    again = [e for q in (25, 34, 43) for e in sample_expressions(plain, np.random.default_rng(q), 60, q)]
    assert drawn == again
    kinds = Counter(e.kind for e in drawn)
    assert 0.12 <= kinds["absent"] / len(drawn) <= 0.40
    assert max(kinds.values()) <= 0.45 * len(drawn)
    only = sample_expressions(plain, np.random.default_rng(0), 20, QUERY, kinds=("relation",), absent_share=0.0)
    assert {e.kind for e in only} == {"relation"}


def test_articles():
    assert finish("a egg and  a box with a orange ball") == "an egg and a box with an orange ball"


def test_unknown_split_and_impossible_kinds_are_named(rendered):
    with pytest.raises(SceneError, match="unknown split 'test'"):
        all_of(rendered[0], "test")
    with pytest.raises(SceneError, match="no clear sentence of kinds order"):
        sample_expressions(rendered[0], np.random.default_rng(0), 2, 0, kinds=("order",))
