# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.slow.anchors import (
    Action,
    AnchorEvidence,
    Claim,
    Decision,
    Dispute,
    Situation,
    decide,
    nearest_prompt,
    select_anchors,
)
from virst_engine.types import ObjectState, Prompt

AGREES, DIFFERS = AnchorEvidence(True, True, 0.8), AnchorEvidence(True, True, 0.1)
UNKNOWN, ABSENT = AnchorEvidence(True, True, None), AnchorEvidence(True, False, None)
DOUBTED, DOUBTED_AGREES = replace(UNKNOWN, is_believed=False), replace(AGREES, is_believed=False)
DOUBTED_DIFFERS = replace(DIFFERS, is_believed=False)
EVICTED, EVICTED_AGREES = AnchorEvidence(False, True, None), AnchorEvidence(False, True, 0.8)
CONFIDENT = Situation(ObjectState.TRACKING, is_visible=True, is_confident=True, is_settled=True)
UNSURE = replace(CONFIDENT, is_confident=False)
UNSETTLED = replace(CONFIDENT, is_settled=False)
CONTRADICTED = replace(CONFIDENT, dispute=Dispute(1))
SAID_ABSENT = replace(CONFIDENT, dispute=Dispute(1, says_absent=True))
HIDDEN = replace(CONTRADICTED, is_visible=False, is_confident=False)
LOST = replace(HIDDEN, state=ObjectState.LOST, dispute=Dispute())
LOST_UNSETTLED, LOST_DISPUTED = replace(LOST, is_settled=False), replace(LOST, dispute=Dispute(1))
UNSURE_SAID_ABSENT = replace(UNSURE, dispute=Dispute(1, says_absent=True))
KEPT = replace(CONTRADICTED, is_kept=True)
SEARCHING = replace(LOST, state=ObjectState.SEARCHING, is_settled=False)
NOT_FOUND = replace(SEARCHING, state=ObjectState.NOT_FOUND)


@pytest.mark.parametrize(
    ("dispute", "repeats", "expected"),
    [
        (Dispute(), False, Decision(Action.HOLD, (), Dispute(1), claimed=0)),
        (Dispute(1), True, Decision(Action.START_OVER, (0,))),
        (Dispute(1), False, Decision(Action.HOLD, (), Dispute(1), claimed=0)),
    ],
)
def test_what_was_not_found_is_believed_when_answers_agree(dispute: Dispute, repeats: bool, expected: Decision) -> None:
    situation = replace(NOT_FOUND, dispute=dispute)
    decision = decide([UNKNOWN], situation, agree_iou=0.5, overrule_answers=9, confirm_answers=2, repeats=repeats)
    assert decision == expected
    first = decide([UNKNOWN], SEARCHING, agree_iou=0.5, overrule_answers=9, confirm_answers=2)
    assert first.action is Action.START_OVER  # nobody has said yet that it is not there


def test_a_track_begins_with_what_is_surely_there_only() -> None:
    """The newest frame decides. What is tracked already goes on with less."""
    doubtful = [UNKNOWN, replace(UNKNOWN, is_sure=False)]
    for situation in (SEARCHING, replace(NOT_FOUND, dispute=Dispute(1))):
        assert decided(doubtful, situation) == Decision(Action.HOLD, (), situation.dispute)
        assert decided(doubtful[::-1], situation) == Decision(Action.START_OVER, (0, 1))
    assert decided([replace(DIFFERS, is_sure=False)], UNSETTLED) == Decision(Action.START_OVER, (0,))
    assert decided([replace(AGREES, is_sure=False)], CONFIDENT) == Decision(Action.INSERT, (0,))


def decided(evidence: list[AnchorEvidence], situation: Situation, repeats: bool = True) -> Decision:
    return decide(evidence, situation, agree_iou=0.5, overrule_answers=2, repeats=repeats)


