# SPDX-License-Identifier: Apache-2.0
"""What an answer of the reasoner means for an object that may be tracked already. Decisions only, no tensors.

The target of a goal is what the sentence meant when it was said. A refreshed answer is computed on another window of
frames, so it may point elsewhere by mistake, or because what the words tell ("the one that moved first") has left the
window. So an object that an answer with a full window has settled is given up only for several answers in a row that
all point at the same other thing, whether it is seen or hidden: a hidden object comes back by its memory. While one is
seen that a later answer has confirmed, it is not given up at all: from then on it is likelier that the words have lost
their meaning than that it was the wrong one, and in minutes of a stream any number of answers in a row comes about.
That there is no such object is believed of a settled one only while the segmenter doubts it too. An object that is not
settled has nothing to lose and takes every answer at once. Where nothing is tracked, both must be sure, the reasoner
that the sentence means something here and the segmenter of what the prompt shows, surer than to go on with it later,
and several answers in a row must find the same thing if the last one said that there is none: a goal that is not there
is asked about again and again, and one mistake would show a mask. A doubt of the reasoner takes no track away with
which its own prompt agrees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from jaxtyping import Bool

from virst_engine.types import ObjectState, Prompt

OWN_SIZES_PER_S = 2.0  # how fast an object may move, in its own sizes, for two masks to be of the same one


class Action(Enum):
    INSERT = auto()  # agrees: remember the anchors, go on
    START_OVER = auto()  # new, or overruled: anchors only, replayed from their frame to now
    HOLD = auto()  # disagrees with a settled object: count it
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
    is_sure: bool = True  # decoder and reasoner are sure enough to begin with it
    is_believed: bool = True  # the reasoner thinks that the target is in this frame


@dataclass(frozen=True)
class Dispute:
    """Answers in a row that contradict the track and say the same: it is that other thing, or it is nowhere."""

    answers: int = 0
    says_absent: bool = False

    def with_one_more(self, says_absent: bool, repeats: bool) -> "Dispute":
        """`repeats`: the new answer points at what the last one pointed at (needless where both say absent)."""
        says_the_same = says_absent == self.says_absent and (says_absent or repeats)
        return Dispute(self.answers + 1 if says_the_same else 1, says_absent)


@dataclass(frozen=True, eq=False)
class Claim:
    """Where an answer that contradicts the track sees the object."""

    stamp_ns: int
    mask: Bool[np.ndarray, "hm wm"]

    def is_repeated_by(self, mask: Bool[np.ndarray, "hm wm"], stamp_ns: int, agree_iou: float) -> bool:
        """Whether a later answer's mask, in this frame or one near in time, is of the same object.

        It is when the masks overlap by `agree_iou`, or when they are as alike in area as that and their centres at most
        as far apart as the object could have moved: half its size and OWN_SIZES_PER_S more, but never more than its
        size, because there the neighbour begins.
        """
        area, other = int(self.mask.sum()), int(mask.sum())
        if min(area, other) == 0:
            return False
        if int((self.mask & mask).sum()) >= agree_iou * int((self.mask | mask).sum()):
            return True
        apart_px = float(np.linalg.norm(np.argwhere(self.mask).mean(axis=0) - np.argwhere(mask).mean(axis=0)))
        sizes = min(0.5 + OWN_SIZES_PER_S * abs(stamp_ns - self.stamp_ns) / 1e9, 1.0)
        return min(area, other) >= agree_iou * max(area, other) and apart_px <= sizes * min(area, other) ** 0.5


@dataclass(frozen=True)
class Situation:
    """What is known of the object when the answer comes."""

    state: ObjectState
    is_visible: bool  # seen in the newest frame
    is_confident: bool  # and well enough to be remembered
    is_settled: bool  # tracked by an answer that saw a full window
    dispute: Dispute = Dispute()
    is_kept: bool = False  # settled, and confirmed by as many later answers as it takes


@dataclass(frozen=True)
class Decision:
    action: Action
    chosen: tuple[int, ...] = ()  # positions in the evidence, oldest first
    dispute: Dispute = Dispute()  # from now on
    claimed: int | None = None  # position of the anchor that the answer adds to the dispute


def anchor_count(clip_frames: int) -> int:
    """K = max(1, T // 4) (Algorithm 2)."""
    return max(1, clip_frames // 4)


def anchor_steps(steps: Sequence[int]) -> list[int]:
    """The K of the clip's frames that anchors are made of: evenly spread, ending in the newest; no frame twice."""
    # From the newest: it is the only one if K = 1.
    positions = np.linspace(len(steps) - 1, 0, anchor_count(len(steps))).round().astype(int).tolist()
    return sorted({steps[position] for position in positions})


def select_anchors(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of the `anchor_steps`, oldest first."""
    by_step = {prompt.step: prompt for prompt in prompts}
    return [by_step[step] for step in anchor_steps([prompt.step for prompt in prompts])]


def nearest_prompt(prompts: Sequence[Prompt], stamp_ns: int) -> Prompt:
    """The prompt whose frame is nearest in time; the newer of two equally near ones."""
    return min(reversed(prompts), key=lambda prompt: abs(prompt.stamp_ns - stamp_ns))


def decide(
    evidence: Sequence[AnchorEvidence],
    situation: Situation,
    *,
    agree_iou: float,
    overrule_answers: int,
    confirm_answers: int = 1,
    repeats: bool = False,
) -> Decision:
    """What to do with one answer.

    Args:
        evidence: the anchors whose features are still there, oldest first; empty when all of them are gone.
        repeats: the answer points at what the last one pointed at that contradicted the track.
    """
    is_known = situation.state in (ObjectState.TRACKING, ObjectState.LOST)
    if not evidence:
        return Decision(Action.ASK_AGAIN, dispute=situation.dispute)

    seen = [e for e in evidence if e.is_present]
    if is_known and seen and not seen[-1].is_believed and (seen[-1].agreement or 0.0) >= agree_iou:
        return Decision(Action.KEEP, dispute=situation.dispute)
    present = [i for i, e in enumerate(evidence) if e.is_present and e.is_believed]
    dispute = situation.dispute.with_one_more(not present, repeats)
    is_overruled = not situation.is_settled or dispute.answers >= overrule_answers
    if not present:
        if is_known and not situation.is_visible:
            # Hidden is what we say already, and its memory is what finds it when it comes back.
            if situation.is_settled:
                return Decision(Action.KEEP, dispute=situation.dispute)
            if dispute.answers < overrule_answers:
                return Decision(Action.HOLD, dispute=dispute)
            return Decision(Action.DECLARE_ABSENT)
        is_protected = situation.is_settled and situation.is_confident
        if is_known and is_protected and situation.is_kept:
            return Decision(Action.HOLD)  # what is said while it is seen well does not count later
        if is_known and (is_protected or not is_overruled):
            return Decision(Action.HOLD, dispute=dispute)
        return Decision(Action.DECLARE_ABSENT)

    newest = present[-1]
    can_replay = evidence[newest].is_cached  # an older anchor joins whether it is cached or pinned
    if is_known:
        known = [agreement for i in present if (agreement := evidence[i].agreement) is not None]
        if known and known[-1] >= agree_iou:
            joining = [i for i in present if _may_join(evidence[i], i == newest, agree_iou)]
            return Decision(Action.INSERT, chosen=tuple(joining))
        if not can_replay:
            return Decision(Action.ASK_AGAIN, dispute=situation.dispute)
        if not known and situation.is_settled and situation.state is ObjectState.TRACKING:
            # What an answer says of frames before the track began alone contradicts nothing.
            return Decision(Action.KEEP, dispute=situation.dispute)
        if not is_overruled or (situation.is_kept and situation.state is ObjectState.TRACKING):
            return Decision(Action.HOLD, dispute=dispute, claimed=newest)
    if not is_known and not evidence[newest].is_sure:
        return Decision(Action.HOLD, dispute=situation.dispute)
    if situation.state is ObjectState.NOT_FOUND and dispute.answers < confirm_answers:
        return Decision(Action.HOLD, dispute=dispute, claimed=newest)
    if not can_replay:
        return Decision(Action.JUMP, chosen=(newest,))
    return Decision(Action.START_OVER, chosen=tuple(present))


def _may_join(evidence: AnchorEvidence, is_newest: bool, agree_iou: float) -> bool:
    # Of a frame before the track began nothing is known: an older anchor there may show anything.
    return is_newest if evidence.agreement is None else evidence.agreement >= agree_iou
