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
from transformers import Qwen2Config, Qwen2Model

from virst_engine.model.config import LanguageModelConfig, VirstConfig
from virst_engine.model.sam2 import Sam2
from virst_engine.model.st_fusion import InitialStFusion, SecondStFusion, dense_position
from virst_engine.model.video_encoder import VideoEncoder
from virst_engine.model.words import END, SPECIAL_TOKENS


@dataclass(frozen=True)
class ClipEncoding:
    """Everything about a clip that does not depend on the sentence."""

    visual_tokens: Float[Tensor, "b v d"]  # the language model's view: frame by frame, then the newest one in detail
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


def build_language_model(config: LanguageModelConfig) -> Qwen2Model:
    return Qwen2Model(
        Qwen2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.feedforward,
            max_position_embeddings=config.max_positions,
            rope_theta=config.rope_theta,
            attention_dropout=0.0,
            use_cache=False,
        )
    )


def _projector(channels: int, hidden: int) -> nn.Sequential:
    """The norm keeps visual tokens at the scale of their embeddings and of what the language model adds to them."""
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))


class Virst(nn.Module):
    """All networks of one model. `seg_model` alone is the segmenter; the rest is the reasoner."""

    def __init__(self, config: VirstConfig) -> None:
        super().__init__()
        self.config = config
        channels, hidden, fusion = config.sam2.channels, config.language.hidden, config.fusion
        self.seg_model = Sam2(config.sam2)
        self.video_encoder = VideoEncoder(config.video)
        self.mm_projector = _projector(config.video.channels * config.video.pool**2, hidden)
        if config.video.fine_newest:
            self.fine_projector = _projector(config.video.channels, hidden)
            self.fine_place_embedding = nn.Parameter(torch.randn(1, config.video.grid**2, hidden) * 0.5)
        self.frame_embedding = nn.Parameter(torch.randn(1, config.video.max_frames, 1, hidden) * 0.3)
        self.place_embedding = nn.Parameter(torch.randn(1, 1, config.video.tokens_per_frame, hidden) * 0.5)
        self.language_model = build_language_model(config.language)
        self.lm_head = nn.Linear(hidden, config.language.vocabulary, bias=False)
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
        tokens = self.mm_projector(self.video_encoder.merge(cells))
        # Frames count from the newest, however many there are.
        tokens = tokens + self.frame_embedding[:, longest - frames :] + self.place_embedding
        initial = (
            self.initial_seg_fusion_module.video_tokens(fusion_maps) if self.config.fusion.initial_fusion else None
        )
        visual = tokens.flatten(1, 2)
        if self.config.video.fine_newest:
            fine = self.fine_projector(cells[:, -1]) + self.fine_place_embedding
            visual = torch.cat((visual, fine), dim=1)
        return ClipEncoding(visual, initial, self.seg_prompter.video_maps(fusion_maps))

    def prompts(
        self,
        clip: ClipEncoding,
        clip_of_row: Int[Tensor, " rows"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
        answer: Int[Tensor, "rows answer"] | None = None,
        answer_valid: Bool[Tensor, "rows answer"] | None = None,
    ) -> PromptOutput:
        """Prompts for each sentence. Row i reads clip `clip_of_row[i]`; text is padded on the left.

        The causal sequence is: sentence, video, N [ST] tokens, answer. The answer comes after the [ST] tokens, so it
        teaches in training and is simply left out otherwise. [ST] hidden states are read at their own positions.
        """
        sequence, mask = self._question(clip, clip_of_row, text, text_valid)
        start, n = text.shape[1] + clip.visual_tokens.shape[1], self.config.fusion.st_tokens
        if answer is not None and answer_valid is not None:
            sequence = torch.cat((sequence, self.language_model.embed_tokens(answer)), dim=1)
            mask = torch.cat((mask, answer_valid), dim=1)
        understood = self.language_model(
            inputs_embeds=sequence,
            attention_mask=mask.long(),
            position_ids=self._positions(mask, text.shape[1], clip),
            use_cache=False,
            output_hidden_states=answer is not None,
        )
        hidden = understood.last_hidden_state
        maps = clip.second_maps
        position = dense_position(self.seg_model.sam_prompt_encoder.get_dense_pe(), *maps.shape[-2:])
        st = hidden[:, start : start + n]
        prompts, attention = self.seg_prompter(st, maps, clip_of_row, position)
        logits = None
        visual_hidden: tuple[Tensor, ...] = ()
        if answer is not None:  # the last [ST] token predicts the answer's first word
            layers = (*understood.hidden_states[1 : self.config.language.layers], hidden)  # the last one normalised
            visual_hidden = tuple(states[:, text.shape[1] : start] for states in layers)
            logits = self.lm_head(hidden[:, start + n - 1 : start + n - 1 + answer.shape[1]])
        presence = self.occ_predictor(prompts.mean(dim=2))[..., 0]
        return PromptOutput(prompts, presence, self.seg_prompter.seg_proj(st), attention, logits, visual_hidden)

    def answer_tokens(self, clip: ClipEncoding, text: Int[Tensor, "1 length"], longest: int) -> list[int]:
        """The words that follow a question about one clip, each the likeliest after those before it; END is left out.

        They are what `prompts` learnt to foretell: the sequence is the same one, with the video in it. At most
        `longest` tokens. The keys and values of the question are computed once.
        """
        row = torch.zeros(1, dtype=torch.long, device=text.device)
        sequence, mask = self._question(clip, row, text, torch.ones_like(text, dtype=torch.bool))
        positions = self._positions(mask, text.shape[1], clip)
        cache = None
        tokens: list[int] = []
        while True:
            # Always with a mask: without one, transformers takes equal positions for the borders of several texts.
            understood = self.language_model(
                inputs_embeds=sequence,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            token = self._likeliest_word(understood.last_hidden_state[0, -1])
            if token == END or len(tokens) == longest:
                return tokens
            tokens.append(token)
            cache = understood.past_key_values
            sequence = self.language_model.embed_tokens(torch.tensor([[token]], device=text.device))
            mask = torch.cat((mask, mask[:, -1:]), dim=1)
            positions = positions[:, -1:] + 1

    def _likeliest_word(self, hidden: Float[Tensor, " d"]) -> int:
        """The token of a word, or END: the other special tokens say nothing."""
        logits = self.lm_head(hidden)
        is_word = torch.arange(len(logits), device=logits.device) >= SPECIAL_TOKENS
        is_word[END] = True
        return int(logits.masked_fill(~is_word, float("-inf")).argmax())

    def _question(
        self,
        clip: ClipEncoding,
        clip_of_row: Int[Tensor, " rows"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
    ) -> tuple[Float[Tensor, "rows all d"], Bool[Tensor, "rows all"]]:
        """What the language model reads before any answer: sentence, video, [ST] tokens; and which of it is there."""
        rows, n = text.shape[0], self.config.fusion.st_tokens
        st = self.st_embedding.expand(n, -1).expand(rows, -1, -1)
        if clip.initial_tokens is not None:
            st = self.initial_seg_fusion_module(st, clip.initial_tokens[clip_of_row])
        visual = clip.visual_tokens[clip_of_row]
        behind_text = torch.ones(rows, visual.shape[1] + n, dtype=torch.bool, device=text.device)
        sequence = torch.cat((self.language_model.embed_tokens(text), visual, st.to(visual.dtype)), dim=1)
        return sequence, torch.cat((text_valid, behind_text), dim=1)

    def _positions(self, valid: Bool[Tensor, "rows all"], start: int, clip: ClipEncoding) -> Int[Tensor, "rows all"]:
        """Position of every element of the sequence; padding does not count. Visual tokens begin at `start`."""
        counts = valid.long()
        if self.config.language.position_per_frame:
            frames, per_frame = clip.second_maps.shape[1], self.config.video.tokens_per_frame
            place = torch.arange(clip.visual_tokens.shape[1], device=valid.device)
            # The first of a frame, or of the newest one's details.
            is_first = (place % per_frame == 0) & (place <= frames * per_frame)
            counts[:, start : start + len(place)] = is_first.long()
        return (counts.cumsum(1) - 1).clamp(min=0)
