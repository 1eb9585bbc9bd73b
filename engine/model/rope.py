# SPDX-License-Identifier: Apache-2.0
"""Real-valued rotary position encodings: tables of cosines and sines, applied to interleaved pairs of channels.

Complex numbers (`view_as_complex` in sam2/modeling/position_encoding.py) do not export; these multiply-adds do, and
give the same numbers.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "*batch tokens d"],
    cos: Float[Tensor, "*#rest tokens pairs"],
    sin: Float[Tensor, "*#rest tokens pairs"],
) -> Float[Tensor, "*batch tokens d"]:
    """Rotate channel pairs (0, 1), (2, 3), ... by the tables' angles; channels past 2 * pairs stay as they are."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def axial_angles(
    dim: int, width: int, height: int, theta: float = 10000.0, *, stride: int = 1
) -> Float[Tensor, "tokens pairs"]:
    """SAM 2's axial RoPE: the first dim/4 pairs turn with x, the others with y (sam2 compute_axial_cis).

    With `stride`, each token stands in the middle of stride x stride cells.
    """
    frequency = 1.0 / (theta ** (torch.arange(0, dim, 4)[: dim // 4].float() / dim))
    token = torch.arange(width * height)
    x, y = (token % width).float(), torch.div(token, width, rounding_mode="floor").float()
    x, y = (stride * axis + (stride - 1) / 2 for axis in (x, y))
    return torch.cat((torch.outer(x, frequency), torch.outer(y, frequency)), dim=-1)


def axis_angles(position: Float[Tensor, " tokens"], dim: int, theta: float = 10000.0) -> Float[Tensor, "tokens pairs"]:
    """Angles of one axis that owns `dim` channels: frequency i is theta ** -(2 i / dim)."""
    frequency = theta ** -(torch.arange(0, dim, 2, device=position.device).float() / dim)
    return torch.outer(position, frequency)
