# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.fakes import (
    BLUE,
    GREEN,
    RED,
    SIDE,
    DelayedClient,
    FakeReasoner,
    FakeStages,
    InstantClient,
    ReusedBuffers,
    SilentClient,
    Square,
    Video,
    moving_square,
    run,
    session_of,
    small_config,
)
from virst_engine.config import START_PRESENCE, EngineConfig, ReasonerParameters
from virst_engine.errors import BadFrame, BadGoal, BadPrompt, UnknownGoal, VirstError, WireError
from virst_engine.session import Session
from virst_engine.slow.reasoner import NoReasoner
from virst_engine.types import (
    ClickPrompt,
    Frame,
    FrameResult,
    MaskPrompt,
    ObjectState,
    ReasonerAnswer,
    ReasonerRequest,
)

SEARCHING, TRACKING, LOST, NOT_FOUND = ObjectState
Colour = tuple[float, float, float]


def states(results: Sequence[FrameResult], number: int = 0) -> list[ObjectState]:
    return [result.objects[number].state for result in results]


def meaning_of(colours: Sequence[Colour]) -> Callable[[ReasonerRequest], Colour]:
    """The n-th request means the n-th colour, whatever the words; the last one stays."""
    asked = []

    def meaning(request: ReasonerRequest) -> Colour:
        asked.append(request)
        return colours[min(len(asked), len(colours)) - 1]

    return meaning


def test_a_sentence_becomes_a_mask_in_the_same_frame_when_the_answer_is_instant() -> None:
    video, session = Video([moving_square(), moving_square(BLUE, row=9)]), session_of()
    assert run(session, video, [0])[0].objects == ()
    goal = session.set_goal("the blue square", object_id="cup")
    assert session.goal_states() == {goal.goal_id: SEARCHING}
    for result in run(session, video, range(1, 30)):
        (found,) = result.objects
        assert (found.object_id, found.goal_id, found.instance_id) == ("cup", goal.goal_id, goal.instance_id)
        assert found.state is TRACKING
        assert found.message == ""
        assert 0.85 < found.score < 0.9  # 0.9 x sigmoid(4)
        t = result.step
        assert np.array_equal(found.mask, video.truth(t, 1))
        assert found.prompt_age_s == pytest.approx(0.1 * (t - 1))
        assert found.reasoner_latency_s == 0.0
        assert result.stamp_ns == video.frame(t).stamp_ns
    assert session.goal_states() == {goal.goal_id: TRACKING}
    assert {"preprocess", "image_encoder", "memory_attention", "mask_decoder", "memory_encoder"} <= set(
        result.timings_ms
    )


def test_while_nobody_answers_the_object_is_searched_for() -> None:
    session = session_of(SilentClient())
    session.set_goal("the red square")
    (found,) = run(session, Video([moving_square()]), [0])[0].objects
    assert found.state is SEARCHING
    assert not found.mask.any()
    assert found.score == 0.0
    assert found.prompt_age_s == math.inf
    assert math.isnan(found.reasoner_latency_s)
    assert "waiting" in found.message


def test_a_hidden_object_is_lost_after_a_few_frames_and_found_again_by_memory() -> None:
    hidden = Square(RED, lambda t: None if 20 <= t < 30 else (2, 1 + t % 10))
    video, client = Video([hidden]), InstantClient()
    session = session_of(client, lost_after_steps=3, clip_frames=1)  # the first window is full: settled
    session.set_goal("the red square")
    before = run(session, video, range(20))
    client.reasoner = FakeReasoner(lambda request: GREEN)  # from now on it is memory that finds it
    results = before + run(session, video, range(20, 40))
    assert states(results) == [TRACKING] * 22 + [LOST] * 8 + [TRACKING] * 10
    for t, result in enumerate(results):
        assert np.array_equal(result.objects[0].mask, video.truth(t))
        assert (result.objects[0].score > 0) == bool(video.truth(t).any())
    assert "not visible" in results[25].objects[0].message


def test_a_hidden_object_that_was_never_settled_is_given_up_when_answers_agree_that_it_is_not_there() -> None:
    """Its only answer saw a window that was not full: it may have been a mistake, and memory would keep it for ever."""
    video, client = Video([Square(RED, lambda t: None if t >= 10 else (2, 1 + t % 10))]), InstantClient()
    session = session_of(client, lost_after_steps=3, overrule_answers=3, retry_s=0.3)
    session.set_goal("the red square")
    run(session, video, range(10))
    client.reasoner = FakeReasoner(lambda request: GREEN)
    seen = states(run(session, video, range(10, 25)))
    lost, given_up = seen.index(LOST), seen.index(NOT_FOUND)
    assert (lost, given_up) == (2, 6)  # asked in frames 10, 13 and 16
    assert set(seen[given_up:]) == {NOT_FOUND}


def test_while_an_answer_is_not_sure_enough_nothing_is_tracked_and_the_message_says_so() -> None:
    session = session_of(start_presence=1.0)  # the fake segmenter is never as sure as that
    session.set_goal("the red square")
    for result in run(session, Video([moving_square()]), range(6)):
        (found,) = result.objects
        assert found.state is SEARCHING
        assert not found.mask.any()
        assert "asked again" in found.message


def test_what_the_reasoner_does_not_believe_in_is_not_tracked_though_the_decoder_sees_it() -> None:
    confidence = 0.4
    client = spoiled(lambda answer: with_confidence(answer, confidence))
    session, video = session_of(client), Video([moving_square()])
    session.set_goal("the red square")
    assert states(run(session, video, range(6))) == [NOT_FOUND] * 6
    confidence = 0.7  # between 0.5 and tracking.start_presence: something may be there
    doubted = run(session, video, range(6, 21))
    assert states(doubted) == [NOT_FOUND] * 15
    assert "asked again" in doubted[-1].objects[0].message
    confidence = 1.0
    found = states(run(session, video, range(21, 30)))
    assert found.index(TRACKING) in range(3, 7)  # two sure answers, three frames apart
    assert set(found[found.index(TRACKING) :]) == {TRACKING}


@pytest.mark.parametrize("method", ["virst", "visa", "tempvrs"])
def test_each_method_begins_a_track_from_its_own_probability_or_from_the_one_that_is_set(method: str) -> None:
    for start, needed in ((0.0, START_PRESENCE[method]), (0.6, 0.6)):
        for confidence, expected in ((needed - 0.02, SEARCHING), (needed + 0.02, TRACKING)):
            client = spoiled(lambda answer, confidence=confidence: with_confidence(answer, confidence))
            session = session_of(client, method=method, start_presence=start)
            session.set_goal("the red square")
            assert states(run(session, Video([moving_square()]), range(4)))[-1] is expected, (start, confidence)


