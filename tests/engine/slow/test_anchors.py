# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest

from virst_engine.slow.anchors import Action, AnchorEvidence, Decision, Dispute, Situation, decide, select_anchors
from virst_engine.types import ObjectState, Prompt

AGREES, DIFFERS = AnchorEvidence(True, True, 0.8), AnchorEvidence(True, True, 0.1)
UNKNOWN, ABSENT = AnchorEvidence(True, True, None), AnchorEvidence(True, False, None)
EVICTED = AnchorEvidence(False, True, None)
CONFIDENT = Situation(ObjectState.TRACKING, is_visible=True, is_confident=True, is_settled=True)
UNSURE = replace(CONFIDENT, is_confident=False)
UNSETTLED = replace(CONFIDENT, is_settled=False)
CONTRADICTED = replace(CONFIDENT, dispute=Dispute(1))
SAID_ABSENT = replace(CONFIDENT, dispute=Dispute(1, says_absent=True))
HIDDEN = replace(CONTRADICTED, is_visible=False, is_confident=False)
LOST = replace(HIDDEN, state=ObjectState.LOST, dispute=Dispute())
SEARCHING = replace(LOST, state=ObjectState.SEARCHING, is_settled=False)
NOT_FOUND = replace(SEARCHING, state=ObjectState.NOT_FOUND)


def decided(evidence: list[AnchorEvidence], situation: Situation) -> Decision:
    return decide(evidence, situation, agree_iou=0.5, overrule_answers=2)


@pytest.mark.parametrize(
    ("evidence", "situation", "expected"),
    [
        ([AGREES, AGREES], CONFIDENT, Decision(Action.INSERT, (0, 1))),
        ([AGREES], CONTRADICTED, Decision(Action.INSERT, (0,))),  # and the count starts again
        ([DIFFERS, AGREES], CONFIDENT, Decision(Action.INSERT, (1,))),  # the newest decides, only it joins
        ([UNKNOWN, AGREES], CONFIDENT, Decision(Action.INSERT, (0, 1))),
        ([AGREES, ABSENT], CONFIDENT, Decision(Action.INSERT, (0,))),
        ([AGREES, DIFFERS], CONFIDENT, Decision(Action.HOLD, (), Dispute(1))),
        ([AGREES, DIFFERS], CONTRADICTED, Decision(Action.START_OVER, (0, 1))),
        ([DIFFERS], UNSURE, Decision(Action.START_OVER, (0,))),
        ([DIFFERS], UNSETTLED, Decision(Action.START_OVER, (0,))),
        ([ABSENT, ABSENT], CONFIDENT, Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT, ABSENT], SAID_ABSENT, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT, ABSENT], CONTRADICTED, Decision(Action.HOLD, (), Dispute(1, True))),  # they say different things
        ([DIFFERS], SAID_ABSENT, Decision(Action.HOLD, (), Dispute(1))),
        ([ABSENT], UNSETTLED, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT], UNSURE, Decision(Action.HOLD, (), Dispute(1, True))),
        ([ABSENT], LOST, Decision(Action.KEEP)),
        ([ABSENT], HIDDEN, Decision(Action.KEEP, (), Dispute(1))),
        ([ABSENT], SEARCHING, Decision(Action.DECLARE_ABSENT)),
        ([ABSENT], NOT_FOUND, Decision(Action.DECLARE_ABSENT)),
        ([DIFFERS, DIFFERS], LOST, Decision(Action.START_OVER, (0, 1))),
        ([AGREES], LOST, Decision(Action.INSERT, (0,))),  # asked while it was still seen
        ([UNKNOWN, UNKNOWN], SEARCHING, Decision(Action.START_OVER, (0, 1))),
        ([UNKNOWN, ABSENT], SEARCHING, Decision(Action.START_OVER, (0,))),
        ([UNKNOWN], NOT_FOUND, Decision(Action.START_OVER, (0,))),
        ([EVICTED, UNKNOWN], SEARCHING, Decision(Action.START_OVER, (1,))),
        ([EVICTED], SEARCHING, Decision(Action.JUMP, (0,))),
        ([EVICTED], NOT_FOUND, Decision(Action.JUMP, (0,))),
        ([EVICTED], CONTRADICTED, Decision(Action.ASK_AGAIN, (), Dispute(1))),
        ([EVICTED], LOST, Decision(Action.ASK_AGAIN)),
        ([], CONTRADICTED, Decision(Action.ASK_AGAIN, (), Dispute(1))),
        ([], SEARCHING, Decision(Action.ASK_AGAIN)),
    ],
)
def test_what_an_answer_means(evidence: list[AnchorEvidence], situation: Situation, expected: Decision) -> None:
    assert decided(evidence, situation) == expected


def test_as_many_answers_as_configured_must_disagree_in_a_row() -> None:
    dispute, actions = Dispute(), []
    for _ in range(3):
        decision = decide([DIFFERS], replace(CONFIDENT, dispute=dispute), agree_iou=0.5, overrule_answers=3)
        dispute = decision.dispute
        actions.append(decision.action)
    assert actions == [Action.HOLD, Action.HOLD, Action.START_OVER]


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
