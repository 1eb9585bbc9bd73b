# SPDX-License-Identifier: Apache-2.0
"""A window of densely sampled frames, for methods that look at more moments than VIRST's clip has.

The video encoder of `tabletop-tiny` knows motion between frames of one rate (0.3 s). A denser window is several clips
of that rate, interleaved: frame i belongs to clip i mod `phases`. Each is encoded for itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from virst_engine.model.config import VideoEncoderConfig
from virst_engine.model.video_language import VideoLanguage


def check_window(video: VideoEncoderConfig, frames: int, phases: int) -> None:
    """Raises ValueError for a window that a network cannot be built for."""
    if not video.fine_newest:
        raise ValueError("this method shows a frame in detail: its video encoder needs fine_newest")
    if video.pool < 1 or phases < 1:
        raise ValueError("pool and phases must be 1 or more")
    if not 2 <= frames <= video.max_frames * phases:
        raise ValueError(f"a window has 2 to {video.max_frames * phases} frames, got {frames}")


def window_cells(
    model: VideoLanguage, frames: Float[Tensor, "b t 3 size size"], phases: int
) -> Float[Tensor, "b t cells d"]:
    """The video encoder's cells of every frame of a window, oldest first."""
    first = model.video_encoder.cells(frames[:, ::phases])
    cells = first.new_zeros(frames.shape[0], frames.shape[1], *first.shape[2:])
    cells[:, ::phases] = first
    for phase in range(1, min(phases, frames.shape[1])):
        cells[:, phase::phases] = model.video_encoder.cells(frames[:, phase::phases])
    return cells


def window_ages(frames: int, phases: int) -> Float[Tensor, " t"]:
    """How much older than the newest each frame is, in frames of the video encoder's rate."""
    return torch.arange(frames - 1, -1, -1).float() / phases
