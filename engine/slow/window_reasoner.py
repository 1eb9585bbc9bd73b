# SPDX-License-Identifier: Apache-2.0
"""The methods `visa` and `tempvrs`: both look at a dense window of frames and answer with prompts for some of them.

They read pixels alone; a question is answered by the language model, word by word.
"""

import time
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from virst_engine.errors import Unanswered, WeightsError
from virst_engine.model.pixels import normalise
from virst_engine.model.tempvrs import TempVrs, clip_relevance
from virst_engine.model.video_language import Question, VideoLanguage, VisualTokens
from virst_engine.model.visa import Visa, likeliest_answers, reference_frames, target_frame
from virst_engine.model.words import WordTokenizer
from virst_engine.slow.virst_reasoner import LONGEST_ANSWER_WORDS, LONGEST_GOAL_WORDS
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

Model = TypeVar("Model", bound=VideoLanguage)
Encoded = TypeVar("Encoded")  # what a method knows of a window before it reads a sentence


class WindowReasoner(ABC, Generic[Model, Encoded]):
    """`Reasoner` on the network of one method, in evaluation mode.

    `answer` raises BadGoal for a sentence that the model cannot read, WeightsError for a clip of another shape than it
    reads, Unanswered where it has no word for a question.
    """

    def __init__(self, model: Model, *, words: tuple[str, ...], image_size: int, window_frames: int) -> None:
        self._model: Model = model.eval()
        self._tokenizer = WordTokenizer(words)
        self._shape = (window_frames, image_size, image_size, 3)
        self._newest: tuple[UInt8[np.ndarray, "t h w 3"], Encoded] | None = None

    @abstractmethod
    def _look_at(self, frames: Float[Tensor, "1 t 3 h w"]) -> Encoded:
        """What does not depend on the sentence."""

    @abstractmethod
    def _choose(self, seen: Encoded, text: Int[Tensor, "1 length"]) -> tuple[Question, list[int]]:
        """What the language model is asked, and the frames of the window that its prompts are for."""

    @abstractmethod
    def _prompt(self, question: Question, frames: list[int]) -> list[tuple[int, Float[np.ndarray, "n c"], float]]:
        """(frame of the window, embeddings, confidence that the target is visible there), oldest first."""

    @torch.inference_mode()
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        start = time.perf_counter()
        tokens = self._tokenizer.encode_goal(request.sentence, LONGEST_GOAL_WORDS)
        self._check(request.clip)
        text = torch.tensor([tokens], device=self._model.frame_embedding.device)
        seen = self._encode(request.clip)
        encode_ms = (time.perf_counter() - start) * 1e3
        question, frames = self._choose(seen, text)
        choose_ms = (time.perf_counter() - start) * 1e3
        prompts: tuple[Prompt, ...] = ()
        words = ""
        if request.wants_words:
            words = self._tokenizer.decode(self._model.answer_words(question, LONGEST_ANSWER_WORDS))
            if not words:
                raise Unanswered("the model has no word for an answer; ask in other words")
        else:
            clip = request.clip
            # At the start of a stream the oldest frame stands for those before it: of its prompts the last one counts.
            by_step = {
                int(clip.steps[t]): Prompt(int(clip.steps[t]), int(clip.stamps_ns[t]), embeddings, confidence)
                for t, embeddings, confidence in self._prompt(question, frames)
            }
            prompts = tuple(by_step.values())
        total_ms = (time.perf_counter() - start) * 1e3
        timings = {
            "encode_clip": encode_ms,
            "choose_frames": choose_ms - encode_ms,
            "language": total_ms - choose_ms,
            "total": total_ms,
        }
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts, "", timings, words)

    def _encode(self, clip: Clip) -> Encoded:
        """Kept, because goals that are due together share a clip."""
        if self._newest is None or not np.array_equal(self._newest[0], clip.frames_rgb_u8):
            frames = np.array(clip.frames_rgb_u8)
            pixels = normalise(torch.from_numpy(frames).to(self._model.frame_embedding.device))
            self._newest = frames, self._look_at(pixels[None])
        return self._newest[1]

    def _check(self, clip: Clip) -> None:
        found = clip.frames_rgb_u8.shape
        if found != self._shape:
            raise WeightsError(
                f"this reasoner reads clips of {self._shape[0]} frames of {self._shape[2]} x {self._shape[1]}, got "
                f"{found[0]} of {found[2]} x {found[1]}; start the segmenter with the reasoner.method of this reasoner"
            )


