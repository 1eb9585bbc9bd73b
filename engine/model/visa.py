# SPDX-License-Identifier: Apache-2.0
"""VISA at toy scale: choose one frame by the words, segment the target there, track it from there (arXiv 2407.11325).

In this file data flows from `encode` through `percentages` (the Text-guided Frame Sampler, section 3.2) and
`reference_frames` to `prompts`. The paper's sampler is another, frozen video language model that abstracts a frame into
two tokens (LLaMA-VID); here it is a small one with the same two tokens, trained. The language model is given the target
frame in detail and T_r reference frames in a few tokens each. The words are "It is <SEG>": what is read is the hidden
state one place before <SEG>, as the released code does, and an MLP makes the one prompt of it that SAM's decoder gets.
"""

import json
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from virst_engine.model.config import LanguageModelConfig, VideoEncoderConfig, from_fields, with_parts
from virst_engine.model.video_language import Question, Understood, VideoLanguage, VisualTokens, build_language_model
from virst_engine.model.window import check_window, window_ages, window_cells

SAMPLINGS = ("local", "global", "global-local")
PERCENTAGES = 101  # answers of the sampler: 0 % to 100 % of the window


@dataclass(frozen=True)
class VisaConfig:
    name: str = "visa"
    video: VideoEncoderConfig = field(default_factory=lambda: VideoEncoderConfig(fine_newest=True))
    language: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    prompt_channels: int = 256  # of SAM 2's prompts
    window_frames: int = 22  # frames that a target is chosen from
    phases: int = 3  # window.py
    references: int = 12  # T_r
    sampling: str = "global-local"  # of the reference frames
    answers: int = 10  # K: answers of the sampler that are averaged
    sampler_hidden: int = 96
    sampler_layers: int = 2
    sampler_heads: int = 4
    words: tuple[str, ...] = ()  # as in VirstConfig
    segmenter: str = ""  # SHA-256 of the weights whose SAM 2 the prompts are for

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"the sampling of reference frames must be one of {SAMPLINGS}, got {self.sampling!r}")
        check_window(self.video, self.window_frames, self.phases)
        if min(self.references, self.answers, self.sampler_layers) < 1:
            raise ValueError("references, answers and sampler_layers must be 1 or more")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "VisaConfig":
        """Raises KeyError, TypeError or ValueError on anything that `to_json` did not write."""
        built: VisaConfig = from_fields(VisaConfig, with_parts(text))
        return built


def target_frame(percentages: Float[Tensor, "b answers"], frames: int) -> Int[Tensor, " b"]:
    """f_tgt = f[T / K * sum of p_i], of a window of T frames; percentages in 0..1."""
    return (percentages.float().mean(dim=1) * (frames - 1)).round().long()


def likeliest_answers(logits: Float[Tensor, "b percentages"], count: int) -> Float[Tensor, "b count"]:
    """`count` percentages (0..1) that stand for the distribution, in order: its quantiles.

    The paper draws K answers; quantiles have the mean of very many draws, and the same one every time.
    """
    reached = logits.float().softmax(-1).cumsum(-1)
    wanted = (torch.arange(count, device=logits.device) + 0.5) / count
    index = torch.searchsorted(reached, wanted.expand(len(logits), -1).contiguous())
    return index.clamp(max=logits.shape[-1] - 1).float() / (logits.shape[-1] - 1)


def reference_frames(target: int, frames: int, count: int, sampling: str) -> list[int]:
    """The T_r reference frames of a target frame, in order, without it; fewer where the window has no more.

    local: the nearest ones. global: evenly over the window. global-local: half of them each (VISA, section 4.4).
    """
    others = [t for t in range(frames) if t != target]
    count = min(count, len(others))
    local = sorted(others, key=lambda t: (abs(t - target), t))
    if sampling == "local":
        return sorted(local[:count])
    wanted = count if sampling == "global" else count // 2
    evenly = {int(i) for i in torch.linspace(0, len(others) - 1, wanted).round()} if wanted else set()
    chosen = {others[i] for i in evenly}
    for t in local:
        if len(chosen) == count:
            break
        chosen.add(t)
    return sorted(chosen)