@pytest.mark.parametrize("frames_before", [6, 30])  # the window is not full, the track is not settled; and full
def test_a_reasoner_that_loses_faith_does_not_take_away_what_its_own_prompts_show(frames_before: int) -> None:
    confidence = 1.0
    client = spoiled(lambda answer: with_confidence(answer, confidence))
    session, video = session_of(client), Video([moving_square()])
    session.set_goal("the red square")
    assert states(run(session, video, range(frames_before)))[-1] is TRACKING
    confidence = 0.1
    results = run(session, video, range(frames_before, frames_before + 40))
    assert set(states(results)) == {TRACKING}
    for t, result in enumerate(results, frames_before):
        assert np.array_equal(result.objects[0].mask, video.truth(t))


def with_confidence(answer: ReasonerAnswer, confidence: float) -> ReasonerAnswer:
    prompts = tuple(dataclasses.replace(prompt, confidence=confidence) for prompt in answer.prompts)
    return dataclasses.replace(answer, prompts=prompts)


def test_a_lost_object_that_is_not_settled_is_asked_for_more_often_and_a_fresh_prompt_finds_it() -> None:
    # The red square leaves; what the sentence means comes back in another colour, which memory does not know.
    leaves = Square(RED, lambda t: (2, 2) if t < 10 else None)
    comes = Square(BLUE, lambda t: (2, 6) if t >= 20 else None)
    video = Video([leaves, comes])
    reasoner = FakeReasoner(lambda request: RED if request.clip.steps[-1] < 20 else BLUE)
    session = session_of(InstantClient(reasoner), lost_after_steps=2, retry_s=0.3)
    session.set_goal("it")
    results = run(session, video, range(30))
    assert states(results)[:20] == [TRACKING] * 11 + [LOST] * 9
    found_at = states(results).index(TRACKING, 20)
    assert found_at <= 23
    assert all(
        np.array_equal(result.objects[0].mask, video.truth(t, 1))
        for t, result in enumerate(results[found_at:], found_at)
    )
    # Asked once at the start; not visible since 10, so every third frame.
    assert [int(request.clip.steps[-1]) for request in reasoner.requests][:5] == [0, 10, 13, 16, 19]


def test_what_is_not_there_is_not_found_until_it_appears() -> None:
    video = Video([moving_square(), Square(GREEN, lambda t: (9, 3) if t >= 12 else None)])
    session = session_of()
    session.set_goal("the green square")
    results = run(session, video, range(20))
    assert states(results)[:12] == [NOT_FOUND] * 12
    assert "nothing that fits" in results[5].objects[0].message
    assert not any(result.objects[0].mask.any() for result in results[:12])
    assert states(results)[15:] == [TRACKING] * 5
    assert np.array_equal(results[-1].objects[0].mask, video.truth(19, 1))


def test_several_goals_are_followed_side_by_side() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    session = session_of()
    red, blue, none = (session.set_goal(f"the {colour} square") for colour in ("red", "blue", "green"))
    for t, result in enumerate(run(session, video, range(15))):
        by_goal = {found.goal_id: found for found in result.objects}
        assert np.array_equal(by_goal[red.goal_id].mask, video.truth(t, 0))
        assert np.array_equal(by_goal[blue.goal_id].mask, video.truth(t, 1))
        assert by_goal[none.goal_id].state is NOT_FOUND
    assert len({found.instance_id for found in result.objects}) == 3


@pytest.mark.parametrize("delay_steps", [1, 4, 12])
def test_a_late_answer_gives_the_masks_of_an_instant_one(delay_steps: int) -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)], noise=6.0)
    late_client = DelayedClient(delay_steps=delay_steps)
    instant, late = session_of(), session_of(late_client)
    for session in (instant, late):
        session.set_goal("the red square")
    expected = run(instant, video, range(40))
    results = run(late, video, range(40), late_client)
    first = states(results).index(TRACKING)
    assert delay_steps <= first <= 2 * delay_steps  # three steps are replayed per frame
    assert states(results[:first]) == [SEARCHING] * first
    assert results[first].objects[0].reasoner_latency_s == pytest.approx(0.1 * delay_steps)
    for one, other in zip(expected[first:], results[first:], strict=True):
        assert np.array_equal(one.objects[0].mask, other.objects[0].mask)
        assert one.objects[0].score == other.objects[0].score
        assert one.objects[0].prompt_age_s == other.objects[0].prompt_age_s
    logits = [session._streams[""].tracker.sighting(0).mask_logits for session in (instant, late)]  # type: ignore[union-attr]
    assert torch.equal(*logits)


def test_a_late_overruling_answer_gives_the_masks_of_an_instant_one() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)], noise=6.0)
    late_client = DelayedClient(FakeReasoner(meaning_of([RED, BLUE])), delay_steps=5)
    instant_client = InstantClient(FakeReasoner(meaning_of([RED, BLUE])))
    logits, results = [], []
    for client in (instant_client, late_client):
        session = session_of(client, period_s=1.5, overrule_answers=1)
        session.set_goal("it")
        results.append(run(session, video, range(28), client))
        logits.append(session._streams[""].tracker.sighting(0).mask_logits)  # type: ignore[union-attr]
    assert torch.equal(*logits)
    assert np.array_equal(results[0][-1].objects[0].mask, video.truth(27, 1))
    # In the late run each frame shows one of the two, whole, and the change happens once.
    shown = []
    for t, result in enumerate(results[1]):
        if result.objects[0].state is TRACKING:
            shown.append([np.array_equal(result.objects[0].mask, video.truth(t, square)) for square in (0, 1)])
    assert all(sum(which) == 1 for which in shown)
    assert sum(a != b for a, b in itertools.pairwise(shown)) == 1


def test_an_answer_whose_frame_is_gone_is_used_weakly_and_asked_for_again() -> None:
    video = Video([moving_square()])
    client = DelayedClient(delay_steps=12)
    session = session_of(client, ring_steps=8)
    session.set_goal("the red square")
    results = run(session, video, range(24), client)
    assert states(results)[:12] == [SEARCHING] * 12
    assert len(client.reasoner.requests) == 2  # again, although the period is long
    assert int(client.reasoner.requests[1].clip.steps[-1]) in (12, 13)
    for t, result in enumerate(results[13:], 13):
        (found,) = result.objects
        assert found.state is TRACKING
        assert np.array_equal(found.mask, video.truth(t))
        assert 0.4 < found.score < 0.45  # half of what a good anchor gives
    # Faster answers come: the next one is a good anchor.
    client.delay_steps = 2
    results = run(session, video, range(24, 48), client)
    assert 0.85 < results[-1].objects[0].score < 0.9
    assert results[-1].objects[0].prompt_age_s < 3.0


