# SPDX-License-Identifier: Apache-2.0
"""A recorded video and sentences in, a result per frame out: as a robot would see it, or with the whole video known."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from virst_engine.backends.base import Stages
from virst_engine.config import EngineConfig
from virst_engine.errors import VideoError
from virst_engine.session import Session
from virst_engine.slow.goals import GoalBook
from virst_engine.slow.reasoner import DelayedClient, Reasoner, refusal
from virst_engine.types import Frame, FrameResult, Goal, ObjectResult, ObjectState, ReasonerAnswer, ReasonerRequest
from virst_engine.video.offline import DYNAMIC, AnchorStrategy, FrameSource, camera_masks, propagate_whole_video

MEASURED_ANSWERS = 3


@dataclass(frozen=True)
class Segmented:
    """One frame of the video with what was found in it."""

    number: int
    frame: Frame
    result: FrameResult
    goals: tuple[Goal, ...]


def segment_stream(
    stages: Stages,
    reasoner: Reasoner,
    frames: Iterable[Frame],
    sentences: Sequence[str],
    config: EngineConfig,
    *,
    delay_s: float = 0.0,
) -> Iterator[Segmented]:
    """Causal: a mask knows its own frame and those before it. The goals are set with the first frame.

    Args:
        delay_s: how late answers are, in the video's time; 0: with the frame that asks. No frame is left out.

    Raises:
        BadGoal: a sentence that cannot be set, or more of them than `tracking.max_objects`.
        BadFrame: an image that cannot be used.
    """
    client = DelayedClient(reasoner, delay_s)
    with Session(config, stages, client) as session:
        for sentence in sentences:
            session.set_goal(sentence)
        for number, frame in enumerate(frames):
            client.advance(frame.stamp_ns)
            yield Segmented(number, frame, session.step(frame), session.goals())


def segment_offline(
    stages: Stages,
    reasoner: Reasoner,
    frames: FrameSource,
    sentences: Sequence[str],
    config: EngineConfig,
    *,
    strategy: AnchorStrategy = DYNAMIC,
) -> Iterator[Segmented]:
    """Whole video, as published (offline.py); frames come in the order in which they are computed.

    An object has no states here but TRACKING, where it is seen, and LOST.

    Raises:
        VirstError: as `segment_stream`, and when the reasoner cannot answer a sentence.
    """
    book = GoalBook(config.goal, config.tracking.max_objects)
    for number, sentence in enumerate(sentences, start=1):
        book.put(replace(book.prepare(sentence), instance_id=number))
    if not len(frames):
        raise VideoError("the recording has no frames; give another one")
    goals = book.goals()
    words = [goal.sentence for goal in goals]
    for seen in propagate_whole_video(stages, reasoner, frames, words, config, strategy=strategy):
        presence = torch.sigmoid(seen.prediction.object_score_logits.float()).tolist()
        iou = seen.prediction.iou.float().clamp(0.0, 1.0).tolist()
        objects = tuple(
            ObjectResult(
                object_id=goal.object_id,
                goal_id=goal.goal_id,
                instance_id=goal.instance_id,
                state=ObjectState.TRACKING if mask.any() else ObjectState.LOST,
                mask=mask,
                score=iou[i] * presence[i] if mask.any() else 0.0,
                prompt_age_s=float("inf"),
                reasoner_latency_s=float("nan"),
            )
            for i, (goal, mask) in enumerate(zip(goals, camera_masks(seen), strict=True))
        )
        result = FrameResult(seen.frame.stamp_ns, seen.number, seen.frame.camera, objects, seen.timings_ms)
        yield Segmented(seen.number, seen.frame, result, goals)


def measure_delay(stages: Stages, reasoner: Reasoner, frame: Frame, sentence: str, config: EngineConfig) -> float:
    """Seconds that the reasoner takes for one answer on this machine: the median of a few, the first one left out."""
    asked = _NotesRequest()
    for _ in segment_stream(stages, asked, [frame], [sentence], config):
        pass
    if asked.request is None:
        raise AssertionError("a goal without an answer is asked about in the first frame")
    spent_s = []
    for _ in range(MEASURED_ANSWERS + 1):
        begin_s = time.perf_counter()
        reasoner.answer(asked.request)
        spent_s.append(time.perf_counter() - begin_s)
    return float(np.median(spent_s[1:]))


class _NotesRequest:
    request: ReasonerRequest | None = None

    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        self.request = request
        return refusal(request, "only measured")
