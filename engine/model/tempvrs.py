# SPDX-License-Identifier: Apache-2.0
"""TempVRS at toy scale: slow and fast frames in the order of time, <TEP> says when, <SEG> says what.

"More than a Snapshot: Forcing Temporal Reasoning in Video Segmentation", section 3.2. K_s slow frames have all their
tokens, the K_f fast frames between them N_f tokens each, interleaved. A clip is a slow frame with the fast frames that
lead to it; the newest frame is slow. From the hidden state of <TEP> an MLP of three layers tells how much each clip has
to do with the sentence; the <SEG> of the best k clips are prompts for their slow frames, from which SAM 2 propagates.
"""

import json
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from virst_engine.model.config import LanguageModelConfig, VideoEncoderConfig, from_fields, with_parts
from virst_engine.model.video_language import Question, Understood, VideoLanguage, VisualTokens
from virst_engine.model.window import check_window, window_ages, window_cells

SUPERVISIONS = ("clip", "frame")


@dataclass(frozen=True)
class TempVrsConfig:
    name: str = "tempvrs"
    video: VideoEncoderConfig = field(default_factory=lambda: VideoEncoderConfig(fine_newest=True))
    language: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    prompt_channels: int = 256  # of SAM 2's prompts
    slow_frames: int = 8  # K_s
    fast_between: int = 2  # fast frames between two slow ones; K_f = fast_between * (K_s - 1)
    fast_pool: int = 2  # fast_pool x fast_pool tokens of a frame are averaged: N_f = tokens per frame / fast_pool^2
    several_seg: bool = True  # one <SEG> per clip; False: one for all
    supervision: str = "clip"  # what <TEP> tells of: clips or frames (table 5)
    top_k: int = 5  # clips whose slow frames become nodes
    words: tuple[str, ...] = ()  # as in VirstConfig
    segmenter: str = ""  # SHA-256 of the weights whose SAM 2 the prompts are for

    def __post_init__(self) -> None:
        if self.supervision not in SUPERVISIONS:
            raise ValueError(f"the supervision of <TEP> must be one of {SUPERVISIONS}, got {self.supervision!r}")
        if min(self.slow_frames, self.fast_pool) < 1 or self.fast_between < 0:
            raise ValueError("slow_frames and fast_pool must be 1 or more, fast_between 0 or more")
        check_window(self.video, self.window_frames, self.phases)
        if not 0 < self.top_k <= self.slow_frames:
            raise ValueError(f"top_k must be 1 to {self.slow_frames}, got {self.top_k}")
        if (self.video.grid // self.video.pool) % self.fast_pool:
            raise ValueError(f"fast_pool {self.fast_pool} does not divide the tokens of a frame")

    @property
    def phases(self) -> int:
        return self.fast_between + 1

    @property
    def window_frames(self) -> int:
        return (self.slow_frames - 1) * self.phases + 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "TempVrsConfig":
        """Raises KeyError, TypeError or ValueError on anything that `to_json` did not write."""
        built: TempVrsConfig = from_fields(TempVrsConfig, with_parts(text))
        return built


@dataclass(frozen=True)
class TempVrsOutput:
    prompts: Float[Tensor, "rows clips 1 c"]  # for the slow frame of each clip
    relevance_logits: Float[Tensor, "rows told"]  # of each clip, or of each frame (`supervision`)
    understood: Understood


def clip_relevance(logits: Float[Tensor, "rows told"], slow_frames: int, phases: int) -> Float[Tensor, "rows clips"]:
    """Of each clip; where <TEP> tells of frames, the mean of a clip's frames."""
    if logits.shape[1] == slow_frames:
        return logits
    first, rest = logits[:, :1], logits[:, 1:].unflatten(1, (slow_frames - 1, phases))
    return torch.cat((first, rest.mean(dim=2)), dim=1)


class TempVrs(VideoLanguage):
    """The reasoner of the method `tempvrs`; SAM 2 is the segmenter's."""

    def __init__(self, config: TempVrsConfig) -> None:
        super().__init__(config.video, config.language)
        self.config = config
        hidden, clips = config.language.hidden, config.slow_frames
        self.tep_embedding = nn.Parameter(torch.randn(1, hidden) * 0.02)
        self.seg_embedding = nn.Parameter(torch.randn(clips if config.several_seg else 1, hidden) * 0.02)
        told = clips if config.supervision == "clip" else config.window_frames
        self.tep_mlp = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, told)
        )
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.prompt_channels)
        )

    def encode(self, frames: Float[Tensor, "b t 3 size size"]) -> VisualTokens:
        """Normalised frames of a whole window: slow and fast frames interleaved, then the newest one in detail.

        Raises ValueError for another number of frames than `window_frames`.
        """
        config = self.config
        if frames.shape[1] != config.window_frames:
            raise ValueError(f"a window has {config.window_frames} frames, got {frames.shape[1]}")
        cells = window_cells(self, frames, config.phases)
        ages = window_ages(config.window_frames, config.phases).to(cells.device)
        tokens = self.coarse_tokens(cells) + self.time_embedding(ages)
        parts, begins = [], []
        for t in range(config.window_frames):
            is_slow = t % config.phases == 0
            part = tokens[:, t] if is_slow else self._averaged(tokens[:, t])
            parts.append(part)
            # Positions advance with slow frames: those between share the position of the one before.
            begins += [is_slow, *[False] * (part.shape[1] - 1)]
        fine = self.fine_tokens(cells[:, -1])
        begins += [True, *[False] * (fine.shape[1] - 1)]
        return VisualTokens(torch.cat((*parts, fine), dim=1), torch.tensor(begins, device=cells.device))

    def _averaged(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b few d"]:
        side, pool = self.config.video.grid // self.config.video.pool, self.config.fast_pool
        maps = tokens.unflatten(1, (side // pool, pool, side // pool, pool))
        return maps.mean(dim=(2, 4)).flatten(1, 2)

    def question_about(
        self, visual: VisualTokens, text: Int[Tensor, "rows length"], text_valid: Bool[Tensor, "rows length"]
    ) -> Question:
        """Sentence, window, <TEP>, <SEG> of each clip, or one for all. `visual`: a row for each sentence."""
        seg: Tensor = self.seg_embedding
        if self.config.several_seg:  # each bears its slow frame's time
            ages = torch.arange(self.config.slow_frames - 1, -1, -1, device=text.device).float()
            seg = seg + self.time_embedding(ages)[0, :, 0]
        queries = torch.cat((self.tep_embedding, seg)).expand(len(text), -1, -1)
        return self.question(text, text_valid, visual, queries)

    def prompts(
        self,
        question: Question,
        answer: Int[Tensor, "rows answer"] | None = None,
        answer_valid: Bool[Tensor, "rows answer"] | None = None,
    ) -> TempVrsOutput:
        understood = self.understand(question, answer, answer_valid)
        tep, seg = understood.queries[:, 0], understood.queries[:, 1:]
        prompts = self.text_hidden_fcs(seg).expand(-1, self.config.slow_frames, -1)
        return TempVrsOutput(prompts[:, :, None], self.tep_mlp(tep), understood)
