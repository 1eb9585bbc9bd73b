# SPDX-License-Identifier: Apache-2.0
"""The small video encoder of `tabletop-tiny`: a convolutional stem and a few space-time transformer layers.

It stands where VideoChat-Flash's UMT-L stands at full size: frames of a short clip attend to each other, then tokens
are merged (here by concatenation) to a few per frame. A BatchNorm residual stem learns shapes, a strided patch stem did
not. The stem sees what has changed since the frame before, too: a few pixels of motion are lost in cells of 16 pixels.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from virst_engine.model.config import VideoEncoderConfig


class _ResidualDown(nn.Module):
    """Halve the side: two 3x3 convolutions with BatchNorm and a strided 1x1 shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False)

    def forward(self, x: Float[Tensor, "b ci h w"]) -> Float[Tensor, "b co h2 w2"]:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class VideoEncoder(nn.Module):
    """Normalised frames -> a few tokens per frame."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = (2 * 3, *config.stem_channels)  # a frame and its change
        self.stem = nn.Sequential(*(_ResidualDown(a, b) for a, b in pairwise(widths)))
        d = config.channels
        self.space_embedding = nn.Parameter(torch.randn(1, 1, config.grid**2, d) * 0.02)
        self.time_embedding = nn.Parameter(torch.randn(1, config.clip_frames, 1, d) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d, config.heads, config.feedforward, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(d)

    def cells(self, frames: Float[Tensor, "b t 3 size size"]) -> Float[Tensor, "b t cells d"]:
        """Features of every cell of the grid, before merging. `t` is padded up to whole short clips inside."""
        batch, count = frames.shape[:2]
        clip = self.config.clip_frames
        change = torch.diff(frames, dim=1, prepend=frames[:, :1])  # nothing has changed before the first frame
        maps = self.stem(torch.cat((frames, change), dim=2).flatten(0, 1))
        maps = maps.flatten(2).transpose(1, 2).unflatten(0, (batch, count))
        missing = -count % clip
        if missing:
            maps = torch.cat((maps, maps[:, -1:].expand(-1, missing, -1, -1)), dim=1)
        clips = maps.unflatten(1, (-1, clip)).flatten(0, 1) + self.space_embedding + self.time_embedding
        x = clips.flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).unflatten(1, (clip, -1)).unflatten(0, (batch, -1)).flatten(1, 2)
        return x[:, :count]

    def merge(self, cells: Float[Tensor, "b t cells d"]) -> Float[Tensor, "b t tokens d2"]:
        """Put pool x pool cells side by side in one token of pool * pool * d channels: nothing is lost."""
        side, pool = self.config.grid, self.config.pool
        maps = cells.transpose(2, 3).unflatten(3, (side, side)).flatten(0, 1)
        merged = F.pixel_unshuffle(maps, pool).flatten(2).transpose(1, 2)
        return merged.unflatten(0, cells.shape[:2])

    def forward(self, frames: Float[Tensor, "b t 3 size size"]) -> Float[Tensor, "b t tokens d2"]:
        return self.merge(self.cells(frames))
