# SPDX-License-Identifier: Apache-2.0
"""Cases of simulated scenes: repeatable, with balanced questions and the truth of every frame."""

from collections import Counter

import numpy as np
import pytest

from virst_engine.errors import SceneError
from virst_engine.evaluate.cases import Case, Question, load_case
from virst_engine.evaluate.settings import FIRST_EVALUATION_SEED, FRAMES, GOAL_FRAME, EvaluationSettings

SEEDS = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 5)


@pytest.fixture(scope="module")
def plain_cases():
    try:
        return [load_case(EvaluationSettings(per_scene=5), seed) for seed in SEEDS]
    except SceneError as error:
        pytest.skip(str(error))


def test_a_case_is_ten_frames_a_second_at_camera_size(plain_cases):
    case = plain_cases[0]
    assert len(case.frames) == FRAMES
    assert case.frames[0].image_rgb_u8.shape == (240, 320, 3)
    assert np.diff([frame.stamp_ns for frame in case.frames]).tolist() == [100_000_000] * (FRAMES - 1)
    assert case.truth_masks().shape == (5, FRAMES - GOAL_FRAME, 240, 320)


def test_every_fifth_question_is_about_nothing_and_kinds_are_balanced(plain_cases):
    kinds = Counter(question.kind for case in plain_cases for question in case.questions)
    assert kinds["absent"] == 5
    assert set(kinds) == {"absent", "attribute", "relation", "superlative", "motion", "reasoning"}
    for case in plain_cases:
        assert all((question.kind == "absent") == (not question.target_ids) for question in case.questions)


def test_a_target_of_a_plain_scene_is_always_visible(plain_cases):
    for case in plain_cases:
        for question, truth in zip(case.questions, case.truth_masks(), strict=True):
            assert truth.any(axis=(1, 2)).all() == bool(question.target_ids)
            assert not (truth & ~case.foreground()).any()


def test_a_case_does_not_depend_on_the_range_that_it_is_part_of(plain_cases):
    settings = EvaluationSettings(per_scene=5, first_scene=SEEDS[1], last_scene=SEEDS[2])
    again = load_case(settings, SEEDS[1])
    assert again.questions == plain_cases[1].questions
    assert all(
        np.array_equal(a.image_rgb_u8, b.image_rgb_u8) for a, b in zip(again.frames, plain_cases[1].frames, strict=True)
    )


def test_held_out_phrasings_ask_about_the_same_scene_in_other_words(plain_cases):
    case = load_case(EvaluationSettings(per_scene=5, phrasings="held-out"), SEEDS[0])
    trained = {question.sentence for question in plain_cases[0].questions}
    assert not trained & {question.sentence for question in case.questions}


def test_the_arm_is_no_foreground():
    masks = np.zeros((1, 2, 4), dtype=np.uint8)
    masks[0, 0] = (1, 2, 255, 0)
    case = Case((), masks, 0, 2, (Question("plural", "both", (0, 1)), Question("absent", "none", ())))
    assert case.foreground()[0, 0].tolist() == [True, True, False, False]
    assert case.truth_masks()[:, 0, 0].tolist() == [[True, True, False, False], [False] * 4]


def test_absence_is_scored_while_it_lasts():
    """In this scene a can begins to go right; the sentence about it means nothing before, something unclear after."""
    case = load_case(EvaluationSettings(family="full"), 1_000_027)
    frames = {question.sentence: question.absent_frames for question in case.questions if not question.target_ids}
    assert 0 < frames["the can that is going right"] < len(case.truth_masks()[0])
    assert all(question.absent_frames is None for question in case.questions if question.target_ids)


def test_how_far_a_target_travels():
    masks = np.zeros((3, 10, 20), dtype=np.uint8)
    masks[0, 2, 2] = masks[2, 5, 6] = 1  # 3 rows and 4 columns away; hidden in between
    masks[:, 9, 0:2] = 2
    case = Case((), masks, 0, 2, ())
    assert case.travels((0,)) == pytest.approx(5 / 20)
    assert case.travels((1,)) == 0.0
    assert case.travels((1, 0)) == pytest.approx(5 / 20)
    assert case.travels(()) == 0.0
