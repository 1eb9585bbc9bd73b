# SPDX-License-Identifier: Apache-2.0
"""The full architecture as a reasoner: what it answers, and that a frame is encoded once while it is in the window."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.model.small_virst_7b import SMALL_7B, VOCABULARY, small_virst_7b, write_tokenizer
from virst_engine.errors import BadGoal, Unanswered, VirstError, WeightsError
from virst_engine.model.chat_tokenizer import ChatTokenizer
from virst_engine.model.pixels import normalise
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig, with_preset
from virst_engine.model.weights_folder import load_reasoner_model, write_folder
from virst_engine.slow.frame_window import FrameWindow
from virst_engine.slow.reasoner import InProcessClient, Reasoner
from virst_engine.slow.virst_7b_reasoner import (
    LONGEST_ANSWER_TOKENS,
    WINDOWS,
    Virst7bReasoner,
    arrange_short_clips,
    choose_seg_frames,
    frame_key,
)
from virst_engine.slow.wire import decode, encode
from virst_engine.types import Clip, ReasonerAnswer, ReasonerRequest

SIDE, GRID, N, C = 32, 4, 3, 32


def frame_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def clip_of(*steps: int, camera: str = "camera") -> Clip:
    fusion = [np.random.default_rng(1000 + step).standard_normal((C, GRID, GRID)) for step in steps]
    return Clip(
        steps=np.array(steps),
        stamps_ns=np.array(steps) * 1_000_000,
        frames_rgb_u8=np.stack([frame_of(step) for step in steps]),
        fusion=np.stack(fusion).astype(np.float16),
        camera=camera,
    )


def request_of(clip: Clip, sentence: str = "the red ball") -> ReasonerRequest:
    return ReasonerRequest(7, 2, "goal", sentence, clip)


class Counted(Virst7b):
    """Counts what goes through the encoders."""

    short_clips: int
    mapped_frames: int

    def encode_short_clips(self, frames: torch.Tensor) -> torch.Tensor:
        self.short_clips += len(frames)
        return super().encode_short_clips(frames)

    def encode_maps(self, fusion: torch.Tensor):  # type: ignore[no-untyped-def]
        self.mapped_frames += len(fusion)
        return super().encode_maps(fusion)


def counted(config: Virst7bConfig = SMALL_7B) -> Counted:
    model = small_virst_7b(config)
    model.__class__ = Counted
    assert isinstance(model, Counted)
    model.short_clips = model.mapped_frames = 0
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), VOCABULARY)


@pytest.fixture
def model() -> Iterator[Counted]:
    return counted()


@pytest.fixture
def reasoner(model: Counted, tokenizer: ChatTokenizer) -> Virst7bReasoner:
    return Virst7bReasoner(model, tokenizer)


def embeddings_of(answer: ReasonerAnswer) -> np.ndarray:
    return np.stack([prompt.embeddings for prompt in answer.prompts])


def test_every_frame_gets_a_prompt_that_names_it(reasoner: Virst7bReasoner) -> None:
    assert isinstance(reasoner, Reasoner)
    answer = reasoner.answer(request_of(clip_of(3, 5, 9, 12, 20)))
    assert (answer.request_id, answer.epoch, answer.goal_id, answer.error) == (7, 2, "goal", "")
    assert [prompt.step for prompt in answer.prompts] == [3, 5, 9, 12, 20]
    assert [prompt.stamp_ns for prompt in answer.prompts] == [step * 1_000_000 for step in (3, 5, 9, 12, 20)]
    assert embeddings_of(answer).shape == (5, N, C)
    assert embeddings_of(answer).dtype == np.float32
    assert {"video_encoder", "fusion_maps", "language_model", "total"} == answer.timings_ms.keys()


def test_the_answer_is_the_models_own(reasoner: Virst7bReasoner, model: Counted, tokenizer: ChatTokenizer) -> None:
    """One short clip is full, the other repeats its newest frame; everything at once, without any cache."""
    clip = clip_of(1, 2, 3, 4, 5, 6)
    answer = reasoner.answer(request_of(clip))
    frames = normalise(torch.from_numpy(clip.frames_rgb_u8))[[0, 1, 2, 3, 4, 5, 5, 5]].unflatten(0, (2, 4))
    with torch.inference_mode():
        visual = model.encode_short_clips(frames).flatten(0, 1)
        maps = model.encode_maps(torch.from_numpy(clip.fusion).float())
        expected = model.prompts(visual, maps, tokenizer.row("the red ball", N)).numpy()
    np.testing.assert_allclose(embeddings_of(answer), expected, atol=1e-4)


def test_sentences_and_frames_matter(reasoner: Virst7bReasoner) -> None:
    one = embeddings_of(reasoner.answer(request_of(clip_of(1, 2, 3, 4))))
    assert not np.allclose(one, embeddings_of(reasoner.answer(request_of(clip_of(1, 2, 3, 4), "a can"))), atol=1e-3)
    assert not np.allclose(one, embeddings_of(reasoner.answer(request_of(clip_of(1, 2, 3, 5)))), atol=1e-3)


def test_it_answers_over_the_wire_as_it_is(reasoner: Virst7bReasoner) -> None:
    request = decode([bytes(part) for part in encode(request_of(clip_of(1, 2, 3, 4)))])
    assert isinstance(request, ReasonerRequest)
    sent = decode([bytes(part) for part in encode(reasoner.answer(request))])
    assert isinstance(sent, ReasonerAnswer)
    np.testing.assert_array_equal(embeddings_of(sent), embeddings_of(reasoner.answer(request_of(clip_of(1, 2, 3, 4)))))


# --- what is encoded -----------------------------------------------------------------------------------------------


def test_another_sentence_about_the_same_clip_encodes_nothing(reasoner: Virst7bReasoner, model: Counted) -> None:
    reasoner.answer(request_of(clip_of(*range(8))))
    assert (model.short_clips, model.mapped_frames) == (2, 8)
    reasoner.answer(request_of(clip_of(*range(8)), "a can"))
    assert (model.short_clips, model.mapped_frames) == (2, 8)


def test_a_refresh_encodes_only_what_is_new(reasoner: Virst7bReasoner, model: Counted) -> None:
    """A window of 8 frames that moves on by 4: one short clip a refresh, as long as it runs."""
    for number, start in enumerate(range(0, 40, 4)):
        reasoner.answer(request_of(clip_of(*range(start, start + 8))))
        assert model.short_clips == 2 + number
        assert model.mapped_frames == 8 + 4 * number


def test_a_window_that_moves_frame_by_frame_makes_the_newest_short_clip_again(
    reasoner: Virst7bReasoner, model: Counted
) -> None:
    for number, start in enumerate(range(12)):
        reasoner.answer(request_of(clip_of(*range(start, start + 8))))
        assert model.short_clips == 2 + number  # never two for one new frame
        assert model.mapped_frames == 8 + number


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8, 11])
def test_what_is_kept_changes_no_answer(model: Counted, tokenizer: ChatTokenizer, stride: int) -> None:
    """A reasoner that has seen the windows before answers as one that only knows which short clips there are."""
    reasoner = Virst7bReasoner(model, tokenizer)
    for start in range(0, 5 * stride, stride):
        clip = clip_of(*range(start, start + 8))
        answer = embeddings_of(reasoner.answer(request_of(clip)))
        window = reasoner._windows[-1]
        assert window.visual.keys() == set(window.short_clips)  # and nothing older
        assert len(window.maps) == 8
        steps = {frame_key(frame_of(step)): step for step in range(start + 8)}
        shown = [[steps[key] for key in group] for group in window.short_clips]
        assert sorted({step for group in shown for step in group})[-8:] == list(range(start, start + 8))
        at = [[group[min(number, len(group) - 1)] for number in range(4)] for group in shown]
        frames = torch.from_numpy(np.stack([np.stack([frame_of(step) for step in group]) for group in at]))
        with torch.inference_mode():
            visual = model.encode_short_clips(normalise(frames)).flatten(0, 1)
            maps = model.encode_maps(torch.from_numpy(clip.fusion).float())
            expected = model.prompts(visual, maps, tokenizer.row("the red ball", N)).numpy()
        np.testing.assert_allclose(answer, expected, atol=1e-4)


def test_cameras_have_windows_of_their_own_and_old_ones_are_forgotten(
    reasoner: Virst7bReasoner, model: Counted
) -> None:
    for camera in ("left", "right"):
        reasoner.answer(request_of(clip_of(1, 2, 3, 4, camera=camera)))
    assert model.short_clips == 2
    reasoner.answer(request_of(clip_of(1, 2, 3, 4, camera="left")))
    assert model.short_clips == 2
    for number in range(WINDOWS + 5):
        reasoner.answer(request_of(clip_of(1, camera=str(number))))
    assert len(reasoner._windows) == WINDOWS
    reasoner.answer(request_of(clip_of(1, 2, 3, 4, camera="left")))
    assert model.short_clips == 2 + WINDOWS + 5 + 1


def test_steps_that_start_again_with_other_frames_are_other_frames(reasoner: Virst7bReasoner) -> None:
    clip = clip_of(1, 2, 3, 4)
    reasoner.answer(request_of(clip))
    other = replace(clip, frames_rgb_u8=255 - clip.frames_rgb_u8, fusion=-clip.fusion)
    fresh = Virst7bReasoner(small_virst_7b(), reasoner._tokenizer)
    np.testing.assert_allclose(
        embeddings_of(reasoner.answer(request_of(other))), embeddings_of(fresh.answer(request_of(other))), atol=1e-4
    )


def test_a_short_stream_that_repeats_its_oldest_frame_shows_it_once(reasoner: Virst7bReasoner, model: Counted) -> None:
    answer = reasoner.answer(request_of(clip_of(1, 1, 1, 1, 1, 2, 3)))
    assert [prompt.step for prompt in answer.prompts] == [1, 1, 1, 1, 1, 2, 3]
    shown_once = embeddings_of(reasoner.answer(request_of(clip_of(1, 2, 3))))
    np.testing.assert_allclose(embeddings_of(answer)[4:], shown_once, atol=1e-6)
    np.testing.assert_array_equal(embeddings_of(answer)[:5], embeddings_of(answer)[[4] * 5])
    assert (model.short_clips, model.mapped_frames) == (1, 3)


def test_robots_whose_cameras_have_one_name_do_not_push_each_other_out(
    reasoner: Virst7bReasoner, model: Counted, tokenizer: ChatTokenizer
) -> None:
    """Steps and stamps are equal, too; a pool does not say who asks."""
    for number, start in enumerate(range(0, 40, 4)):
        clips = [clip_of(*range(start, start + 8)) for _ in range(2)]
        clips[1] = replace(clips[1], frames_rgb_u8=255 - clips[1].frames_rgb_u8, fusion=-clips[1].fusion)
        answers = [embeddings_of(reasoner.answer(request_of(clip))) for clip in clips]
        assert model.short_clips == 2 * (2 + number)
        assert model.mapped_frames == 2 * (8 + 4 * number)
        assert not np.allclose(*answers, atol=1e-3)
    assert len(reasoner._windows) == 2
    alone = Virst7bReasoner(small_virst_7b(), tokenizer)
    for start in range(0, 40, 4):
        clip = clip_of(*range(start, start + 8))
        clip = replace(clip, frames_rgb_u8=255 - clip.frames_rgb_u8, fusion=-clip.fusion)
        expected = embeddings_of(alone.answer(request_of(clip)))
    np.testing.assert_allclose(answers[1], expected, atol=1e-4)


def test_a_live_stream_costs_few_frames_a_refresh_and_memory_stays_bounded(
    reasoner: Virst7bReasoner, model: Counted
) -> None:
    """A camera at 30 Hz with jitter, a refresh a second, clips of 16 frames: those of the grid and the newest."""
    rng = np.random.default_rng(3)
    window = FrameWindow(16, 0.3, on_grid=True)
    stamps = np.sort(np.arange(1800) / 30 + rng.uniform(-0.012, 0.012, 1800))
    spent: list[tuple[int, int]] = []
    for step, stamp_s in enumerate(stamps.tolist()):
        fusion = np.random.default_rng(1000 + step).standard_normal((C, GRID, GRID))
        window.push(step, round((5 + stamp_s) * 1e9), frame_of(step), fusion)
        if step % 30 == 29:
            before = model.short_clips, model.mapped_frames
            reasoner.answer(request_of(window.clip()))
            spent.append((model.short_clips - before[0], model.mapped_frames - before[1]))
            (kept,) = reasoner._windows
            assert len(kept.maps) <= 16
            assert len(kept.visual) == len(kept.short_clips) <= 6
    in_full = spent[6:]
    assert max(maps for _, maps in in_full) <= 5  # at most four cells of 0.3 s begin in a second; and the newest
    assert max(clips for clips, _ in in_full) <= 2  # of the four or five that the window has
    assert len(in_full) == 54


def keys(*numbers: int) -> list[bytes]:
    return [bytes([number]) for number in numbers]


def test_short_clips_are_arranged_anew_where_frames_came_in_between() -> None:
    before = arrange_short_clips([], keys(1, 2, 3, 4, 5, 6, 7, 8, 9), 4)
    assert [len(group) for group in before] == [4, 4, 1]
    moved = arrange_short_clips(before, keys(3, 4, 5, 6, 7, 8, 9, 10), 4)
    assert moved == [tuple(keys(1, 2, 3, 4)), tuple(keys(5, 6, 7, 8)), tuple(keys(9, 10))]
    assert arrange_short_clips(before, keys(5, 6, 7, 8, 9), 4)[0] == tuple(keys(5, 6, 7, 8))
    changed = arrange_short_clips(before, keys(1, 2, 20, 3, 4, 5), 4)
    assert changed == [tuple(keys(1, 2, 20, 3)), tuple(keys(4, 5))]
    assert arrange_short_clips(before, keys(1, 3, 5, 7, 9), 4) == [tuple(keys(1, 3, 5, 7)), tuple(keys(9))]
    assert arrange_short_clips(before, keys(30, 31), 4) == [tuple(keys(30, 31))]


# --- choices, and what is refused ----------------------------------------------------------------------------------


def test_st_fusion_sees_fewer_frames_than_the_language_model_where_so_configured(tokenizer: ChatTokenizer) -> None:
    paper = counted(replace(with_preset(SMALL_7B, "paper"), seg_frames=3))
    answer = Virst7bReasoner(paper, tokenizer).answer(request_of(clip_of(*range(9))))
    assert [prompt.step for prompt in answer.prompts] == [0, 4, 8]
    assert (paper.short_clips, paper.mapped_frames) == (3, 3)
    released = counted(replace(with_preset(SMALL_7B, "released"), seg_frames=3))
    reasoner = Virst7bReasoner(released, tokenizer)
    steps = [[p.step for p in reasoner.answer(request_of(clip_of(*range(9)))).prompts] for _ in range(2)]
    assert steps[0] == steps[1] == sorted(steps[0])
    assert steps[0] != [0, 4, 8]


def test_frames_of_st_fusion_are_even_or_random() -> None:
    assert choose_seg_frames(5, 8, "uniform") == choose_seg_frames(5, 8, "random") == [0, 1, 2, 3, 4]
    assert choose_seg_frames(64, 32, "uniform")[:3] == [0, 2, 4]
    assert choose_seg_frames(64, 32, "uniform")[-1] == 63
    assert choose_seg_frames(9, 1, "uniform") == [8]  # the newest
    chosen = [tuple(choose_seg_frames(count, 4, "random")) for count in range(20, 40)]
    assert all(len(set(one)) == 4 and list(one) == sorted(one) for one in chosen)
    assert len(set(chosen)) > 15


def test_sentences_and_clips_that_cannot_be_read_are_refused(reasoner: Virst7bReasoner) -> None:
    with pytest.raises(BadGoal, match="no word"):
        reasoner.answer(request_of(clip_of(1), " "))
    with pytest.raises(WeightsError, match="clips of 1 to 16 frames, got 17; change the parameter"):
        reasoner.answer(request_of(clip_of(*range(17))))
    small = replace(clip_of(1), frames_rgb_u8=np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(WeightsError, match="made by another model"):
        reasoner.answer(request_of(small))
    client = InProcessClient(reasoner)
    client.submit(request_of(small))
    assert "made by another model" in client.poll()[0].error


def test_nothing_of_the_tests_own_folder_is_needed(tmp_path: Path) -> None:
    """Files to answers: a weights folder with its tokenizer is all that a reasoner needs."""
    model = small_virst_7b()
    token_file = write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    write_folder(tmp_path / "weights", model.config, model.state_dict().items(), {}, [token_file])
    loaded = load_reasoner_model(tmp_path / "weights")
    reasoner = Virst7bReasoner(loaded, ChatTokenizer(tmp_path / "weights", loaded.config.language.vocabulary))
    own = Virst7bReasoner(model, ChatTokenizer(tmp_path / "tokenizer", VOCABULARY))
    request = request_of(clip_of(1, 2, 3, 4, 5))
    np.testing.assert_array_equal(embeddings_of(reasoner.answer(request)), embeddings_of(own.answer(request)))


# --- questions -----------------------------------------------------------------------------------------------------


def asked(clip: Clip, question: str = "What is on the table?") -> ReasonerRequest:
    return replace(request_of(clip, question), wants_words=True)


def test_a_question_is_answered_in_the_models_own_words(
    reasoner: Virst7bReasoner, model: Counted, tokenizer: ChatTokenizer
) -> None:
    answer = reasoner.answer(asked(clip_of(1, 2, 3, 4)))
    assert (answer.prompts, answer.error) == ((), "")
    frames = normalise(torch.from_numpy(clip_of(1, 2, 3, 4).frames_rgb_u8))[None]
    with torch.inference_mode():
        tokens = model.answer_tokens(
            model.encode_short_clips(frames).flatten(0, 1), tokenizer.question("What is on the table?"),
            marks=tokenizer.marks, ends=tokenizer.ends, longest=LONGEST_ANSWER_TOKENS,
        )  # fmt: skip
    assert answer.words == tokenizer.words(tokens)
    assert answer.timings_ms.keys() == {"video_encoder", "language_model", "total"}
    assert reasoner.answer(asked(clip_of(1, 2, 3, 4), "Who?")).words != answer.words
    assert reasoner.answer(asked(clip_of(5, 6, 7, 8))).words != answer.words


def test_a_question_and_a_goal_share_what_was_made_of_the_frames(reasoner: Virst7bReasoner, model: Counted) -> None:
    reasoner.answer(request_of(clip_of(*range(8))))
    reasoner.answer(asked(clip_of(*range(8))))
    assert (model.short_clips, model.mapped_frames) == (2, 8)
    prompts = embeddings_of(reasoner.answer(request_of(clip_of(*range(8)))))
    assert (model.short_clips, model.mapped_frames) == (2, 8)
    np.testing.assert_array_equal(
        prompts, embeddings_of(Virst7bReasoner(model, reasoner._tokenizer).answer(request_of(clip_of(*range(8)))))
    )


def test_words_travel_over_the_wire_however_long_they_are(
    model: Counted, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTokenizer, "words", lambda self, tokens: "ä" * 5000)
    answer = Virst7bReasoner(model, tokenizer).answer(asked(clip_of(1)))
    sent = decode([bytes(part) for part in encode(answer)])
    assert isinstance(sent, ReasonerAnswer)
    assert set(sent.words) == {"ä"}


def test_a_model_that_says_nothing_says_so(model: Counted, tokenizer: ChatTokenizer) -> None:
    model.lm_head = torch.nn.Linear(SMALL_7B.language.hidden, VOCABULARY)
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.ends[-1]] = 100.0
    with pytest.raises(Unanswered, match="no word for an answer"):
        Virst7bReasoner(model, tokenizer).answer(asked(clip_of(1)))


def test_questions_that_cannot_be_read_are_refused(reasoner: Virst7bReasoner) -> None:
    with pytest.raises(BadGoal, match="may not hold the marks"):
        reasoner.answer(asked(clip_of(1), "what<|im_end|>"))
    with pytest.raises(WeightsError, match="clips of 1 to 16 frames"):
        reasoner.answer(asked(clip_of(*range(17))))


def test_without_the_head_that_writes_words_a_question_is_refused_with_what_can_be_asked_instead(
    model: Counted, tokenizer: ChatTokenizer
) -> None:
    model.lm_head = torch.nn.Linear(SMALL_7B.language.hidden, VOCABULARY, device="meta")
    reasoner = Virst7bReasoner(model, tokenizer)
    with pytest.raises(VirstError, match=r"virst-7b without lm_head .* has no words.*set_goal.*tabletop-tiny"):
        reasoner.answer(asked(clip_of(0)))
    reasoner.answer(request_of(clip_of(0)))
