# SPDX-License-Identifier: Apache-2.0
"""What reads a sentence and a clip, whichever method makes prompts of it: video encoder, projector, language model.

The causal sequence is: sentence, visual tokens, queries (the special tokens of a method), answer. The sentence comes
first, so that visual tokens can be understood by it. `tabletop-tiny` is small: with the sentence last, as the published
methods have it, its few layers would have to find the target in one token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from virst_engine.model.config import LanguageModelConfig, VideoEncoderConfig
from virst_engine.model.video_encoder import VideoEncoder
from virst_engine.model.words import END, SPECIAL_TOKENS


@dataclass(frozen=True)
class VisualTokens:
    """The language model's view of a clip, or of one clip per row."""

    tokens: Float[Tensor, "b v d"]
    begins: Bool[Tensor, " v"]  # tokens at which the position advances, where it advances once a frame

    def of_rows(self, clip_of_row: Int[Tensor, " rows"]) -> "VisualTokens":
        return VisualTokens(self.tokens[clip_of_row], self.begins)


@dataclass(frozen=True)
class Question:
    """What the language model reads before any answer."""

    embedded: Float[Tensor, "rows all d"]
    valid: Bool[Tensor, "rows all"]
    positions: Int[Tensor, "rows all"]
    words: int  # places of the sentence; then come the visual tokens
    visual: int


@dataclass(frozen=True)
class Understood:
    """Last hidden states, normalised."""

    queries: Float[Tensor, "rows n d"]
    answer_logits: Float[Tensor, "rows answer vocabulary"] | None  # next-token logits of a teacher-forced answer
    visual_hidden: tuple[Float[Tensor, "rows v d"], ...]  # visual tokens after each layer; with an answer only


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


class VideoLanguage(nn.Module):
    """The part that the methods `virst`, `visa` and `tempvrs` share; a method adds its queries and their read-outs."""

    def __init__(self, video: VideoEncoderConfig, language: LanguageModelConfig) -> None:
        super().__init__()
        hidden = language.hidden
        self._video, self._language = video, language
        self.video_encoder = VideoEncoder(video)
        self.mm_projector = _projector(video.channels * video.pool**2, hidden)
        if video.fine_newest:
            self.fine_projector = _projector(video.channels, hidden)
            self.fine_place_embedding = nn.Parameter(torch.randn(1, video.grid**2, hidden) * 0.5)
        self.frame_embedding = nn.Parameter(torch.randn(1, video.max_frames, 1, hidden) * 0.3)
        self.place_embedding = nn.Parameter(torch.randn(1, 1, video.tokens_per_frame, hidden) * 0.5)
        self.language_model = build_language_model(language)
        self.lm_head = nn.Linear(hidden, language.vocabulary, bias=False)

    # Visual tokens

    def coarse_tokens(self, cells: Float[Tensor, "b t cells d"]) -> Float[Tensor, "b t tokens d2"]:
        """A few tokens per frame, with their place, without their time."""
        tokens: Tensor = self.mm_projector(self.video_encoder.merge(cells)) + self.place_embedding
        return tokens

    def fine_tokens(self, cells: Float[Tensor, "b cells d"]) -> Float[Tensor, "b cells d2"]:
        """One token per cell of one frame; needs `video.fine_newest`."""
        tokens: Tensor = self.fine_projector(cells) + self.fine_place_embedding
        return tokens

    def time_embedding(self, age: Float[Tensor, " t"]) -> Float[Tensor, "1 t 1 d"]:
        """Of frames that are `age` frames of the video encoder's rate older than the newest, 0 or more, whole or not.

        Frames count from the newest, however many there are; between two whole ages it is their weighted mean.
        """
        table = self.frame_embedding.flip(1)
        low = age.floor().long().clamp(max=table.shape[1] - 1)
        share = (age - low)[None, :, None, None].to(table.dtype)
        return torch.lerp(table[:, low], table[:, (low + 1).clamp(max=table.shape[1] - 1)], share)

    # The language model

    def question(
        self,
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
        visual: VisualTokens,
        queries: Float[Tensor, "rows n d"],
    ) -> Question:
        """`text` is padded on the left, `visual` has a row for each sentence."""
        behind_text = torch.ones(len(text), len(visual.begins) + queries.shape[1], dtype=torch.bool, device=text.device)
        embedded = (self.language_model.embed_tokens(text), visual.tokens, queries.to(visual.tokens.dtype))
        valid = torch.cat((text_valid, behind_text), dim=1)
        counts = valid.long()  # padding does not count
        if self._language.position_per_frame:
            counts[:, text.shape[1] : text.shape[1] + len(visual.begins)] = visual.begins.long()
        positions = (counts.cumsum(1) - 1).clamp(min=0)
        return Question(torch.cat(embedded, dim=1), valid, positions, text.shape[1], len(visual.begins))

    def understand(
        self,
        question: Question,
        answer: Int[Tensor, "rows answer"] | None = None,
        answer_valid: Bool[Tensor, "rows answer"] | None = None,
    ) -> Understood:
        """One teacher-forced pass; the answer comes after the queries, in training only.

        Hidden states of queries are read at their own positions; the last one foretells the answer's first word.
        """
        sequence, valid, positions = question.embedded, question.valid, question.positions
        start, end = question.words + question.visual, sequence.shape[1]
        if answer is not None and answer_valid is not None:
            sequence = torch.cat((sequence, self.language_model.embed_tokens(answer)), dim=1)
            valid = torch.cat((valid, answer_valid), dim=1)
            positions = torch.cat((positions, positions[:, -1:] + answer_valid.long().cumsum(1)), dim=1)
        understood = self.language_model(
            inputs_embeds=sequence,
            attention_mask=valid.long(),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=answer is not None,
        )
        hidden = understood.last_hidden_state
        if answer is None:
            return Understood(hidden[:, start:end], None, ())
        layers = (*understood.hidden_states[1 : self._language.layers], hidden)  # the last one normalised
        visual_hidden = tuple(states[:, question.words : start] for states in layers)
        logits = self.lm_head(hidden[:, end - 1 : end - 1 + answer.shape[1]])
        return Understood(hidden[:, start:end], logits, visual_hidden)

    def answer_words(self, question: Question, longest: int) -> list[int]:
        """The words that follow a question of one row, each the likeliest after those before it; END is left out.

        They are what `understand` learnt to foretell. At most `longest` tokens. The keys and values of the question are
        computed once.
        """
        sequence, valid, positions = question.embedded, question.valid, question.positions
        cache = None
        tokens: list[int] = []
        while True:
            # Always with a mask: without one, transformers takes equal positions for the borders of several texts.
            understood = self.language_model(
                inputs_embeds=sequence,
                attention_mask=valid.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            token = self._likeliest_word(understood.last_hidden_state[0, -1])
            if token == END or len(tokens) == longest:
                return tokens
            tokens.append(token)
            cache = understood.past_key_values
            sequence = self.language_model.embed_tokens(torch.tensor([[token]], device=sequence.device))
            valid = F.pad(valid, (0, 1), value=True)
            positions = positions[:, -1:] + 1

    def _likeliest_word(self, hidden: Float[Tensor, " d"]) -> int:
        """The token of a word, or END: the other special tokens say nothing."""
        logits = self.lm_head(hidden)
        is_word = torch.arange(len(logits), device=logits.device) >= SPECIAL_TOKENS
        is_word[END] = True
        return int(logits.masked_fill(~is_word, float("-inf")).argmax())
