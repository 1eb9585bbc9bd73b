# SPDX-License-Identifier: Apache-2.0
"""Hiera, SAM 2's trunk, without the work on its padding.

Where windows do not fill the image (14 x 14 cells in 32 x 32), sam2 pads before the projection to queries, keys and
values, and crops after the projection of what comes out: at 512 pixels, stage 3 works on 42 x 42 cells. What the first
projection makes of zeros is its bias, and the second one works cell by cell, so that padding in between gives the same
numbers.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from virst_engine.errors import VirstError

try:
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock, do_pool
    from sam2.modeling.backbones.utils import window_partition, window_unpartition
except ModuleNotFoundError as error:
    raise VirstError(
        f"the package {error.name} is missing; run ./scripts/setup, or: pip install --no-deps sam2==1.1.0"
    ) from error


class TrunkAttention(MultiScaleAttention):
    """sam2's MultiScaleAttention (modeling/backbones/hieradet.py at 2b90b9f) in steps, and with padding in between."""

    # Queries, keys and values by a product of matrices each: ONNX Runtime would copy them out of the one result.
    projects_apart = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self._attend(*self._project(x)))
        return out

    def forward_in_windows(self, x: Tensor, window: int) -> Tensor:
        """For an image that windows do not fill."""
        height, width = x.shape[1:3]
        padded = (height + -height % window, width + -width % window)
        out = self._attend(*self._project(x, window))
        stride = window // out.shape[1]
        padded, size = ((h // stride, w // stride) for h, w in (padded, (height, width)))
        projected: Tensor = self.proj(window_unpartition(out, window // stride, padded, size))
        return projected

    def _project(self, x: Tensor, window: int = 0) -> Sequence[Tensor]:
        """Queries, keys and values, of windows if there is one."""
        weights, biases = [self.qkv.weight], [self.qkv.bias]
        if self.projects_apart:
            weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        if window:
            parts = [window_partition(F.linear(x, w), window)[0] + b for w, b in zip(weights, biases, strict=True)]
        else:
            parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return parts if self.projects_apart else parts[0].chunk(3, dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.q_pool:
            q = do_pool(q, self.q_pool)
        size = q.shape[1:3]
        q, k, v = (x.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(1, size)


class LatePaddingBlock(MultiScaleBlock):
    """sam2's MultiScaleBlock with padding inside the attention."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.window_size or not (height % self.window_size or width % self.window_size):
            return super().forward(x)
        shortcut, x = x, self.norm1(x)
        if self.dim != self.dim_out:
            shortcut = do_pool(self.proj(x), self.pool)
        x = shortcut + self.drop_path(self.attn.forward_in_windows(x, self.window_size))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


def pad_late(trunk: Hiera) -> Hiera:
    """Let the blocks of `trunk` pad as late as they can; parameters and results stay the same."""
    for block in trunk.blocks:
        block.__class__ = LatePaddingBlock
        block.attn.__class__ = TrunkAttention
    return trunk
