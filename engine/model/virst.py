# SPDX-License-Identifier: Apache-2.0
"""VIRST: video encoder + language model + ST-Fusion + SAM 2 (arXiv 2603.27060, figure 2).

One teacher-forced pass turns a sentence and a clip into prompts for every frame of the clip; SAM 2 decodes them and
carries the masks on. In this file data flows from `encode_clip` through `prompts`, or through `answer_tokens` where a
question is to be answered in words.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from virst_engine.model.config import VirstConfig
from virst_engine.model.sam2 import Sam2
from virst_engine.model.st_fusion import InitialStFusion, SecondStFusion, dense_position
from virst_engine.model.video_language import Question, VideoLanguage, VisualTokens


@dataclass(frozen=True)
class ClipEncoding:
    """Everything about a clip that does not depend on the sentence."""

    visual: VisualTokens  # the language model's view: frame by frame, then the newest one in detail
    initial_tokens: Float[Tensor, "b tokens d"] | None  # S_down for Initial ST-Fusion; None when it is off
    second_maps: Float[Tensor, "b t c hd wd"]  # S_down for Second ST-Fusion


@dataclass(frozen=True)
class PromptOutput:
    prompts: Float[Tensor, "b t n c"]
    presence_logits: Float[Tensor, "b t"]  # > 0: the target is visible in that frame; see `fusion.predicts_presence`
    projected: Float[Tensor, "b n c"]  # [ST] tokens before Second ST-Fusion, the baseline of VIRST's table 4
    attention_logits: Float[Tensor, "b heads n t t hd wd"] | None  # of the last second-fusion layer
    answer_logits: Float[Tensor, "b answer vocabulary"] | None  # next-token logits of a teacher-forced answer
    visual_hidden: tuple[Float[Tensor, "b v d"], ...]  # visual tokens after each layer; with an answer only


class Virst(VideoLanguage):
    """All networks of one model. `seg_model` alone is the segmenter; the rest is the reasoner."""

    def __init__(self, config: VirstConfig) -> None:
        super().__init__(config.video, config.language)
        self.config = config
        channels, hidden, fusion = config.sam2.channels, config.language.hidden, config.fusion
        self.seg_model = Sam2(config.sam2)
        rows = 1 if fusion.shared_st_embedding else fusion.st_tokens
        self.st_embedding = nn.Parameter(torch.randn(rows, hidden) * 0.02)  # E_ST
        self.initial_seg_fusion_module = InitialStFusion(channels, hidden, fusion)
        self.seg_prompter = SecondStFusion(channels, hidden, fusion)
        self.occ_predictor = nn.Linear(channels, 1)

    def encode_clip(
        self, frames: Float[Tensor, "b t 3 size size"], fusion_maps: Float[Tensor, "b t c h w"]
    ) -> ClipEncoding:
        """`frames`: normalised, at the video encoder's size; `fusion_maps`: ImageFeatures.fusion of the same frames."""
        return self.encode_cells(self.video_encoder.cells(frames), fusion_maps)

    def encode_cells(
        self, cells: Float[Tensor, "b t cells d"], fusion_maps: Float[Tensor, "b t c h w"]
    ) -> ClipEncoding:
        """`encode_clip` from the video encoder's cells on (training reads them, too).

        Raises ValueError for a clip longer than `video.max_frames`.
        """
        frames, longest = cells.shape[1], self.config.video.max_frames
        if frames > longest:
            raise ValueError(f"a clip may have at most {longest} frames (video.max_frames), got {frames}")
        ages = torch.arange(frames - 1, -1, -1, device=cells.device).float()
        tokens = (self.coarse_tokens(cells) + self.time_embedding(ages)).flatten(1, 2)
        per_frame = self.config.video.tokens_per_frame
        begins = torch.arange(tokens.shape[1], device=cells.device) % per_frame == 0
        if self.config.video.fine_newest:
            fine = self.fine_tokens(cells[:, -1])
            tokens = torch.cat((tokens, fine), dim=1)
            begins = torch.cat((begins, torch.arange(fine.shape[1], device=cells.device) == 0))
        initial = (
            self.initial_seg_fusion_module.video_tokens(fusion_maps) if self.config.fusion.initial_fusion else None
        )
        return ClipEncoding(VisualTokens(tokens, begins), initial, self.seg_prompter.video_maps(fusion_maps))

    def prompts(
        self,
        clip: ClipEncoding,
        clip_of_row: Int[Tensor, " rows"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
        answer: Int[Tensor, "rows answer"] | None = None,
        answer_valid: Bool[Tensor, "rows answer"] | None = None,
    ) -> PromptOutput:
        """Prompts for each sentence. Row i reads clip `clip_of_row[i]`; text is padded on the left."""
        question = self._question(clip, clip_of_row, text, text_valid)
        understood = self.understand(question, answer, answer_valid)
        st, maps = understood.queries, clip.second_maps
        position = dense_position(self.seg_model.sam_prompt_encoder.get_dense_pe(), *maps.shape[-2:])
        prompts, attention = self.seg_prompter(st, maps, clip_of_row, position)
        presence = self.occ_predictor(prompts.mean(dim=2))[..., 0]
        projected = self.seg_prompter.seg_proj(st)
        return PromptOutput(prompts, presence, projected, attention, understood.answer_logits, understood.visual_hidden)

    def answer_tokens(self, clip: ClipEncoding, text: Int[Tensor, "1 length"], longest: int) -> list[int]:
        """The words that follow a question about one clip, at most `longest`; see `answer_words`."""
        row = torch.zeros(1, dtype=torch.long, device=text.device)
        return self.answer_words(self._question(clip, row, text, torch.ones_like(text, dtype=torch.bool)), longest)

    def _question(
        self,
        clip: ClipEncoding,
        clip_of_row: Int[Tensor, " rows"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
    ) -> Question:
        """The queries are N [ST] tokens, which have seen the clip where Initial ST-Fusion is on."""
        st = self.st_embedding.expand(self.config.fusion.st_tokens, -1).expand(text.shape[0], -1, -1)
        if clip.initial_tokens is not None:
            st = self.initial_seg_fusion_module(st, clip.initial_tokens[clip_of_row])
        return self.question(text, text_valid, clip.visual.of_rows(clip_of_row), st)
