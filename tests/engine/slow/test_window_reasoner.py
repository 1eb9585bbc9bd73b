# SPDX-License-Identifier: Apache-2.0
"""The methods `visa` and `tempvrs` behind the reasoner's one call: a window in, prompts for chosen frames out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.model.test_window_methods import TEMPVRS, VISA, small
from virst_engine.errors import BadGoal, Unanswered, WeightsError
from virst_engine.model.pixels import normalise
from virst_engine.model.tempvrs import TempVrs
from virst_engine.model.visa import PERCENTAGES, Visa, reference_frames
from virst_engine.model.words import END
from virst_engine.slow.virst_reasoner import LONGEST_ANSWER_WORDS
from virst_engine.slow.window_reasoner import TempVrsReasoner, VisaReasoner, WindowReasoner
from virst_engine.types import Clip, ReasonerRequest

FRAMES, C = 10, VISA.prompt_channels


def request_of(sentence: str = "the red ball", *, frames: int = FRAMES, side: int = 64, seed: int = 0, words=False):
    rng = np.random.default_rng(seed)
    clip = Clip(
        steps=np.arange(100, 100 + frames),
        stamps_ns=np.arange(frames) * 100_000_000,
        frames_rgb_u8=rng.integers(0, 255, (frames, side, side, 3), np.uint8),
        fusion=np.zeros((frames, 1, 1, 1), np.float16),
    )
    return ReasonerRequest(7, 2, "g", sentence, clip, wants_words=words)


@pytest.fixture(scope="module", params=["visa", "tempvrs"])
def reasoner(request: pytest.FixtureRequest) -> WindowReasoner:
    return VisaReasoner(small(VISA)) if request.param == "visa" else TempVrsReasoner(small(TEMPVRS))


def seen(request: ReasonerRequest) -> torch.Tensor:
    return normalise(torch.from_numpy(request.clip.frames_rgb_u8))[None]


def always(visa: Visa, percentage: int) -> Visa:
    """Whose sampler gives one answer whatever it is asked."""
    with torch.no_grad():
        visa.sampler.percentage.weight.zero_()
        visa.sampler.percentage.bias.fill_(-50.0)
        visa.sampler.percentage.bias[percentage] = 50.0
    return visa


def test_an_answer_belongs_to_its_request(reasoner: WindowReasoner) -> None:
    answer = reasoner.answer(request_of())
    assert (answer.request_id, answer.epoch, answer.goal_id, answer.error) == (7, 2, "g", "")
    for prompt in answer.prompts:
        assert prompt.embeddings.shape == (1, C)
        assert prompt.embeddings.dtype == np.float32
        assert 0.0 < prompt.confidence < 1.0
        assert prompt.stamp_ns == (prompt.step - 100) * 100_000_000
    parts = [answer.timings_ms[name] for name in ("encode_clip", "choose_frames", "language")]
    assert answer.timings_ms["total"] == pytest.approx(sum(parts))


@pytest.mark.parametrize("percentage", [0, 33, 100])
def test_visa_answers_for_the_frame_that_its_sampler_chose(percentage: int) -> None:
    assert 0 <= percentage < PERCENTAGES
    visa, request = always(small(VISA), percentage), request_of()
    (prompt,) = VisaReasoner(visa).answer(request).prompts
    target = round(percentage / 100 * (FRAMES - 1))
    assert prompt.step == 100 + target
    text = torch.tensor([[4, 5, 7]])  # the red ball
    with torch.no_grad():
        chosen = torch.tensor([reference_frames(target, FRAMES, VISA.references, VISA.sampling)])
        valid = torch.ones_like(text, dtype=torch.bool)
        question = visa.question_about(visa.encode(seen(request)), torch.tensor([target]), chosen, text, valid)
        output = visa.prompts(question)
    np.testing.assert_allclose(prompt.embeddings, output.prompts[0].numpy(), atol=1e-5)
    assert prompt.confidence == pytest.approx(float(output.presence_logits[0].sigmoid()), abs=1e-5)


@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_tempvrs_answers_for_the_slow_frames_of_the_best_clips(top_k: int) -> None:
    model, request = small(TEMPVRS), request_of()
    prompts = TempVrsReasoner(model, top_k=top_k).answer(request).prompts
    text = torch.tensor([[4, 5, 7]])
    with torch.no_grad():
        visual = model.encode(seen(request))
        output = model.prompts(model.question_about(visual, text, torch.ones_like(text, dtype=torch.bool)))
    relevance = output.relevance_logits[0]
    best = sorted(relevance.topk(top_k or TEMPVRS.top_k).indices.tolist())
    assert [prompt.step for prompt in prompts] == [100 + 3 * clip for clip in best]
    for prompt, clip in zip(prompts, best, strict=True):
        np.testing.assert_allclose(prompt.embeddings, output.prompts[0, clip].numpy(), atol=1e-5)
        assert prompt.confidence == pytest.approx(float(relevance[clip].sigmoid()), abs=1e-5)


def test_more_clips_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="top_k must be 1 to 4"):
        TempVrsReasoner(small(TEMPVRS), top_k=5)


def test_goals_of_one_clip_share_what_is_seen(reasoner: WindowReasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    look_at = reasoner._look_at
    monkeypatch.setattr(reasoner, "_look_at", lambda frames: looked.append(1) or look_at(frames))
    first = reasoner.answer(request_of(seed=5))
    other = reasoner.answer(request_of("the blue box", seed=5))
    assert len(looked) == 1
    assert not np.allclose(first.prompts[0].embeddings, other.prompts[0].embeddings, atol=1e-4)
    reasoner.answer(request_of(seed=6))
    assert len(looked) == 2
    again = reasoner.answer(request_of(seed=5))
    np.testing.assert_allclose(again.prompts[0].embeddings, first.prompts[0].embeddings, atol=1e-6)


def test_a_question_is_answered_in_words(reasoner: WindowReasoner) -> None:
    answer = reasoner.answer(request_of("is the ball red", words=True))
    assert answer.prompts == ()
    assert 1 <= len(answer.words.split()) <= LONGEST_ANSWER_WORDS


@pytest.mark.parametrize("kind", ["visa", "tempvrs"])
def test_a_question_without_a_word_for_it_is_told(kind: str) -> None:
    model: Visa | TempVrs = small(VISA if kind == "visa" else TEMPVRS)
    model._likeliest_word = lambda hidden: END  # type: ignore[method-assign]
    found = VisaReasoner(model) if isinstance(model, Visa) else TempVrsReasoner(model)
    with pytest.raises(Unanswered, match="no word"):
        found.answer(request_of(words=True))


@pytest.mark.parametrize("shape", [{"frames": 8}, {"side": 32}])
def test_a_clip_of_another_method_is_refused(reasoner: WindowReasoner, shape: dict[str, int]) -> None:
    with pytest.raises(WeightsError, match=r"reads clips of 10 frames of 64 x 64.*reasoner\.method"):
        reasoner.answer(request_of(**shape))


def test_a_word_that_the_model_does_not_know_is_named(reasoner: WindowReasoner) -> None:
    with pytest.raises(BadGoal, match="'teapot'"):
        reasoner.answer(request_of("the red teapot"))


def test_padding_at_the_start_of_a_stream_is_a_window_like_any_other(reasoner: WindowReasoner) -> None:
    """The oldest frame stands for those that were never seen: an answer may name it, once."""
    request = request_of()
    clip = replace(
        request.clip,
        steps=np.maximum(request.clip.steps, 107),
        frames_rgb_u8=request.clip.frames_rgb_u8[np.maximum(np.arange(FRAMES), 7)],
    )
    prompts = reasoner.answer(replace(request, clip=clip)).prompts
    assert prompts
    assert {prompt.step for prompt in prompts} <= {107, 108, 109}
    steps = [prompt.step for prompt in prompts]
    assert steps == sorted(set(steps))
