# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685) of a published checkpoint, merged into the weights that they adapt.

The names are those of peft 0.4.0, `q_proj.lora_A.default.weight` beside `q_proj.weight`; newer versions call the latter
`q_proj.base_layer.weight`, and leave out the adapter's name where it is saved alone.
"""

import re

from jaxtyping import Float
from torch import Tensor

RANK, ALPHA = 64, 16
SCALE = ALPHA / RANK
ADAPTED = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)  # of every layer of the language model
_ADAPTER = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


def adapter_of(name: str) -> tuple[str, str] | None:
    """The weight that tensor `name` adapts, and A or B; None where it is no adapter."""
    match = _ADAPTER.match(name)
    return (f"{match['layer']}.weight", match["side"]) if match else None


def plain_name(name: str) -> str:
    """The name that a weight has without an adapter."""
    return name.replace(".base_layer.", ".")


def merge_adapter(
    weight: Float[Tensor, "out inner"], a: Float[Tensor, "rank inner"], b: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, "out inner"]:
    """W + scale * B @ A, computed in float32, in the type of `weight`."""
    return weight.float().addmm(b.float(), a.float(), alpha=scale).to(weight.dtype)
