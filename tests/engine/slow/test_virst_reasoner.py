# SPDX-License-Identifier: Apache-2.0
"""The method `virst` on a small model: a prompt per frame, and clips that are encoded once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.model.small_models import SMALL, small_virst
from virst_engine.errors import BadGoal
from virst_engine.slow.virst_reasoner import VirstReasoner
from virst_engine.types import Clip, ReasonerRequest
from virst_engine.weights import stages_of


@pytest.fixture(scope="module")
def model():
    return small_virst()


def request_for(model, seed, sentence="the red ball"):
    rng = np.random.default_rng(seed)
    frames = 4
    with torch.inference_mode():
        features = stages_of(model).image_encoder(torch.zeros(1, 3, 64, 64))
    shape = (frames, *features.fusion.shape[1:])
    clip = Clip(
        steps=np.arange(frames, dtype=np.int64),
        stamps_ns=np.arange(frames, dtype=np.int64) * 100_000_000,
        frames_rgb_u8=rng.integers(0, 256, (frames, SMALL.video.image_size, SMALL.video.image_size, 3), dtype=np.uint8),
        fusion=rng.normal(size=shape).astype(np.float16),
    )
    return ReasonerRequest(1, 0, "goal", sentence, clip)


def embeddings(answer):
    return np.stack([prompt.embeddings for prompt in answer.prompts])


def test_one_prompt_per_frame_of_the_clip(model):
    request = request_for(model, 0)
    answer = VirstReasoner(model).answer(request)
    assert [prompt.step for prompt in answer.prompts] == request.clip.steps.tolist()
    assert [prompt.stamp_ns for prompt in answer.prompts] == request.clip.stamps_ns.tolist()
    assert {"encode_clip", "language", "total"} <= set(answer.timings_ms)


def test_goals_that_share_a_clip_have_it_encoded_once(model, monkeypatch):
    encoded = []
    encode = model.encode_clip
    monkeypatch.setattr(model, "encode_clip", lambda *clip: encoded.append(1) or encode(*clip))
    reasoner = VirstReasoner(model)
    request = request_for(model, 0)
    first = reasoner.answer(request)
    same_clip_as_it_comes_over_the_wire = replace(
        request.clip, frames_rgb_u8=request.clip.frames_rgb_u8.copy(), fusion=request.clip.fusion.copy()
    )
    again = reasoner.answer(replace(request, goal_id="other", clip=same_clip_as_it_comes_over_the_wire))
    assert len(encoded) == 1
    assert np.array_equal(embeddings(first), embeddings(again))


def test_another_clip_is_encoded_anew(model):
    reasoner = VirstReasoner(model)
    reasoner.answer(request_for(model, 0))
    after = reasoner.answer(request_for(model, 1))
    alone = VirstReasoner(model).answer(request_for(model, 1))
    assert np.array_equal(embeddings(after), embeddings(alone))
    assert not np.array_equal(embeddings(after), embeddings(reasoner.answer(request_for(model, 0))))


def test_without_second_fusion_every_frame_has_the_same_prompt(model):
    rows = embeddings(VirstReasoner(model, second_fusion=False).answer(request_for(model, 0)))
    assert all(np.array_equal(row, rows[0]) for row in rows)
    fused = embeddings(VirstReasoner(model).answer(request_for(model, 0)))
    assert not np.array_equal(fused[0], fused[1])


def test_a_sentence_without_a_known_word_is_refused(model):
    with pytest.raises(BadGoal):
        VirstReasoner(model).answer(request_for(model, 0, "xyzzy plugh"))