def test_an_evicted_answer_does_not_touch_a_good_track() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    client = DelayedClient(FakeReasoner(meaning_of([RED, BLUE])), delay_steps=1)
    session = session_of(client, ring_steps=8, period_s=1.0, overrule_answers=1)
    session.set_goal("it")
    run(session, video, range(5), client)
    client.delay_steps = 12
    results = run(session, video, range(5, 30), client)
    assert len(client.reasoner.requests) >= 2
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step, 0)) for result in results)
    assert (results[-1].objects[0].state, results[0].objects[0].message) == (TRACKING, "")
    assert "too late" in results[-1].objects[0].message  # also while it is tracked: somebody may wonder


def test_all_anchors_of_a_late_answer_are_used_though_the_ring_has_lost_the_oldest() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])
    client = DelayedClient(delay_steps=10)
    session = session_of(client, ring_steps=24)
    run(session, video, range(30), client)
    session.set_goal("the red square")
    results = run(session, video, range(30, 50), client)
    assert client.reasoner.requests[0].clip.steps[[0, -1]].tolist() == [9, 30]
    assert session._streams[""].tracker.memory.anchor_steps(0) == [9, 30]
    assert np.array_equal(results[-1].objects[0].mask, video.truth(49))


def test_a_late_answer_that_agrees_joins_a_track_though_its_frames_left_the_ring() -> None:
    client = DelayedClient(FakeReasoner(meaning_of([RED])), delay_steps=1)
    session, video = session_of(client, ring_steps=8, period_s=1.0), Video([moving_square()])
    session.set_goal("it")
    run(session, video, range(5), client)
    client.delay_steps = 12
    results = run(session, video, range(5, 30), client)
    asked = [int(request.clip.steps[-1]) for request in client.reasoner.requests]
    assert asked[1] == 10
    assert 10 in session._streams[""].tracker.memory.anchor_steps(0)
    assert results[-1].objects[0].message == ""


def test_an_anchor_from_before_a_takeover_does_not_join_unchecked() -> None:
    video = Video([moving_square(), Square(BLUE, lambda t: (9, 3))])
    reasoner = FakeReasoner(lambda request: RED if request.clip.steps[-1] < 30 else BLUE)
    session = session_of(InstantClient(reasoner), period_s=0.5, overrule_answers=2, clip_frames=8)
    run(session, video, range(25))
    session.set_goal("it")
    results = run(session, video, range(25, 60))
    assert [int(request.clip.steps[-1]) for request in reasoner.requests[:7]] == [25, 30, 35, 40, 45, 50, 55]
    assert np.array_equal(results[-1].objects[0].mask, video.truth(59, 1))
    # 35 overruled, with both of its anchors. Nothing is believed of this object in 19, 24, 29 and 34.
    assert session._streams[""].tracker.memory.anchor_steps(0) == [14, 35, 40, 45, 50, 55]


def shown_squares(
    meanings: Sequence[Colour],
    overrule_answers: int = 2,
    clip_frames: int = 2,
    min_write_iou: float = 0.5,
    keep_answers: int = 0,
) -> str:
    """Which square is shown in each frame, when the reasoner is asked every frame: r, b, g, or - for none."""
    still_green = Square(GREEN, lambda t: (12, 12), cells=3)
    video = Video([moving_square(row=1), moving_square(BLUE, row=6), still_green])
    client = InstantClient(FakeReasoner(meaning_of(meanings)))
    session = session_of(
        client,
        period_s=0.0,
        retry_s=0.0,
        overrule_answers=overrule_answers,
        clip_frames=clip_frames,
        clip_spacing_s=0.1,
        min_write_iou=min_write_iou,
        keep_answers=keep_answers,
    )
    session.set_goal("it")
    letters = []
    for t, result in enumerate(run(session, video, range(len(meanings)))):
        shown = [letter for n, letter in enumerate("rbg") if np.array_equal(result.objects[0].mask, video.truth(t, n))]
        letters.append(shown[0] if shown else "-")
    return "".join(letters)


def test_only_answers_in_a_row_that_point_at_the_same_thing_take_a_settled_track_away() -> None:
    r, b, g = RED, BLUE, GREEN
    assert shown_squares([r, r, b, r, b, r, r]) == "rrrrrrr"
    assert shown_squares([r, r, b, b, b, b, b]) == "rrrbbbb"
    assert shown_squares([r, r, b, b, b, b, b], overrule_answers=3) == "rrrrbbb"
    assert shown_squares([r, r, r, b, g, r, r]) == "rrrrrrr"  # two answers, two wrong squares
    assert shown_squares([r, r, b, g, b, g, b]) == "rrrrrrr"
    assert shown_squares([r, r, b, g, g, g, g]) == "rrrrggg"


def test_what_a_later_answer_has_confirmed_is_kept_whatever_the_sentence_means_later() -> None:
    r, b, none = RED, BLUE, (-9.0, -9.0, -9.0)  # the first window is not full, the second answer settles
    assert shown_squares([r, r, r, b, b, b, b, b], keep_answers=1) == "rrrrrrrr"
    assert shown_squares([r, r, r, b, b, b, b, b], keep_answers=0) == "rrrrbbbb"
    assert shown_squares([r, r, r, b, b, b, b, b], keep_answers=2) == "rrrrbbbb"
    assert shown_squares([r, r, b, b, r, r, b, b], keep_answers=1) == "rrrbbrrb"  # what takes over has to be confirmed
    assert shown_squares([r, r, r, none, none, none], min_write_iou=0.95, keep_answers=1) == "rrrr--"  # both doubt
    assert shown_squares([r, r, r, none, none, none], keep_answers=1) == "rrrrrr"


def test_it_is_told_when_the_sentence_has_come_to_mean_another_object() -> None:
    video = Video([moving_square(row=1), Square(BLUE, lambda t: (9, 3))])
    client = InstantClient(FakeReasoner(lambda request: RED if request.clip.steps[-1] < 30 else BLUE))
    session = session_of(client, period_s=0.5, overrule_answers=3, keep_answers=1)
    session.set_goal("the one on the left")
    results = run(session, video, range(60))
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step)) for result in results)
    asked = [int(request.clip.steps[-1]) for request in client.reasoner.requests]
    third = [step for step in asked if step >= 30][2]
    assert {result.objects[0].message for result in results[:third]} == {""}
    assert all("has come to mean another object" in result.objects[0].message for result in results[third:])

    client.reasoner = FakeReasoner(meaning_of([RED]))  # it means this one again
    assert run(session, video, range(60, 70))[-1].objects[0].message == ""


