# SPDX-License-Identifier: Apache-2.0
"""UMT-L, the video encoder of VideoChat-Flash: a plain vision transformer over all patches of a short clip.

Parameter names are those of the published weights (`encoder` of OpenGVLab/VideoChat-Flash-Qwen2-7B_res448); the code is
our own. Facts about it: 23 blocks, pre-norm, keys without bias, GELU, a last LayerNorm with epsilon 1e-12, and a
sinusoidal positional encoding of 4 x 14 x 14 patches that is enlarged to the grid of the input.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from virst_engine.model.virst_7b_config import UmtConfig

BLOCK_EPSILON, LAST_EPSILON = 1e-6, 1e-12


class UmtAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b tokens c"]:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class UmtFeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b tokens c"]:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class UmtBlock(nn.Module):
    def __init__(self, config: UmtConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.channels, eps=BLOCK_EPSILON)
        self.attn = UmtAttention(config.channels, config.heads)
        self.norm2 = nn.LayerNorm(config.channels, eps=BLOCK_EPSILON)
        self.mlp = UmtFeedForward(config.channels, config.feedforward)

    def forward(self, x: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b tokens c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UmtEncoder(nn.Module):
    """Short clips -> one token per patch."""

    position: Tensor

    def __init__(self, config: UmtConfig) -> None:
        super().__init__()
        self.config = config
        patch = (1, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.channels, kernel_size=patch, stride=patch)})
        self.blocks = nn.ModuleList(UmtBlock(config) for _ in range(config.layers))
        self.vision_layernorm = nn.LayerNorm(config.channels, eps=LAST_EPSILON)
        self.register_buffer("position", sine_position(config), persistent=False)

    def forward(self, frames: Float[Tensor, "b t 3 size size"]) -> Float[Tensor, "b tokens c"]:
        """`frames`: normalised, `clip_frames` of them. Tokens frame by frame, then row by row."""
        x = self.patch_embed["proj"](frames.transpose(1, 2)).flatten(2).transpose(1, 2)
        x = x + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.vision_layernorm(x)
        return out


def sine_position(config: UmtConfig) -> Float[Tensor, "tokens c"]:
    """Sines and cosines of the running number of a patch in a clip of the trained grid; each frame's map is enlarged.

    Always on the CPU and computed in float64, also where a model is built on the meta device.
    """
    trained, grid, channels = config.trained_grid, config.grid, config.channels
    number = torch.arange(config.clip_frames * trained**2, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
    angle = torch.outer(number, frequency)
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()
    if grid == trained:
        return table
    maps = table.unflatten(0, (config.clip_frames, trained, trained)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)
