# SPDX-License-Identifier: Apache-2.0
"""A fake segmenter that knows where things were, so that it can tell two of one colour apart; and videos of such."""

from dataclasses import replace

import numpy as np
import torch

from tests.fakes import RED, FakeStages, Square, Video
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryEntry, MemoryTensors, PromptTokens

MASK_SIDE = 16
CELLS = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))  # 2 16 16: row, column


class LocalStages(FakeStages):
    """Sees the remembered colour only within the reach of the place where its newest memory saw it.

    The sentence's own prompts see the colour everywhere, and so does a memory of things that were far apart.
    """

    reach = 3.5  # cells from the middle of what was remembered, beyond half its size
    # Channels 5 and 6 of a pointer: middle of the mask, row and column; 7: how far its pixels are from there.

    def memory_attention(
        self, features: ImageFeatures, memory: MemoryTensors, frame_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        conditioned = super().memory_attention(features, memory, frame_of)
        distance = memory.pointer_distance.masked_fill(~memory.pointer_valid, float("inf"))
        newest = memory.pointers[torch.arange(len(distance)), distance.argmin(dim=1)]
        conditioned[:, 5:8] = newest[:, 5:8, None, None]
        return conditioned

    def mask_decoder(
        self, features: ImageFeatures, conditioned: torch.Tensor | None, prompts: PromptTokens | None
    ) -> MaskPrediction:
        found = super().mask_decoder(features, conditioned, prompts)
        if conditioned is not None:
            told = conditioned[:, 5:8, 0, 0]
            away = (CELLS[None] - told[:, :2, None, None]).norm(dim=1)
            near = away <= told[:, 2, None, None] + self.reach
            logits = torch.where(near, found.mask_logits, torch.full_like(found.mask_logits, -1.0))
            present = (logits > 0).flatten(1).any(dim=1).float() * (0.0 if self.is_blind else 1.0)
            found = replace(found, mask_logits=logits, object_score_logits=8.0 * present - 4.0)
        return replace(found, pointer=_placed(found))

    def mask_prediction(self, features: ImageFeatures, mask: torch.Tensor) -> MaskPrediction:
        found = super().mask_prediction(features, mask)
        return replace(found, pointer=_placed(found))

    def memory_encoder(
        self, features: ImageFeatures, prediction: MaskPrediction, binarize: torch.Tensor | None = None
    ) -> MemoryEntry:
        return super().memory_encoder(features, prediction, binarize)


def _placed(found: MaskPrediction) -> torch.Tensor:
    pointer = found.pointer.clone()
    for i, logits in enumerate(found.mask_logits):
        cells = CELLS[:, logits > 0]
        if cells.shape[1]:
            middle = cells.mean(dim=1)
            pointer[i, 5:7] = middle
            pointer[i, 7] = (cells - middle[:, None]).norm(dim=0).max()
    return pointer


def place(t: int, first: tuple[int, int], last: tuple[int, int], begin: int, end: int) -> tuple[int, int]:
    """On the way from one cell to another between two frames."""
    part = min(max((t - begin) / (end - begin), 0.0), 1.0)
    row, column = (round(a + part * (b - a)) for a, b in zip(first, last, strict=True))
    return row, column


def red_square(row: int, column: int, cells: int = 3, hidden: range = range(0)) -> Square:
    """Stands still, but for the frames in which it is not there."""
    return Square(RED, lambda t: None if t in hidden else (row, column), cells)


def truths(video: Video, t: int) -> list[np.ndarray]:
    return [video.truth(t, number) for number in range(len(video.squares))]