def means_another_from(step: int) -> InstantClient:
    return InstantClient(FakeReasoner(lambda request: RED if request.clip.steps[-1] < step else BLUE))


def test_what_was_said_against_a_kept_object_does_not_take_it_when_it_is_hidden_for_a_moment() -> None:
    video = Video([Square(RED, lambda t: None if 60 <= t < 66 else (2, 1 + t % 10)), Square(BLUE, lambda t: (9, 3))])
    session = session_of(means_another_from(30), period_s=0.3, retry_s=0.3, overrule_answers=4, keep_answers=1)
    session.set_goal("the one on the left")
    results = run(session, video, range(90))
    assert LOST in states(results)[60:66]
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step)) for result in results)


@pytest.mark.parametrize("steps_ago", [0, 5])  # on the newest frame, and on one whose followers are replayed
def test_what_a_user_points_out_is_kept_whatever_the_sentence_means(steps_ago: int) -> None:
    video = Video([moving_square(row=1), Square(BLUE, lambda t: (9, 3))])
    session = session_of(means_another_from(30), period_s=0.3, retry_s=0.3, overrule_answers=2, keep_answers=1)
    goal = session.set_goal("the one on the left")
    run(session, video, range(61))
    frame = video.frame(60 - steps_ago)
    session.prompt_object(goal.object_id, MaskPrompt(video.truth(60 - steps_ago)), stamp_ns=frame.stamp_ns)
    results = run(session, video, range(61, 90))
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step)) for result in results[10:])


def test_an_object_that_is_seen_well_is_not_given_up_because_it_is_said_to_be_absent() -> None:
    r, none = RED, (-9.0, -9.0, -9.0)
    assert shown_squares([r, r, none, none, none, none, none]) == "rrrrrrr"
    assert shown_squares([r, r, none, r, none, none, none], min_write_iou=0.95) == "rrrrr--"  # 0.9 is predicted


def test_a_lost_object_is_not_taken_by_wrong_answers_but_waits_until_it_comes_back() -> None:
    hidden = Square(RED, lambda t: None if 30 <= t < 70 else (2, 1 + t % 10))
    video = Video([hidden, moving_square(BLUE, row=9)])
    client = InstantClient(FakeReasoner(lambda request: BLUE if request.clip.steps[-1] >= 30 else RED))
    session = session_of(client, lost_after_steps=3, period_s=1.0, overrule_answers=6)
    session.set_goal("it")
    results = run(session, video, range(90))
    assert len(client.reasoner.requests) >= 6
    assert states(results)[35:70] == [LOST] * 35
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step)) for result in results)

    # As many answers as are asked for do take it: it may have changed beyond what memory knows.
    client = InstantClient(FakeReasoner(lambda request: BLUE if request.clip.steps[-1] >= 30 else RED))
    session = session_of(client, lost_after_steps=3, period_s=1.0, overrule_answers=3)
    session.set_goal("it")
    results = run(session, video, range(70))
    assert np.array_equal(results[-1].objects[0].mask, video.truth(69, 1))


def test_an_answer_from_a_window_that_was_not_full_is_overruled_at_once() -> None:
    assert shown_squares([RED, BLUE, RED, RED, RED, RED], clip_frames=3) == "rbrrrr"
    assert shown_squares([RED, (-9.0, -9.0, -9.0), RED, RED, BLUE, RED], clip_frames=3) == "r--rrr"


def test_a_goal_that_was_not_found_is_found_when_answers_in_a_row_agree() -> None:
    r, b, none = RED, BLUE, (-9.0, -9.0, -9.0)
    assert shown_squares([none, r, none, none, r, none, none]) == "-------"  # single mistakes show nothing
    assert shown_squares([none, r, none, r, b, r, r, r]) == "------rr"
    assert shown_squares([r, r, r]) == "rrr"  # nobody said that it is not there


def test_an_answer_of_an_old_epoch_changes_nothing() -> None:
    video = Video([moving_square(), moving_square(BLUE, row=9)])

    def results_with(forget: Callable[[Session, DelayedClient], None]) -> list[FrameResult]:
        client = DelayedClient(delay_steps=6)
        session = session_of(client)
        session.set_goal("the blue square", goal_id="g")
        results = run(session, video, range(3), client)
        forget(session, client)
        session.set_goal("the red square", goal_id="g", replace=True)
        return results + run(session, video, range(3, 30), client)

    with_old_answer = results_with(lambda session, client: None)
    without = results_with(lambda session, client: client.waiting.clear())
    assert states(with_old_answer) == states(without)
    for one, other in zip(with_old_answer, without, strict=True):
        assert np.array_equal(one.objects[0].mask, other.objects[0].mask)
        assert one.objects[0].score == other.objects[0].score
        assert one.objects[0].message == other.objects[0].message
    assert np.array_equal(with_old_answer[-1].objects[0].mask, video.truth(29, 0))


def test_a_reset_forgets_everything_but_the_goals() -> None:
    video, client = Video([moving_square()]), DelayedClient(delay_steps=3)
    session = session_of(client)
    goal = session.set_goal("the red square")
    results = run(session, video, range(10), client)
    assert states(results)[-1] is TRACKING
    session.reset()
    results = run(session, video, range(10, 20), client)
    assert states(results) == [SEARCHING] * 4 + [TRACKING] * 6 or states(results) == [SEARCHING] * 3 + [TRACKING] * 7
    assert session.goals() == (goal,)
    assert client.cancelled == [goal.goal_id]
    assert client.reasoner.requests[-1].epoch > client.reasoner.requests[0].epoch
    assert set(client.reasoner.requests[-1].clip.steps.tolist()) == {10}  # the window starts anew


def test_one_request_per_goal_is_in_flight_until_its_time_to_live_is_over() -> None:
    video, client = Video([moving_square()]), SilentClient()
    session = session_of(client, ttl_s=2.0, retry_s=0.1)
    session.set_goal("the red square")
    session.set_goal("the blue square")
    results = run(session, video, range(45))
    asked = [(request.sentence, int(request.clip.steps[-1])) for request in client.reasoner.requests]
    assert asked == [(f"the {colour} square", step) for step in (0, 20, 40) for colour in ("red", "blue")]
    assert "no answer of the reasoner for 2 s" in results[-1].objects[0].message


