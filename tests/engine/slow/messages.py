# SPDX-License-Identifier: Apache-2.0
"""Small requests and answers for the tests of what carries them."""

import numpy as np

from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest


def request_of(
    sentence: str = "the red ball",
    request_id: int = 1,
    goal_id: str = "goal",
    *,
    epoch: int = 0,
    frames: int = 3,
    side: int = 4,
    wants_words: bool = False,
) -> ReasonerRequest:
    clip = Clip(
        steps=np.arange(frames, dtype=np.int64),
        stamps_ns=np.arange(frames, dtype=np.int64) * 100,
        frames_rgb_u8=np.zeros((frames, side, side, 3), np.uint8),
        fusion=np.zeros((frames, 2, side, side), np.float16),
    )
    return ReasonerRequest(request_id, epoch, goal_id, sentence, clip, wants_words)


def answer_to(request: ReasonerRequest, error: str = "") -> ReasonerAnswer:
    if request.wants_words and not error:
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, (), words=f"{request.sentence}: yes")
    frames = zip(request.clip.steps.tolist(), request.clip.stamps_ns.tolist(), strict=True)
    prompts = tuple(Prompt(step, stamp_ns, np.full((2, 3), step, np.float32)) for step, stamp_ns in frames)
    return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, () if error else prompts, error)