class VisaReasoner(WindowReasoner[Visa, Float[Tensor, "1 t cells d"]]):
    """One prompt, for the frame that the sampler chose."""

    def __init__(self, model: Visa) -> None:
        config = model.config
        super().__init__(
            model, words=config.words, image_size=config.video.image_size, window_frames=config.window_frames
        )

    def _look_at(self, frames: Float[Tensor, "1 t 3 h w"]) -> Float[Tensor, "1 t cells d"]:
        return self._model.encode(frames)

    def _choose(self, seen: Float[Tensor, "1 t cells d"], text: Int[Tensor, "1 length"]) -> tuple[Question, list[int]]:
        config, count = self._model.config, seen.shape[1]
        valid = torch.ones_like(text, dtype=torch.bool)
        answers = likeliest_answers(self._model.percentages(seen, text, valid), config.answers)
        target = int(target_frame(answers, count)[0])
        references = torch.tensor([reference_frames(target, count, config.references, config.sampling)])
        targets = torch.tensor([target], device=text.device)
        return self._model.question_about(seen, targets, references.to(text.device), text, valid), [target]

    def _prompt(self, question: Question, frames: list[int]) -> list[tuple[int, Float[np.ndarray, "n c"], float]]:
        output = self._model.prompts(question)
        confidence = float(output.presence_logits[0].float().sigmoid())
        return [(frames[0], output.prompts[0].float().cpu().numpy(), confidence)]


class TempVrsReasoner(WindowReasoner[TempVrs, VisualTokens]):
    """Prompts for the slow frames of the k clips that have most to do with the sentence.

    A clip's relevance stands for the confidence of its slow frame: that any of its frames shows the target.
    """

    def __init__(self, model: TempVrs, *, top_k: int = 0) -> None:
        """`top_k`: 0 = the model's. Raises ValueError where there are fewer clips."""
        config = model.config
        if not 0 <= top_k <= config.slow_frames:
            raise ValueError(f"top_k must be 1 to {config.slow_frames}, the clips of this model, got {top_k}")
        super().__init__(
            model, words=config.words, image_size=config.video.image_size, window_frames=config.window_frames
        )
        self._top_k = top_k or config.top_k

    def _look_at(self, frames: Float[Tensor, "1 t 3 h w"]) -> VisualTokens:
        return self._model.encode(frames)

    def _choose(self, seen: VisualTokens, text: Int[Tensor, "1 length"]) -> tuple[Question, list[int]]:
        question = self._model.question_about(seen, text, torch.ones_like(text, dtype=torch.bool))
        return question, list(range(0, self._model.config.window_frames, self._model.config.phases))

    def _prompt(self, question: Question, frames: list[int]) -> list[tuple[int, Float[np.ndarray, "n c"], float]]:
        config, output = self._model.config, self._model.prompts(question)
        relevance = clip_relevance(output.relevance_logits, config.slow_frames, config.phases)[0].float()
        # Of equals the newest: what memory has yet to learn.
        best = sorted(range(config.slow_frames), key=lambda clip: (float(relevance[clip]), clip))[-self._top_k :]
        rows, confidences = output.prompts[0].float().cpu().numpy(), relevance.sigmoid().tolist()
        return [(frames[clip], rows[clip], confidences[clip]) for clip in sorted(best)]