def test_a_request_that_cannot_be_sent_is_explained() -> None:
    class Refusing(InstantClient):
        def submit(self, request: ReasonerRequest) -> None:
            raise WireError("the clip is too large; take a smaller reasoner.clip_frames")

    session = session_of(Refusing())
    session.set_goal("the red square")
    for result in run(session, Video([moving_square()]), range(3)):
        assert result.objects[0].message == "the clip is too large; take a smaller reasoner.clip_frames"


def test_a_reasoner_that_is_slower_than_the_time_to_live_is_of_use_all_the_same() -> None:
    video, client = Video([moving_square()]), DelayedClient(delay_steps=15)
    session = session_of(client, ttl_s=1.0, ring_steps=8)  # known by the frames that were pinned for it
    session.set_goal("the red square")
    results = run(session, video, range(29), client)
    assert [int(request.clip.steps[-1]) for request in client.reasoner.requests[:2]] == [0, 10]
    assert states(results)[:15] == [SEARCHING] * 15
    assert states(results)[16:] == [TRACKING] * 13
    assert results[15].objects[0].reasoner_latency_s == pytest.approx(1.5)


def test_a_reasoner_that_seemed_to_hang_may_still_answer() -> None:
    video, client = Video([moving_square()]), DelayedClient(delay_steps=6)
    session = session_of(client)
    session.set_goal("the red square")
    run(session, video, range(3), client)
    client.trouble, client.delay_steps = "it hangs", 1000
    run(session, video, range(3, 5), client)
    client.trouble = ""
    results = run(session, video, range(5, 12), client)
    assert len(client.reasoner.requests) == 2  # asked again when it came back, for it might have been killed
    assert states(results)[-3:] == [TRACKING] * 3


def test_masks_go_on_while_the_reasoner_is_gone_and_it_is_asked_when_it_is_back() -> None:
    video, client = Video([moving_square()]), InstantClient()
    session = session_of(client, period_s=0.5)
    session.set_goal("the red square")
    run(session, video, range(5))
    client.trouble = "no reasoner answers; start it"
    asked = len(client.reasoner.requests)
    results = run(session, video, range(5, 30))
    assert len(client.reasoner.requests) == asked
    assert all(np.array_equal(result.objects[0].mask, video.truth(result.step)) for result in results)
    late_goal = session.set_goal("the blue square")
    found = {o.goal_id: o for o in run(session, video, [30])[0].objects}[late_goal.goal_id]
    assert (found.state, found.message) == (SEARCHING, "no reasoner answers; start it")
    client.trouble = ""
    run(session, video, [31])
    assert [request.sentence for request in client.reasoner.requests[asked:]] == ["the red square", "the blue square"]


def test_a_request_lost_with_the_reasoner_is_asked_again_when_it_is_back() -> None:
    video, client = Video([moving_square()]), SilentClient()
    session = session_of(client)
    session.set_goal("the red square")
    run(session, video, range(3))
    client.trouble = "killed"
    run(session, video, range(3, 6))
    client.trouble = ""
    run(session, video, range(6, 9))
    assert [int(request.clip.steps[-1]) for request in client.reasoner.requests] == [0, 6]


def spoiled(spoil: Callable[[ReasonerAnswer], ReasonerAnswer]) -> InstantClient:
    class Spoiled(FakeReasoner):
        def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
            return spoil(super().answer(request))

    return InstantClient(Spoiled())


def with_embeddings(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ReasonerAnswer], ReasonerAnswer]:
    def spoil(answer: ReasonerAnswer) -> ReasonerAnswer:
        prompts = tuple(dataclasses.replace(p, embeddings=change(p.embeddings)) for p in answer.prompts)
        return dataclasses.replace(answer, prompts=prompts)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: dataclasses.replace(a, prompts=(), error="no word of it is known"), "no word of it is known"),
        (lambda a: with_confidence(a, float("nan")), "confidences are not within 0 and 1"),
        (lambda a: with_confidence(a, 3.0), "confidences are not within 0 and 1"),
        (lambda a: dataclasses.replace(a, prompts=()), "no prompts"),
        (with_embeddings(lambda e: e[:, :5]), "n x 8"),
        (with_embeddings(lambda e: np.full_like(e, np.nan)), "not finite"),
    ],
)
def test_a_useless_answer_is_explained_and_the_stream_goes_on(
    spoil: Callable[[ReasonerAnswer], ReasonerAnswer], words: str
) -> None:
    session = session_of(spoiled(spoil))
    session.set_goal("the red square")
    for result in run(session, Video([moving_square()]), range(5)):
        assert result.objects[0].state is SEARCHING
        assert words in result.objects[0].message


def test_a_useless_answer_does_not_touch_a_track() -> None:
    video, client = Video([moving_square()]), InstantClient()
    session = session_of(client, period_s=0.2)
    session.set_goal("the red square")
    run(session, video, range(5))
    client.reasoner = spoiled(with_embeddings(lambda e: e[:, :5])).reasoner
    for result in run(session, video, range(5, 15)):
        assert np.array_equal(result.objects[0].mask, video.truth(result.step))


def test_a_cleared_goal_leaves_no_trace_in_the_next_one_of_its_slot() -> None:
    video, client = Video([moving_square(), moving_square(BLUE, row=9)]), InstantClient()
    session = session_of(client, max_objects=1)
    first = session.set_goal("the red square")
    run(session, video, range(5))
    assert session.clear_goal(first.goal_id) == first
    client.reasoner = FakeReasoner(lambda request: GREEN)
    second = session.set_goal("the blue square")
    assert second.instance_id != first.instance_id
    (result,) = run(session, video, [5])
    assert [found.goal_id for found in result.objects] == [second.goal_id]
    assert result.objects[0].state is NOT_FOUND
    assert not result.objects[0].mask.any()
    assert client.cancelled == [first.goal_id]


def test_goals_that_cannot_be_set_or_cleared_change_nothing() -> None:
    session = session_of(max_objects=2)
    goals = (session.set_goal("the red square", goal_id="a"), session.set_goal("the blue square", object_id="b"))
    for sentence, kwargs in (
        ("", {}),
        ("x" * 301, {}),
        ("one more", {}),
        ("", {"replace": True}),
        ("a b", {"goal_id": "a"}),
    ):
        with pytest.raises(BadGoal):
            session.set_goal(sentence, **kwargs)
    with pytest.raises(UnknownGoal):
        session.clear_goal("nobody")
    assert session.goals() == goals
    replaced = session.set_goal("赤い四角", replace=True)
    assert session.goals() == (replaced,)


