# SPDX-License-Identifier: Apache-2.0
"""Token merging (ToMe, arXiv 2210.09461) as VideoChat-Flash uses it: the tokens of a short clip become a few.

Each round halves the tokens at most: every other token (a source) looks for the most similar of the rest (targets), and
the most similar pairs become one token, the mean of everything that it stands for.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def merge_tokens(tokens: Float[Tensor, "b tokens c"], wanted: int, heads: int) -> Float[Tensor, "b wanted c"]:
    """`wanted` tokens for each row: first the sources that were not merged, most similar first, then the targets.

    Similarity is the cosine of tokens averaged over `heads` parts of their channels. Computed in float32, whatever the
    tokens are: a token may stand for more others than bfloat16 can count. Raises ValueError where there are fewer
    tokens than wanted.
    """
    if not 0 < wanted <= tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens cannot be merged into {wanted}")
    x = tokens.float()
    size = x.new_ones(*x.shape[:2], 1)
    while (excess := x.shape[1] - wanted) > 0:
        x, size = _merge_pairs(x, size, min(excess, x.shape[1] // 2), heads)
    return x.to(tokens.dtype)


def _merge_pairs(
    x: Float[Tensor, "b tokens c"], size: Float[Tensor, "b tokens 1"], count: int, heads: int
) -> tuple[Float[Tensor, "b fewer c"], Float[Tensor, "b fewer 1"]]:
    """One round: `count` sources go into their targets. `size`: how many tokens of the input one stands for."""
    direction = F.normalize(x.unflatten(2, (heads, -1)).mean(dim=2), dim=-1)
    similarity = direction[:, 0::2] @ direction[:, 1::2].transpose(1, 2)
    best, target = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    going, staying = order[:, :count], order[:, count:]
    destination = target.gather(1, going)

    weighted = torch.cat((x * size, size), dim=2)  # sums of channels, and of sizes, go the same way
    sources, targets = weighted[:, 0::2], weighted[:, 1::2]
    channels = weighted.shape[2]

    def spread(index: Tensor) -> Tensor:
        return index[:, :, None].expand(-1, -1, channels)

    targets = targets.scatter_add(1, spread(destination), sources.gather(1, spread(going)))
    merged = torch.cat((sources.gather(1, spread(staying)), targets), dim=1)
    return merged[:, :, :-1] / merged[:, :, -1:], merged[:, :, -1:]
