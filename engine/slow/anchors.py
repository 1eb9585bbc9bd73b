# SPDX-License-Identifier: Apache-2.0
"""What an answer of the reasoner means for an object that may be tracked already. Decisions only, no tensors.

The target of a goal is what the sentence meant when it was said. A refreshed answer is computed on another window of
frames, so it may point elsewhere by mistake or because the words fit something else by now; one such answer does not
take a confident track away. An object that is not tracked has nothing to lose and takes every answer at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from virst_engine.types import ObjectState, Prompt


class Action(Enum):
    INSERT = auto()  # agrees: remember the anchors, go on
    START_OVER = auto()  # new, or overruled: anchors only, replayed from their frame to now
    HOLD = auto()  # disagrees with a confident track: count it
    DECLARE_ABSENT = auto()  # no such object: forget what is remembered
    KEEP = auto()  # says what is known already
    JUMP = auto()  # the frame was evicted and nothing else is known: use the anchor as it is, ask again
    ASK_AGAIN = auto()  # the frame was evicted


@dataclass(frozen=True)
class AnchorEvidence:
    """One anchor of the answer, decoded on its own frame."""

    is_cached: bool  # the frames since then can be replayed
    is_present: bool  # the decoder sees an object there
    agreement: float | None  # IoU with the mask believed there, 0 where the object was believed hidden; None: unknown


@dataclass(frozen=True)
class Dispute:
    """Answers in a row that contradict the track and say the same: it is elsewhere, or there is no such object."""

    answers: int = 0
    says_absent: bool = False

    def with_one_more(self, says_absent: bool) -> "Dispute":
        return Dispute(self.answers + 1 if says_absent == self.says_absent else 1, says_absent)


@dataclass(frozen=True)
class Situation:
    """What is known of the object when the answer comes."""

    state: ObjectState
    is_visible: bool  # seen in the newest frame
    is_confident: bool  # and well enough to be remembered
    is_settled: bool  # tracked by an answer that saw a full window
    dispute: Dispute = Dispute()


@dataclass(frozen=True)
class Decision:
    action: Action
    chosen: tuple[int, ...] = ()  # positions in the evidence, oldest first
    dispute: Dispute = Dispute()  # from now on


def select_anchors(prompts: Sequence[Prompt]) -> list[Prompt]:
    """K = max(1, T // 4) of the clip's prompts, evenly spread, ending in the newest (Algorithm 2); no frame twice."""
    last, count = len(prompts) - 1, max(1, len(prompts) // 4)
    positions = np.linspace(last, 0, count).round().astype(int).tolist()  # from the newest: it is the only one if K = 1
    by_step = {prompts[position].step: prompts[position] for position in positions}
    return [by_step[step] for step in sorted(by_step)]


def decide(
    evidence: Sequence[AnchorEvidence], situation: Situation, *, agree_iou: float, overrule_answers: int
) -> Decision:
    """What to do with one answer.

    Args:
        evidence: the anchors whose features are still there, oldest first; empty when all of them are gone.
    """
    is_tracking = situation.state is ObjectState.TRACKING
    is_lost = situation.state is ObjectState.LOST
    if not evidence:
        return Decision(Action.ASK_AGAIN, dispute=situation.dispute)

    present = [i for i, e in enumerate(evidence) if e.is_present]
    dispute = situation.dispute.with_one_more(says_absent=not present)
    is_overruled = not situation.is_settled or dispute.answers >= overrule_answers
    if not present:
        if (is_tracking or is_lost) and not situation.is_visible:
            # Hidden is what we say already, and its memory is what finds it when it comes back.
            return Decision(Action.KEEP, dispute=situation.dispute)
        if is_tracking and not is_overruled:
            return Decision(Action.HOLD, dispute=dispute)
        return Decision(Action.DECLARE_ABSENT)

    cached = [i for i in present if evidence[i].is_cached]
    if not cached:
        if is_tracking or is_lost:
            return Decision(Action.ASK_AGAIN, dispute=situation.dispute)
        return Decision(Action.JUMP, chosen=(present[-1],))

    if is_tracking or is_lost:
        known = [evidence[i].agreement for i in cached if evidence[i].agreement is not None]
        agrees = bool(known) and known[-1] >= agree_iou  # type: ignore[operator]  # None is filtered out above
        if agrees:
            return Decision(Action.INSERT, chosen=tuple(i for i in cached if _may_join(evidence[i], agree_iou)))
        if is_tracking and situation.is_confident and not is_overruled:
            return Decision(Action.HOLD, dispute=dispute)
    return Decision(Action.START_OVER, chosen=tuple(cached))


def _may_join(evidence: AnchorEvidence, agree_iou: float) -> bool:
    return evidence.agreement is None or evidence.agreement >= agree_iou