def test_a_goal_of_another_camera_is_neither_asked_for_nor_shown() -> None:
    video, client = Video([moving_square()]), InstantClient()
    session = session_of(client)
    session.set_goal("the red square", camera="left")
    here = session.set_goal("the red square", camera="camera")
    (result,) = run(session, video, [0])
    assert [found.goal_id for found in result.objects] == [here.goal_id]
    assert [request.goal_id for request in client.reasoner.requests] == [here.goal_id]


def test_goals_may_be_set_and_cleared_from_other_threads() -> None:
    video, session = Video([moving_square(), moving_square(BLUE, row=9)]), session_of(max_objects=3)
    stop, failures = threading.Event(), []

    def keep_changing(colour: str) -> None:
        try:
            while not stop.is_set():
                goal = session.set_goal(f"the {colour} square")
                session.goal_states()
                session.clear_goal(goal.goal_id)
        except Exception as error:
            failures.append(error)

    session.set_goal("the red square", goal_id="stays")
    threads = [threading.Thread(target=keep_changing, args=(colour,)) for colour in ("red", "blue")]
    for thread in threads:
        thread.start()
    try:
        for result in run(session, video, range(60)):
            stays = next(found for found in result.objects if found.goal_id == "stays")
            assert np.array_equal(stays.mask, video.truth(result.step))
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)
    assert failures == []
    assert [goal.goal_id for goal in session.goals()] == ["stays"]


def test_goals_that_no_frame_has_met_leave_nothing_to_do() -> None:
    video, session = Video([moving_square(), moving_square(BLUE, row=9)]), session_of(max_objects=2)
    session.set_goal("the red square", goal_id="stays")
    run(session, video, range(3))
    forgotten = []
    tracker = session._streams[""].tracker  # the camera that has no name
    forget = tracker.forget
    tracker.forget = lambda slot: (forgotten.append(slot), forget(slot))
    session.set_goal("the blue square", goal_id="seen")
    run(session, video, range(3, 5))
    session.clear_goal("seen")
    for k in range(1000):  # the camera is silent
        session.set_goal("the blue square", goal_id=f"passes {k}")
        session.clear_goal(f"passes {k}")
    session.set_goal("the blue square", goal_id="comes")
    results = run(session, video, range(5, 10))
    assert forgotten == [1]  # the slot of the one that was seen, once
    assert [found.goal_id for found in results[-1].objects] == ["stays", "comes"]
    for found, truth in zip(results[-1].objects, (video.truth(9), video.truth(9, 1)), strict=True):
        assert np.array_equal(found.mask, truth)


def test_the_camera_may_change_its_resolution() -> None:
    video, session = Video([moving_square()]), session_of()
    session.set_goal("the red square")
    for t, (high, wide) in enumerate([(1, 1), (8, 10), (2, 2), (15, 20), (1, 1)]):
        (found,) = session.step(video.frame(t, (high, wide))).objects
        truth = np.kron(video.truth(t), np.ones((high, wide), bool)).astype(bool)
        assert found.mask.shape == truth.shape
        overlap = (found.mask & truth).sum() / (found.mask | truth).sum()
        assert overlap > 0.95  # enlarged bilinearly, so corners are rounded


def test_a_bad_frame_is_refused_and_the_stream_goes_on() -> None:
    video, session = Video([moving_square()]), session_of()
    session.set_goal("the red square")
    run(session, video, range(3))
    good = video.frame(3)
    with pytest.raises(BadFrame, match="pixels"):
        session.step(Frame(np.zeros((0, 0, 3), np.uint8), good.stamp_ns))
    with pytest.raises(BadFrame, match="'right'"):
        session.step(dataclasses.replace(good, camera="right"))
    with pytest.raises(BadFrame):  # its stamp does not reset the session either
        session.step(Frame(np.zeros((0, 0, 3), np.uint8), 0))
    (found,) = session.step(good).objects
    assert np.array_equal(found.mask, video.truth(3))
    assert found.prompt_age_s > 0


def test_a_clock_that_goes_back_starts_the_session_over_and_keeps_the_goals() -> None:
    video, client = Video([moving_square()]), InstantClient()
    session = session_of(client)
    session.set_goal("the red square")
    results = run(session, video, [*range(30), *range(10)])  # a bag that is played in a loop
    assert states(results) == [TRACKING] * 40
    assert [result.step for result in results] == list(range(40))
    assert results[30].objects[0].prompt_age_s == 0.0  # prompted again, nothing older is left
    assert all(np.array_equal(r.objects[0].mask, video.truth(t)) for r, t in zip(results[30:], range(10), strict=True))
    assert client.reasoner.requests[-1].clip.steps.tolist() == [30] * 8
    assert results[39].objects[0].prompt_age_s == pytest.approx(0.9)


def test_open_hands_the_reasoner_s_address_keys_and_weights_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Client(InstantClient):
        def __init__(self, endpoint: str, *, curve_keys: str = "", model: str = "") -> None:
            super().__init__()
            made.append((endpoint, curve_keys, model))

    monkeypatch.setattr("virst_engine.slow.zmq_client.ZmqReasonerClient", Client)
    monkeypatch.setattr("virst_engine.weights.load_stages", lambda model, engine, memory: FakeStages())
    monkeypatch.setattr("virst_engine.weights.weights_identity", lambda model: f"{model.name} 0123456789ab")
    reasoner = ReasonerParameters(endpoint="tcp://robot:5555", curve_keys="/keys")
    Session.open(EngineConfig(reasoner=reasoner)).close()
    assert made == [("tcp://robot:5555", "/keys", "tabletop-tiny 0123456789ab")]


def test_live_parameters_change_with_the_next_frame_and_others_not_at_all() -> None:
    video, client = Video([moving_square()]), InstantClient()
    session = session_of(client, period_s=1000.0)
    session.set_goal("the red square")
    run(session, video, range(20))
    assert len(client.reasoner.requests) == 1
    session.reconfigure(small_config(period_s=0.2, min_write_iou=0.95))
    run(session, video, range(20, 30))
    assert [int(request.clip.steps[-1]) for request in client.reasoner.requests[1:3]] == [20, 23]  # in doubt: retry_s
    assert session._streams[""].tracker.memory.recent_steps(0) == [14, 15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match=r"memory\.ring_steps cannot change"):
        session.reconfigure(small_config(ring_steps=10, period_s=0.2, min_write_iou=0.95))


def test_equal_stamps_are_no_step_back() -> None:
    video, client = Video([moving_square()], period_s=0.0), InstantClient()
    session = session_of(client)
    session.set_goal("the red square")
    assert states(run(session, video, range(5))) == [TRACKING] * 5
    assert len(client.reasoner.requests) == 1