@pytest.mark.parametrize(
    ("evidence", "situation", "expected"),
    [
        ([AGREES, AGREES], CONFIDENT, Decision(Action.INSERT, (0, 1))),
        ([AGREES], CONTRADICTED, Decision(Action.INSERT, (0,))),  # and the count starts again
        ([DIFFERS, AGREES], CONFIDENT, Decision(Action.INSERT, (1,))),  # the newest decides, only it joins
        ([UNKNOWN, AGREES], CONFIDENT, Decision(Action.INSERT, (1,))),  # nobody knows what the older one shows
        ([AGREES, UNKNOWN], CONFIDENT, Decision(Action.INSERT, (0, 1))),
        ([UNKNOWN], CONTRADICTED, Decision(Action.KEEP, (), Dispute(1))),  # of a time before the track
        ([UNKNOWN], UNSETTLED, Decision(Action.START_OVER, (0,))),
        ([EVICTED_AGREES], CONTRADICTED, Decision(Action.INSERT, (0,))),  # nothing to replay, so nothing is missing
        ([AGREES, ABSENT], CONFIDENT, Decision(Action.INSERT, (0,))),
        ([AGREES, DIFFERS], CONFIDENT, Decision(Action.HOLD, (), Dispute(1), claimed=1)),
        ([AGREES, DIFFERS], CONTRADICTED, Decision(Action.START_OVER, (0, 1))),
        ([DIFFERS], UNSURE, Decision(Action.HOLD, (), Dispute(1), claimed=0)),
        # What a later answer has confirmed: no number of answers takes it away while it is seen.
        ([DIFFERS], KEPT, Decision(Action.HOLD, (), Dispute(2), claimed=0)),
        ([AGREES], KEPT, Decision(Action.INSERT, (0,))),
        ([ABSENT], replace(SAID_ABSENT, is_kept=True), Decision(Action.HOLD)),  # seen well: that does not add up ...
        ([ABSENT], replace(UNSURE, is_kept=True), Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT], replace(UNSURE_SAID_ABSENT, is_kept=True), Decision(Action.DECLARE_ABSENT)),  # ... where both doubt
        ([DIFFERS], replace(LOST_DISPUTED, is_kept=True), Decision(Action.START_OVER, (0,))),
        ([DIFFERS], UNSETTLED, Decision(Action.START_OVER, (0,))),
        ([ABSENT, ABSENT], CONFIDENT, Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT, ABSENT], SAID_ABSENT, Decision(Action.HOLD, (), Dispute(2, True))),  # we see it well
        ([ABSENT, ABSENT], UNSURE_SAID_ABSENT, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT, ABSENT], CONTRADICTED, Decision(Action.HOLD, (), Dispute(1, True))),  # they say different things
        ([DIFFERS], SAID_ABSENT, Decision(Action.HOLD, (), Dispute(1), claimed=0)),
        ([ABSENT], UNSETTLED, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT], UNSURE, Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT], LOST, Decision(Action.KEEP)),
        ([ABSENT], LOST_UNSETTLED, Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT], replace(LOST_UNSETTLED, dispute=Dispute(1, True)), Decision(Action.DECLARE_ABSENT)),
        ([ABSENT], HIDDEN, Decision(Action.KEEP, (), Dispute(1))),
        ([ABSENT], SEARCHING, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT], NOT_FOUND, Decision(Action.DECLARE_ABSENT)),
        ([DIFFERS, DIFFERS], LOST, Decision(Action.HOLD, (), Dispute(1), claimed=1)),
        ([DIFFERS, DIFFERS], LOST_DISPUTED, Decision(Action.START_OVER, (0, 1))),
        ([DIFFERS, DIFFERS], LOST_UNSETTLED, Decision(Action.START_OVER, (0, 1))),
        ([AGREES], LOST, Decision(Action.INSERT, (0,))),  # asked while it was still seen
        ([UNKNOWN, UNKNOWN], SEARCHING, Decision(Action.START_OVER, (0, 1))),
        ([UNKNOWN, ABSENT], SEARCHING, Decision(Action.START_OVER, (0,))),
        ([UNKNOWN], NOT_FOUND, Decision(Action.START_OVER, (0,))),
        ([EVICTED, UNKNOWN], SEARCHING, Decision(Action.START_OVER, (0, 1))),
        ([EVICTED], SEARCHING, Decision(Action.JUMP, (0,))),
        ([EVICTED], NOT_FOUND, Decision(Action.JUMP, (0,))),
        ([EVICTED], CONTRADICTED, Decision(Action.ASK_AGAIN, (), Dispute(1))),
        ([EVICTED], LOST, Decision(Action.ASK_AGAIN)),
        # What the reasoner does not believe itself begins nothing, takes nothing away that its prompt agrees with, ...
        ([DOUBTED, DOUBTED], SEARCHING, Decision(Action.DECLARE_ABSENT)),
        ([DOUBTED, UNKNOWN], SEARCHING, Decision(Action.START_OVER, (1,))),
        ([DOUBTED_AGREES, DOUBTED_AGREES], CONFIDENT, Decision(Action.KEEP)),
        ([AGREES, DOUBTED_AGREES], CONTRADICTED, Decision(Action.KEEP, (), Dispute(1))),
        ([DOUBTED_AGREES], UNSETTLED, Decision(Action.KEEP)),
        ([DOUBTED_AGREES], UNSURE_SAID_ABSENT, Decision(Action.KEEP, (), Dispute(1, True))),
        ([DOUBTED_AGREES, AGREES], CONFIDENT, Decision(Action.INSERT, (1,))),
        # ... and says that it is not there where its prompt finds something else.
        ([DOUBTED_DIFFERS], CONFIDENT, Decision(Action.HOLD, (), Dispute(1, True))),
        ([DOUBTED_DIFFERS], UNSURE_SAID_ABSENT, Decision(Action.DECLARE_ABSENT)),
        ([DOUBTED_DIFFERS], UNSETTLED, Decision(Action.DECLARE_ABSENT)),
        ([DOUBTED_DIFFERS], LOST, Decision(Action.KEEP)),
        ([], CONTRADICTED, Decision(Action.ASK_AGAIN, (), Dispute(1))),
        ([], SEARCHING, Decision(Action.ASK_AGAIN)),
    ],
)
def test_what_an_answer_means(evidence: list[AnchorEvidence], situation: Situation, expected: Decision) -> None:
    assert decided(evidence, situation) == expected


