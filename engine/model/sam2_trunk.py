# SPDX-License-Identifier: Apache-2.0
"""Hiera, SAM 2's trunk, without the work on its padding.

Where windows do not fill the image (14 x 14 cells in 32 x 32), sam2 pads before the projection to queries, keys and
values, and crops after the projection of what comes out: at 512 pixels, stage 3 works on 42 x 42 cells. What the first
projection makes of zeros is its bias, and the second one works cell by cell, so that padding in between gives the same
numbers.
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

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

    # Queries, keys and values by a product of matrices each, cut into windows and heads in one step: ONNX Runtime would
    # copy them out of the one result, and once more for each step.
    projects_apart = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self._attend(*self._project(x)))
        return out

    def forward_apart(self, x: Tensor, window: int) -> Tensor:
        """For the whole image, not cut into windows yet; `window` 0: there are none.

        Only queries have a bias. That of the keys adds the same to all scores of a query, which no softmax sees; that
        of the values is added to each average, so that it belongs to the last bias. Keys and values are then padded
        with zeros.
        """
        weights, (bias_q, _, bias_v) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, (bias_q, None, None), strict=True))
        if self.q_pool:
            q = pool_of_image(q, self.q_pool)  # windows begin at even cells
        size = (q.shape[1], q.shape[2])
        own = window * size[0] // x.shape[1]
        q = _heads_of_windows(q, own, self.num_heads)
        k, v = (_heads_of_windows(y, window, self.num_heads) for y in (k, v))
        out = _image_of_heads(F.scaled_dot_product_attention(q, k, v), own, size)
        return F.linear(out, self.proj.weight, self.proj.bias + self.proj.weight @ bias_v)

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
        if not window:
            return self.qkv(x).chunk(3, dim=-1)
        out = window_partition(F.linear(x, self.qkv.weight), window)[0] + self.qkv.bias
        return out.chunk(3, dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.q_pool:
            q = do_pool(q, self.q_pool)
        size = q.shape[1:3]
        q, k, v = (x.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(1, size)


def pool_of_image(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """`do_pool` of b h w c without a turn to channels first, rows before columns."""
    rows, columns = cast(tuple[int, int], pool.kernel_size)
    b, height, width, channels = x.shape
    x = x.reshape(b, height // rows, rows, width * channels).amax(dim=2)
    return x.reshape(b, height // rows, width // columns, columns, channels).amax(dim=3)


def _heads_of_windows(x: Tensor, window: int, heads: int) -> Tensor:
    """b h w c -> b * windows, heads, cells, channels; with one head nothing moves but for the windows."""
    b, height, width, _ = x.shape
    if not window:
        x = x.flatten(1, 2)
        return x[:, None] if heads == 1 else x.unflatten(2, (heads, -1)).transpose(1, 2)
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window)) if height % window or width % window else x
    x = x.reshape(b, x.shape[1] // window, window, x.shape[2] // window, window, -1)
    if heads == 1:  # one axis moves: ONNX Runtime has threads for that
        return x.transpose(2, 3).reshape(-1, 1, window * window, x.shape[-1])
    x = x.unflatten(5, (heads, -1)).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, heads, window * window, x.shape[-1])


def _image_of_heads(x: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """The way back, without the padding; `size`: of the image."""
    heads, channels = x.shape[1], x.shape[3]
    if not window:
        x = x[:, 0] if heads == 1 else x.transpose(1, 2).flatten(2)
        return x.unflatten(1, size)
    rows, columns = (-(-cells // window) for cells in size)
    if heads == 1:
        x = x.reshape(-1, rows, columns, window, window, channels).transpose(2, 3)
    else:
        x = x.reshape(-1, rows, columns, heads, window, window, channels).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(-1, rows * window, columns * window, heads * channels)
    return x[:, : size[0], : size[1]] if x.shape[1:3] != size else x


class LatePaddingBlock(MultiScaleBlock):
    """sam2's MultiScaleBlock with padding inside the attention."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        is_padded = bool(self.window_size) and bool(height % self.window_size or width % self.window_size)
        if not is_padded and not self.attn.projects_apart:
            return super().forward(x)
        attend = self.attn.forward_apart if self.attn.projects_apart else self.attn.forward_in_windows
        shortcut, x = x, self.norm1(x)
        if self.dim != self.dim_out:
            pool = pool_of_image if self.attn.projects_apart else do_pool
            shortcut = pool(self.proj(x), self.pool)
        x = shortcut + self.drop_path(attend(x, self.window_size))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


def pad_late(trunk: Hiera) -> Hiera:
    """Let the blocks of `trunk` pad as late as they can; parameters and results stay the same."""
    for block in trunk.blocks:
        block.__class__ = LatePaddingBlock
        block.attn.__class__ = TrunkAttention
    return trunk