def test_a_closed_session_closes_its_client_and_takes_no_frame() -> None:
    client = InstantClient()
    with session_of(client) as session:
        session.step(Video([]).frame(0))
    assert client.is_closed
    session.close()
    with pytest.raises(VirstError, match="closed"):
        session.step(Video([]).frame(1))


def test_the_clip_shows_the_newest_frame_last() -> None:
    video, client = Video([moving_square()], scale=(3, 4)), InstantClient()
    session = session_of(client)
    run(session, video, range(25))
    session.set_goal("the red square")
    run(session, video, [25])
    (request,) = client.reasoner.requests
    assert request.clip.steps.tolist() == [4, 7, 10, 13, 16, 19, 22, 25]
    assert request.clip.frames_rgb_u8.shape == (8, 16, 16, 3)
    assert request.clip.frames_rgb_u8[:, 0, 0, 0].tolist() == request.clip.steps.tolist()  # the frame's own number
    assert request.clip.fusion.dtype == np.float16
    assert request.clip.camera == "camera"
    assert request.clip.fusion.shape[-1] == SIDE // 4


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def pointed(t: int = 0, row: int = 2) -> ClickPrompt:
    """A point on the moving square of frame t."""
    x = 2 * (1 + t % 10) + 4
    return ClickPrompt(np.array([[x, 2 * row + 4]], np.float32))


def test_nothing_relies_on_what_a_stage_returned_before_its_last_call() -> None:
    """Two goals with refreshes, a late answer with its replay, a prompt: the same with buffers that are reused."""
    squares = [moving_square(), moving_square(GREEN, row=9)]
    video, results = Video(squares), []
    for stages in (FakeStages(), ReusedBuffers()):
        session = Session(small_config(period_s=0.3), stages, client := DelayedClient(delay_steps=4))
        frames = []
        for t in range(24):
            client.tick()
            if t == 3:
                session.set_goal("red")
                session.set_goal("green")
            if t == 12:
                session.add_object(pointed(9), stamp_ns=video.frame(9).stamp_ns)
            frames.append(session.step(video.frame(t)))
        results.append(frames)
    for plain, reused in zip(*results, strict=True):
        for one, other in zip(plain.objects, reused.objects, strict=True):
            assert (one.state, one.score) == (other.state, other.score)
            assert np.array_equal(one.mask, other.mask)
    assert [found.state for found in results[1][-1].objects] == [ObjectState.TRACKING] * 3


def boxed(t: int, row: int) -> ClickPrompt:
    """A box around the moving square of frame t."""
    x, y = 2.0 * (1 + t % 10), 2.0 * row
    return ClickPrompt(box_px=(x, y, x + 8, y + 8))


