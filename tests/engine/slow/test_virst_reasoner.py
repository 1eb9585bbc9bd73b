# SPDX-License-Identifier: Apache-2.0
"""The method `virst` behind the reasoner's one call: requests in, prompts for their frames out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.model.small_models import SMALL, small_virst, with_fusion
from virst_engine.errors import BadGoal, Unanswered, WeightsError
from virst_engine.model.config import VirstConfig
from virst_engine.model.pixels import normalise
from virst_engine.model.virst import ClipEncoding, Virst
from virst_engine.model.words import WordTokenizer
from virst_engine.slow.virst_reasoner import LONGEST_ANSWER_WORDS, LONGEST_GOAL_WORDS, VirstReasoner
from virst_engine.types import Clip, ReasonerRequest

T, N, C = 3, SMALL.fusion.st_tokens, SMALL.sam2.channels


@pytest.fixture(scope="module")
def model() -> Virst:
    return small_virst()


def request_of(sentence: str = "the red ball", *, frames: int = T, side: int = 64, grid: int = 16) -> ReasonerRequest:
    rng = np.random.default_rng(0)
    clip = Clip(
        steps=np.arange(10, 10 + 5 * frames, 5),
        stamps_ns=np.arange(frames) * 300_000_000,
        frames_rgb_u8=rng.integers(0, 255, (frames, side, side, 3), np.uint8),
        fusion=rng.normal(size=(frames, C, grid, grid)).astype(np.float16),
    )
    return ReasonerRequest(request_id=7, epoch=2, goal_id="g", sentence=sentence, clip=clip)


def first_prompt(reasoner: VirstReasoner, request: ReasonerRequest) -> np.ndarray:
    return reasoner.answer(request).prompts[0].embeddings


def test_every_frame_of_the_clip_gets_its_prompt_under_its_own_name(model: Virst) -> None:
    request = request_of()
    answer = VirstReasoner(model).answer(request)
    assert (answer.request_id, answer.epoch, answer.goal_id, answer.error) == (7, 2, "g", "")
    assert [prompt.step for prompt in answer.prompts] == [10, 15, 20]
    assert [prompt.stamp_ns for prompt in answer.prompts] == [0, 300_000_000, 600_000_000]
    for prompt in answer.prompts:
        assert prompt.embeddings.shape == (N, C)
        assert prompt.embeddings.dtype == np.float32
    assert answer.timings_ms["total"] == pytest.approx(answer.timings_ms["encode_clip"] + answer.timings_ms["language"])


def test_prompts_are_those_of_the_model(model: Virst) -> None:
    request = request_of("The big blue box!")
    answer = VirstReasoner(model).answer(request)
    text = torch.tensor([WordTokenizer(SMALL.words).encode("the big blue box")])
    with torch.no_grad():
        frames = normalise(torch.from_numpy(request.clip.frames_rgb_u8))[None]
        clip = model.encode_clip(frames, torch.from_numpy(request.clip.fusion).float()[None])
        expected = model.prompts(clip, torch.tensor([0]), text, torch.ones_like(text).bool()).prompts[0]
    for prompt, wanted in zip(answer.prompts, expected, strict=True):
        assert np.allclose(prompt.embeddings, wanted.numpy(), atol=1e-5)


def test_the_confidence_of_a_prompt_is_the_probability_of_presence_in_its_frame() -> None:
    model = small_virst(with_fusion(predicts_presence=True))
    model.occ_predictor.load_state_dict({"weight": torch.randn(1, C), "bias": torch.tensor([0.3])})
    request = request_of()
    answer = VirstReasoner(model).answer(request)
    tokens = torch.tensor([WordTokenizer(SMALL.words).encode(request.sentence)])
    with torch.no_grad():
        frames = normalise(torch.from_numpy(request.clip.frames_rgb_u8))[None]
        clip = model.encode_clip(frames, torch.from_numpy(request.clip.fusion).float()[None])
        output = model.prompts(clip, torch.tensor([0]), tokens, torch.ones_like(tokens).bool())
    expected = output.presence_logits[0].sigmoid().tolist()
    assert len(set(expected)) == T
    assert [prompt.confidence for prompt in answer.prompts] == pytest.approx(expected, abs=1e-5)
    by_hand = output.prompts[0].mean(1) @ model.occ_predictor.weight[0] + 0.3
    assert torch.allclose(output.presence_logits[0], by_hand.detach(), atol=1e-5)


def test_a_reasoner_that_was_not_taught_presence_leaves_it_to_the_decoder(model: Virst) -> None:
    """As the published checkpoint, whose `occ_predictor` was never trained; and without the fusion it reads."""
    taught = small_virst(with_fusion(predicts_presence=True))
    for reasoner in (VirstReasoner(model), VirstReasoner(taught, second_fusion=False)):
        assert [prompt.confidence for prompt in reasoner.answer(request_of()).prompts] == [1.0] * T


def test_the_same_request_gets_the_same_answer(model: Virst) -> None:
    reasoner = VirstReasoner(model.train())
    one, other = reasoner.answer(request_of()), reasoner.answer(request_of())
    assert not model.training
    for a, b in zip(one.prompts, other.prompts, strict=True):
        assert np.array_equal(a.embeddings, b.embeddings)


def test_the_request_is_left_as_it_is(model: Virst) -> None:
    request = request_of()
    for array in (request.clip.frames_rgb_u8, request.clip.fusion):
        array.flags.writeable = False  # as they come from the wire
    VirstReasoner(model).answer(request)


def test_goals_of_one_clip_share_its_encoding_and_another_clip_has_its_own(
    model: Virst, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = model.encode_clip, []

    def counted(frames: torch.Tensor, maps: torch.Tensor) -> ClipEncoding:
        encoded.append(frames)
        return encode(frames, maps)

    monkeypatch.setattr(model, "encode_clip", counted)
    reasoner = VirstReasoner(model)
    for sentence in ("the red ball", "the box"):
        shared = first_prompt(reasoner, request_of(sentence))  # an equal clip in new arrays, as from the wire
        assert np.array_equal(shared, first_prompt(VirstReasoner(model), request_of(sentence)))
    assert len(encoded) == 1 + 2
    encoded.clear()
    other = request_of()
    other.clip.frames_rgb_u8[1] = 9
    changed = first_prompt(reasoner, other)
    assert len(encoded) == 1
    assert not np.allclose(changed, first_prompt(reasoner, request_of()), atol=1e-3)
    assert len(encoded) == 2
    reasoner.answer(request_of("the can"))
    assert len(encoded) == 2


def test_without_second_fusion_all_frames_get_the_projected_tokens(model: Virst) -> None:
    ablated = VirstReasoner(model, second_fusion=False).answer(request_of())
    whole = VirstReasoner(model).answer(request_of())
    first = ablated.prompts[0].embeddings
    assert all(np.array_equal(prompt.embeddings, first) for prompt in ablated.prompts)
    assert not np.allclose(first, whole.prompts[0].embeddings, atol=1e-2)


@pytest.mark.parametrize("sentence", ["", "der rote Ball", "red " * (LONGEST_GOAL_WORDS + 1)])
def test_a_sentence_it_cannot_read_is_refused(model: Virst, sentence: str) -> None:
    with pytest.raises(BadGoal):
        VirstReasoner(model).answer(request_of(sentence))


@pytest.mark.parametrize("other", [{"side": 32}, {"grid": 8}])
def test_a_clip_of_another_model_is_refused(model: Virst, other: dict[str, int]) -> None:
    with pytest.raises(WeightsError, match=r"another model.*same weights"):
        VirstReasoner(model).answer(request_of(**other))


def test_a_clip_that_is_too_long_is_refused(model: Virst) -> None:
    longest = SMALL.video.max_frames
    reasoner = VirstReasoner(model)
    assert len(reasoner.answer(request_of(frames=longest)).prompts) == longest
    with pytest.raises(WeightsError, match=f"1 to {longest} frames, got {longest + 1}.*clip_frames"):
        reasoner.answer(request_of(frames=longest + 1))


@pytest.mark.parametrize(("level", "grid"), [(0, 16), (1, 8), (2, 4), (-1, 4), (-3, 16)])
def test_the_level_that_fusion_reads_sets_the_size_of_the_features(level: int, grid: int) -> None:
    config: VirstConfig = with_fusion(feature_level=level)
    reasoner = VirstReasoner(small_virst(config))
    assert len(reasoner.answer(request_of(grid=grid)).prompts) == T
    features = small_virst(config).seg_model.encode_image(torch.zeros(1, 3, 64, 64), level)
    assert features.fusion.shape[1:] == (C, grid, grid)
    with pytest.raises(WeightsError):
        reasoner.answer(request_of(grid=grid * 2))


def test_one_frame_is_a_clip(model: Virst) -> None:
    request = request_of(frames=1)
    assert len(VirstReasoner(model).answer(request).prompts) == 1


def test_a_question_is_answered_in_the_words_of_the_model(model: Virst) -> None:
    reasoner, tokenizer, request = VirstReasoner(model), WordTokenizer(SMALL.words), request_of()
    sentences = ("the red ball", "the big blue box", "is there the can")
    answers = [reasoner.answer(replace(request, sentence=each, wants_words=True)) for each in sentences]
    with torch.no_grad():
        frames = normalise(torch.from_numpy(request.clip.frames_rgb_u8))[None]
        clip = model.encode_clip(frames, torch.from_numpy(request.clip.fusion).float()[None])
        expected = [
            tokenizer.decode(model.answer_tokens(clip, torch.tensor([tokenizer.encode(each)]), LONGEST_ANSWER_WORDS))
            for each in sentences
        ]
    assert [answer.words for answer in answers] == expected
    for answer in answers:
        assert (answer.request_id, answer.epoch, answer.goal_id) == (7, 2, "g")
        assert (answer.prompts, answer.error) == ((), "")
        assert 1 <= len(answer.words.split()) <= LONGEST_ANSWER_WORDS
        assert set(answer.words.split()) <= set(SMALL.words)


def test_a_question_that_cannot_be_read_is_refused_in_the_words_of_goals(model: Virst) -> None:
    with pytest.raises(BadGoal, match="does not know 'drawer'"):
        VirstReasoner(model).answer(replace(request_of("is the drawer there"), wants_words=True))


def test_a_model_that_has_no_word_says_so() -> None:
    silent = small_virst()
    torch.nn.init.zeros_(silent.lm_head.weight)  # of words that are all as likely the first is taken, which is the end
    with pytest.raises(Unanswered, match="ask in other words"):
        VirstReasoner(silent).answer(replace(request_of(), wants_words=True))


def test_without_initial_fusion_the_video_does_not_reach_the_st_tokens_before_the_language_model(model: Virst) -> None:
    request = request_of()
    both, off = VirstReasoner(model), VirstReasoner(model, initial_fusion=False)
    tokens = torch.tensor([WordTokenizer(SMALL.words).encode(request.sentence)])
    with torch.no_grad():
        frames = normalise(torch.from_numpy(request.clip.frames_rgb_u8))[None]
        clip = model.encode_clip(frames, torch.from_numpy(request.clip.fusion).float()[None])
        clip = replace(clip, initial_tokens=None)
        expected = model.prompts(clip, torch.tensor([0]), tokens, torch.ones_like(tokens).bool()).prompts[0]
    assert np.allclose(first_prompt(off, request), expected[0].numpy(), atol=1e-5)
    assert not np.allclose(first_prompt(both, request), expected[0].numpy(), atol=1e-3)