def test_as_many_answers_as_configured_must_disagree_in_a_row() -> None:
    dispute, actions = Dispute(), []
    for _ in range(3):
        situation = replace(CONFIDENT, dispute=dispute)
        decision = decide([DIFFERS], situation, agree_iou=0.5, overrule_answers=3, repeats=True)
        dispute = decision.dispute
        actions.append(decision.action)
    assert actions == [Action.HOLD, Action.HOLD, Action.START_OVER]


@pytest.mark.parametrize("situation", [CONTRADICTED, UNSURE, LOST_DISPUTED, HIDDEN])
def test_answers_that_point_at_different_things_do_not_add_up(situation: Situation) -> None:
    assert decided([DIFFERS], situation, repeats=False) == Decision(Action.HOLD, (), Dispute(1), claimed=0)


def square(y: int, x: int, side: int = 4) -> np.ndarray:
    mask = np.zeros((32, 32), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "later_s", "is_same"),
    [
        (square(8, 8), 0.0, True),
        (square(8, 8), 60.0, True),  # it stands still
        (square(8, 10), 0.0, True),  # half its size away
        (square(8, 11), 0.0, False),
        (square(8, 11), 0.2, True),  # it moves
        (square(8, 13), 0.2, False),
        (square(8, 13), 60.0, False),  # beyond its own size there may be a neighbour
        (square(20, 20), 0.0, False),
        (square(7, 7, side=6), 0.0, False),  # more than twice as large: something that it is a part of
        (square(0, 0, side=0), 0.0, False),
    ],
)
def test_when_two_claims_mean_the_same_thing(mask: np.ndarray, later_s: float, is_same: bool) -> None:
    claim = Claim(10**9, square(8, 8))
    assert claim.is_repeated_by(mask, 10**9 + round(later_s * 1e9), agree_iou=0.5) is is_same


def test_the_nearest_prompt_in_time_is_the_newest_of_its_kind() -> None:
    prompts = [Prompt(step, 10 * step, np.zeros((1, 2), np.float32)) for step in (0, 3, 5)]
    assert [nearest_prompt(prompts, stamp_ns).step for stamp_ns in (-5, 14, 40, 60)] == [0, 0, 5, 5]


@pytest.mark.parametrize(
    ("steps", "anchors"),
    [
        ([0, 3, 6, 9, 12, 15, 18, 21], [0, 21]),
        ([0, 0, 0, 0, 0, 0, 2, 5], [0, 5]),
        ([4] * 8, [4]),
        ([0, 1, 2, 3], [3]),
        ([7], [7]),
        (list(range(32)), [0, 4, 9, 13, 18, 22, 27, 31]),  # the published numbers for T = 32
    ],
)
def test_anchors_are_spread_over_the_clip_and_end_in_the_newest(steps: list[int], anchors: list[int]) -> None:
    prompts = [Prompt(step, 10 * step, np.zeros((1, 2), np.float32)) for step in steps]
    assert [prompt.step for prompt in select_anchors(prompts)] == anchors
