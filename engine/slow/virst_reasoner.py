# SPDX-License-Identifier: Apache-2.0
"""The method `virst`: one forward pass of the model turns a request into prompts for every frame of its clip.

A question is answered by the language model alone, word by word.
"""

import time
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from virst_engine.errors import Unanswered, WeightsError
from virst_engine.model.pixels import normalise
from virst_engine.model.virst import ClipEncoding, PromptOutput, Virst
from virst_engine.model.words import WordTokenizer, pad_rows
from virst_engine.types import Clip, Prompt, ReasonerAnswer, ReasonerRequest

LONGEST_GOAL_WORDS = 40
LONGEST_ANSWER_WORDS = 24


class VirstReasoner:
    """`Reasoner` on a Virst in evaluation mode.

    `answer` raises BadGoal for a sentence that the model cannot read, WeightsError for a clip of another model,
    Unanswered where it has no word for a question.

    Ablations of VIRST's table 4, on weights that were trained with both (the paper trains each anew). Without
    `initial_fusion` the [ST] tokens enter the language model as they were learnt, without `second_fusion` they leave it
    as prompts, the same for every frame.
    """

    def __init__(self, model: Virst, *, initial_fusion: bool = True, second_fusion: bool = True) -> None:
        self._model = model.eval()
        self._initial_fusion, self._second_fusion = initial_fusion, second_fusion
        self._tokenizer = WordTokenizer(model.config.words)
        self._newest: tuple[Clip, ClipEncoding] | None = None
        fusion_side = model.config.sam2.grid * (4, 2, 1)[model.config.fusion.feature_level]
        self._frame_shape = (model.config.video.image_size, model.config.video.image_size, 3)
        self._fusion_shape = (model.config.sam2.channels, fusion_side, fusion_side)
        self._longest_clip = min(model.config.video.max_frames, model.config.fusion.max_frames)

    @torch.inference_mode()
    def answer(self, request: ReasonerRequest) -> ReasonerAnswer:
        start = time.perf_counter()
        tokens = self._tokenizer.encode_goal(request.sentence, LONGEST_GOAL_WORDS)
        self._check(request.clip)
        text, _ = pad_rows([tokens])
        encoded = self._encode(request.clip)
        encode_ms = (time.perf_counter() - start) * 1e3
        text = text.to(self._model.frame_embedding.device)
        prompts = () if request.wants_words else self._prompts(request.clip, encoded, text)
        words = self._words(encoded, text) if request.wants_words else ""
        total_ms = (time.perf_counter() - start) * 1e3
        timings = {"encode_clip": encode_ms, "language": total_ms - encode_ms, "total": total_ms}
        return ReasonerAnswer(request.request_id, request.epoch, request.goal_id, prompts, "", timings, words)

    def _prompts(self, clip: Clip, encoded: ClipEncoding, text: Int[Tensor, "1 length"]) -> tuple[Prompt, ...]:
        row = torch.zeros(1, dtype=torch.long, device=text.device)
        output = self._model.prompts(encoded, row, text, torch.ones_like(text, dtype=torch.bool))
        embeddings = output.prompts
        if not self._second_fusion:  # ablation: the projected [ST] tokens, the same for every frame
            embeddings = output.projected[:, None].expand_as(embeddings)
        rows = embeddings[0].float().cpu().numpy()
        confidences = self._confidences(output)
        return tuple(
            Prompt(int(step), int(stamp), embedding, confidence)
            for step, stamp, embedding, confidence in zip(clip.steps, clip.stamps_ns, rows, confidences, strict=True)
        )

    def _words(self, encoded: ClipEncoding, text: Int[Tensor, "1 length"]) -> str:
        words = self._tokenizer.decode(self._model.answer_tokens(encoded, text, LONGEST_ANSWER_WORDS))
        if not words:
            raise Unanswered("the model has no word for an answer; ask in other words")
        return words

    def _confidences(self, output: PromptOutput) -> list[float]:
        if not (self._model.config.fusion.predicts_presence and self._second_fusion):
            return [1.0] * output.prompts.shape[1]
        confidences: list[float] = output.presence_logits[0].float().sigmoid().tolist()
        return confidences

    def _encode(self, clip: Clip) -> ClipEncoding:
        """What does not depend on the sentence; kept, because goals that are due together share a clip."""
        if self._newest is None or not _is_same_view(self._newest[0], clip):
            device = self._model.frame_embedding.device
            frames = normalise(torch.from_numpy(np.array(clip.frames_rgb_u8)).to(device))
            maps = torch.from_numpy(np.array(clip.fusion)).to(device, torch.float32)
            encoded = self._model.encode_clip(frames[None], maps[None])
            if not self._initial_fusion:
                encoded = replace(encoded, initial_tokens=None)
            self._newest = clip, encoded
        return self._newest[1]

    def _check(self, clip: Clip) -> None:
        frame, fusion = clip.frames_rgb_u8.shape[1:], clip.fusion.shape[1:]
        if (frame, fusion) != (self._frame_shape, self._fusion_shape):
            raise WeightsError(
                f"the clip was made by another model: its frames are {frame} and its features {fusion}, this reasoner "
                f"reads {self._frame_shape} and {self._fusion_shape}; start both with the same weights"
            )
        if not 0 < len(clip.steps) <= self._longest_clip:
            raise WeightsError(
                f"this model reads clips of 1 to {self._longest_clip} frames, got {len(clip.steps)}; "
                "change the parameter reasoner.clip_frames"
            )


def _is_same_view(one: Clip, other: Clip) -> bool:
    return one is other or (
        np.array_equal(one.frames_rgb_u8, other.frames_rgb_u8) and np.array_equal(one.fusion, other.fusion)
    )
