# SPDX-License-Identifier: Apache-2.0
"""Hiera, SAM 2's trunk, without the work on its padding.

Where windows do not fill the image (14 x 14 cells in 32 x 32), sam2 pads before the projection to queries, keys and
values, and crops after the projection of what comes out: at 512 pixels, stage 3 works on 42 x 42 cells. What the first
projection makes of zeros is its bias, and the second one works cell by cell, so that padding in between gives the same
numbers.
"""

import torch.nn.functional as F
from torch import Tensor

from virst_engine.errors import VirstError

try:
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock, do_pool
    from sam2.modeling.backbones.utils import window_partition, window_unpartition
except ModuleNotFoundError as error:
    raise VirstError(
        f"the package {error.name} is missing; run ./scripts/setup, or: pip install --no-deps sam2==1.1.0"
    ) from error


class LatePaddingBlock(MultiScaleBlock):
    """sam2's MultiScaleBlock (modeling/backbones/hieradet.py at 2b90b9f) with padding inside the attention."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.window_size or not (height % self.window_size or width % self.window_size):
            return super().forward(x)
        shortcut, x = x, self.norm1(x)
        if self.dim != self.dim_out:
            shortcut = do_pool(self.proj(x), self.pool)
        x = shortcut + self.drop_path(self._attend_in_windows(x))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def _attend_in_windows(self, x: Tensor) -> Tensor:
        attention, window = self.attn, self.window_size
        height, width = x.shape[1:3]
        qkv, (padded_height, padded_width) = window_partition(F.linear(x, attention.qkv.weight), window)
        qkv = (qkv + attention.qkv.bias).flatten(1, 2).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = qkv.unbind(2)  # windows, cells, heads, channels
        if attention.q_pool:
            pooled = do_pool(q.flatten(2).unflatten(1, (window, window)), attention.q_pool)
            stride = window // pooled.shape[1]
            q = pooled.flatten(1, 2).unflatten(2, (attention.num_heads, -1))
            window, height, width = window // stride, height // stride, width // stride
            padded_height, padded_width = padded_height // stride, padded_width // stride
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(1, (window, window))
        out = window_unpartition(out, window, (padded_height, padded_width), (height, width))
        projected: Tensor = attention.proj(out)
        return projected


def pad_late(trunk: Hiera) -> Hiera:
    """Let the blocks of `trunk` pad as late as they can; parameters and results stay the same."""
    for block in trunk.blocks:
        block.__class__ = LatePaddingBlock
    return trunk