class FrameSampler(nn.Module):
    """Text-guided Frame Sampler: which percentage of the video should be looked at to find what the sentence means?

    Two tokens per frame, as LLaMA-VID: its content (a mean over its cells) and its context (what the words of the
    sentence see in it). A causal language model reads them in the order of time, then the sentence.
    """

    def __init__(self, config: VisaConfig) -> None:
        super().__init__()
        hidden, channels = config.sampler_hidden, config.video.channels
        self.content = nn.Linear(channels, hidden)
        self.context_query = nn.Linear(hidden, channels)
        self.context = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.kind_embedding = nn.Parameter(torch.randn(2, hidden) * 0.3)
        self.time_embedding = nn.Parameter(torch.randn(config.window_frames, hidden) * 0.3)
        self.question_embedding = nn.Parameter(torch.randn(1, hidden) * 0.3)
        self.language_model = build_language_model(
            LanguageModelConfig(
                hidden=hidden,
                layers=config.sampler_layers,
                heads=config.sampler_heads,
                kv_heads=config.sampler_heads,
                feedforward=4 * hidden,
                vocabulary=config.language.vocabulary,
                rope_theta=config.language.rope_theta,
                max_positions=config.language.max_positions,
            )
        )
        self.percentage = nn.Linear(hidden, PERCENTAGES)

    def forward(
        self,
        cells: Float[Tensor, "rows t cells d"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
    ) -> Float[Tensor, "rows percentages"]:
        words = self.language_model.embed_tokens(text)
        query = self.context_query(words)  # rows length d
        scores = torch.einsum("rld,rtcd->rtlc", query, cells) * cells.shape[-1] ** -0.5
        seen = torch.einsum("rtlc,rtcd->rtld", scores.softmax(-1), cells)
        share = text_valid.float() / text_valid.float().sum(1, keepdim=True).clamp(min=1.0)
        context = self.context(torch.einsum("rl,rtld->rtd", share, seen))
        content = self.content(cells.mean(dim=2))
        times = self.time_embedding[-cells.shape[1] :, None]
        tokens = self.norm(torch.stack((context, content), dim=2)) + self.kind_embedding + times
        asks = self.question_embedding.expand(len(text), 1, -1)
        sequence = torch.cat((tokens.flatten(1, 2), words, asks), dim=1)
        there = torch.ones(len(text), tokens.shape[1] * 2, dtype=torch.bool, device=text.device)
        valid = torch.cat((there, text_valid, there[:, :1]), dim=1)
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.language_model(
            inputs_embeds=sequence, attention_mask=valid.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.percentage(hidden[:, -1])
        return logits


@dataclass(frozen=True)
class VisaOutput:
    prompts: Float[Tensor, "rows 1 c"]  # for the target frame of each row
    presence_logits: Float[Tensor, " rows"]  # > 0: the target is visible in that frame (not in VISA)
    understood: Understood


class Visa(VideoLanguage):
    """The reasoner of the method `visa`; SAM 2 is the segmenter's."""

    def __init__(self, config: VisaConfig) -> None:
        super().__init__(config.video, config.language)
        self.config = config
        hidden = config.language.hidden
        self.sampler = FrameSampler(config)
        self.seg_embedding = nn.Parameter(torch.randn(2, hidden) * 0.02)  # "it is", <SEG>
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.prompt_channels)
        )
        self.occ_predictor = nn.Linear(config.prompt_channels, 1)

    def encode(self, frames: Float[Tensor, "b t 3 size size"]) -> Float[Tensor, "b t cells d"]:
        """Normalised frames of a window. Raises ValueError for more than the model was made for."""
        if frames.shape[1] > self.config.window_frames:
            raise ValueError(f"a window has at most {self.config.window_frames} frames, got {frames.shape[1]}")
        return window_cells(self, frames, self.config.phases)

    def percentages(
        self,
        cells: Float[Tensor, "rows t cells d"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
    ) -> Float[Tensor, "rows percentages"]:
        """Logits of the sampler's answers, 0 % to 100 % of the window."""
        logits: Tensor = self.sampler(cells, text, text_valid)
        return logits

    def question_about(
        self,
        cells: Float[Tensor, "rows t cells d"],
        targets: Int[Tensor, " rows"],
        references: Int[Tensor, "rows r"],
        text: Int[Tensor, "rows length"],
        text_valid: Bool[Tensor, "rows length"],
    ) -> Question:
        """Sentence; the reference frames and the target frame in time order; the target frame in detail; "it is <SEG>".

        `references`: for each row equally many, without the target.
        """
        rows = torch.arange(len(text), device=text.device)[:, None]
        shown = torch.cat((references, targets[:, None]), dim=1).sort(dim=1).values
        ages = window_ages(cells.shape[1], self.config.phases).to(cells.device)
        times = self.time_embedding(ages)[0, :, 0]
        coarse = (self.coarse_tokens(cells[rows, shown]) + times[shown][:, :, None]).flatten(1, 2)
        # The newest frame's details have no time of their own; another frame's have the difference.
        fine = self.fine_tokens(cells[rows[:, 0], targets]) + (times[targets] - times[-1])[:, None]
        begins = torch.arange(coarse.shape[1] + fine.shape[1], device=text.device) % self.config.video.tokens_per_frame
        begins = (begins == 0) & (torch.arange(len(begins), device=text.device) <= coarse.shape[1])
        queries = self.seg_embedding.expand(len(text), -1, -1)
        return self.question(text, text_valid, VisualTokens(torch.cat((coarse, fine), dim=1), begins), queries)

    def prompts(
        self,
        question: Question,
        answer: Int[Tensor, "rows answer"] | None = None,
        answer_valid: Bool[Tensor, "rows answer"] | None = None,
    ) -> VisaOutput:
        understood = self.understand(question, answer, answer_valid)
        prompts = self.text_hidden_fcs(understood.queries[:, :1])
        return VisaOutput(prompts, self.occ_predictor(prompts[:, 0])[:, 0], understood)