class TestPointedOut:
    """Objects from boxes, points and masks, beside goals or without a reasoner at all."""

    def test_a_point_is_tracked_from_the_next_frame_on(self) -> None:
        video, session = Video([moving_square()]), Session(small_config(), FakeStages(), NoReasoner())
        session.step(video.frame(0))
        goal = session.add_object(pointed(0), object_id="cup")
        for t in range(1, 6):
            (found,) = session.step(video.frame(t)).objects
            assert (found.object_id, found.state) == ("cup", ObjectState.TRACKING)
            assert iou(found.mask, video.truth(t)) > 0.9
        assert goal.sentence == ""

    def test_a_prompt_on_an_older_frame_is_replayed(self) -> None:
        video, session = Video([moving_square()]), Session(small_config(), FakeStages(), NoReasoner())
        for t in range(9):
            session.step(video.frame(t))
        session.add_object(pointed(2), stamp_ns=video.frame(2).stamp_ns)
        states = [session.step(video.frame(t)).objects[0].state for t in range(9, 16)]
        assert states[0] is ObjectState.SEARCHING  # three cached frames are replayed per new one
        (found,) = session.step(video.frame(16)).objects
        assert found.state is ObjectState.TRACKING
        assert iou(found.mask, video.truth(16)) > 0.9

    def test_a_new_object_leaves_others_as_they_are(self) -> None:
        squares = [moving_square(), moving_square(GREEN, row=9)]
        video = Video(squares)
        alone, both = (Session(small_config(), FakeStages(), NoReasoner()) for _ in range(2))
        for session in (alone, both):
            session.step(video.frame(0))
            session.add_object(pointed(0), object_id="first")
        for t in range(1, 12):
            if t == 5:
                both.add_object(pointed(4, row=9), object_id="second")
            one, two = alone.step(video.frame(t)), both.step(video.frame(t))
            assert np.array_equal(one.objects[0].mask, two.objects[0].mask)
            assert one.objects[0].score == two.objects[0].score
        assert iou(two.objects[1].mask, video.truth(11, 1)) > 0.9

    def test_prompting_again_keeps_the_identity(self) -> None:
        squares = [moving_square(), moving_square(GREEN, row=9)]
        video, session = Video(squares), Session(small_config(), FakeStages(), NoReasoner())
        session.step(video.frame(0))
        goal = session.add_object(pointed(0), object_id="it")
        before = session.step(video.frame(1)).objects[0]
        session.prompt_object("it", boxed(1, row=9))
        after = session.step(video.frame(2)).objects[0]
        assert (after.object_id, after.instance_id, after.goal_id) == ("it", before.instance_id, goal.goal_id)
        assert iou(after.mask, video.truth(2, 1)) > iou(after.mask, video.truth(2, 0))

    def test_a_mask_is_a_prompt_too(self) -> None:
        video, session = Video([moving_square()]), Session(small_config(), FakeStages(), NoReasoner())
        session.step(video.frame(0))
        session.add_object(MaskPrompt(video.truth(0)))
        (found,) = session.step(video.frame(1)).objects
        assert iou(found.mask, video.truth(1)) > 0.9

    def test_a_goal_of_the_reasoner_can_be_corrected(self) -> None:
        squares = [moving_square(), moving_square(GREEN, row=9)]
        video, session = Video(squares), Session(small_config(), FakeStages(), InstantClient())
        goal = session.set_goal("red")
        session.step(video.frame(0))
        session.prompt_object(goal.object_id, boxed(0, row=9))
        found = session.step(video.frame(1)).objects[0]
        assert (found.goal_id, found.state) == (goal.goal_id, ObjectState.TRACKING)
        assert iou(found.mask, video.truth(1, 1)) > 0.9

    def test_what_cannot_be_pointed_out_is_refused_and_changes_nothing(self) -> None:
        video, session = Video([moving_square()]), Session(small_config(ring_steps=4), FakeStages(), NoReasoner())
        with pytest.raises(BadPrompt, match="no frame has been seen yet"):
            session.add_object(pointed(0))
        for t in range(8):
            session.step(video.frame(t))
        with pytest.raises(BadPrompt, match="is not cached"):
            session.add_object(pointed(0), stamp_ns=video.frame(0).stamp_ns)
        with pytest.raises(BadPrompt, match="outside the image of 32 x 32"):
            session.add_object(ClickPrompt(np.array([[32.5, 3.0]])))
        with pytest.raises(BadPrompt, match="the mask is 16 x 8"):
            session.add_object(MaskPrompt(np.zeros((8, 16), bool)))
        with pytest.raises(UnknownGoal, match="no object 'cup'"):
            session.prompt_object("cup", pointed(0))
        assert session.goals() == ()
        for _ in range(3):
            session.add_object(pointed(7))
        with pytest.raises(BadGoal, match=r"3 goals are set; .*tracking\.max_objects"):
            session.add_object(pointed(7))
        assert len(session.step(video.frame(8)).objects) == 3

    def tracker_session(
        self, *squares: Square, client: Any = None, **changes: int
    ) -> tuple[Video, Session, FakeStages]:
        video, stages = Video(list(squares or [moving_square()])), FakeStages()
        return video, Session(small_config(**changes), stages, client or NoReasoner()), stages

    def test_a_second_prompt_keeps_a_first_one_that_is_still_replayed(self) -> None:
        """In whichever order they come: both frames are anchors in the end."""
        for first, second in ((2, 5), (5, 2), (2, 9), (8, 3)):
            video, session, _ = self.tracker_session()
            for t in range(10):
                session.step(video.frame(t))
            goal = session.add_object(pointed(first), stamp_ns=video.frame(first).stamp_ns)
            session.prompt_object(goal.object_id, pointed(second), stamp_ns=video.frame(second).stamp_ns)
            for t in range(10, 18):
                (found,) = session.step(video.frame(t)).objects
            assert session._streams[""].tracker.memory.anchor_steps(0) == sorted((first, second)), (first, second)
            assert iou(found.mask, video.truth(17)) > 0.9

    def test_an_answer_on_its_way_does_not_overrule_the_user(self) -> None:
        client = DelayedClient(delay_steps=3)
        video, session, _ = self.tracker_session(moving_square(), moving_square(GREEN, row=9), client=client)
        for t in range(20):
            client.tick()
            if t == 6:
                goal = session.set_goal("red")
            if t == 8:  # the answer about red comes while this is replayed
                session.prompt_object(goal.object_id, boxed(2, row=9), stamp_ns=video.frame(2).stamp_ns)
            result = session.step(video.frame(t))
        (found,) = result.objects
        assert iou(found.mask, video.truth(19, 1)) > 0.9

    def test_points_correct_the_mask_that_is_seen(self) -> None:
        video, session, stages = self.tracker_session()
        session.step(video.frame(0))
        goal = session.add_object(boxed(0, row=2))
        session.step(video.frame(1))
        session.prompt_object(goal.object_id, pointed(1))
        session.step(video.frame(2))
        session.prompt_object(goal.object_id, pointed(1), stamp_ns=video.frame(1).stamp_ns)
        session.step(video.frame(3))
        alone, newest, older = stages.corrected
        assert alone is None
        assert newest is not None
        assert older is not None
        truth = torch.from_numpy(cv2.resize(video.truth(1).astype(np.uint8), (16, 16)) > 0)
        assert torch.equal(newest[0] > 0, truth)
        assert torch.equal(older[0] > 0, truth)
        assert session._streams[""].tracker.memory.anchor_steps(0) == [0, 1]

    def test_a_point_off_the_object_needs_a_mask_to_take_it_from(self) -> None:
        video, session, _ = self.tracker_session()
        session.step(video.frame(0))
        session.add_object(ClickPrompt(np.array([[3.0, 3.0]]), np.array([0])))
        (found,) = session.step(video.frame(1)).objects
        assert found.state is ObjectState.SEARCHING
        assert "needs a point on the object" in found.message

    def test_where_nothing_is_found_nothing_is_remembered(self) -> None:
        video = Video([moving_square()], noise=0.0)
        stages = FakeStages()
        session = Session(small_config(), stages, NoReasoner())
        session.step(video.frame(0))
        stages.is_blind = True
        session.add_object(pointed(0))
        (found,) = session.step(video.frame(1)).objects
        assert found.state is ObjectState.SEARCHING
        assert "nothing was found" in found.message
        assert session._streams[""].tracker.memory.is_empty(0)

    def test_after_a_reset_there_is_no_frame_to_prompt(self) -> None:
        video, session, _ = self.tracker_session()
        session.step(video.frame(0))
        session.add_object(pointed(0))
        session.step(video.frame(1))
        session.reset()
        with pytest.raises(BadPrompt, match="no frame has been seen yet"):
            session.add_object(pointed(1))
        (found,) = session.step(video.frame(2)).objects
        assert (found.state, found.message) == (
            ObjectState.SEARCHING,
            "it was pointed out in a frame that is gone; point it out again",
        )
        session.prompt_object(found.object_id, pointed(2))
        assert session.step(video.frame(3)).objects[0].state is ObjectState.TRACKING

    def test_more_points_than_the_stages_take_are_refused(self) -> None:
        video, session, stages = self.tracker_session()
        session._streams[""]._sizes = dataclasses.replace(stages.sizes, prompt_tokens=4)
        session.step(video.frame(0))
        with pytest.raises(BadPrompt, match="at most 3 points, of which a box counts as two; got 4"):
            session.add_object(ClickPrompt(np.ones((2, 2)), box_px=(1.0, 1.0, 5.0, 5.0)))

    def test_what_the_user_approved_outlives_the_reasoners_anchors(self) -> None:
        video, session, _ = self.tracker_session(client=InstantClient(), period_s=0, anchor_slots=3)
        goal = session.set_goal("red")
        for t in range(30):
            session.step(video.frame(t))
            if t == 5:
                session.prompt_object(goal.object_id, pointed(5))
        assert 5 in session._streams[""].tracker.memory.anchor_steps(0)

    def test_a_sentence_for_a_model_without_a_reasoner_is_explained(self) -> None:
        video, session = Video([moving_square()]), Session(small_config(), FakeStages(), NoReasoner())
        session.set_goal("red")
        (found,) = session.step(video.frame(0)).objects
        assert "understands no sentences" in found.message
