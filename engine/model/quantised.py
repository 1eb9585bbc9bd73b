# SPDX-License-Identifier: Apache-2.0
"""The language model of `virst-7b` in 8 or 4 bits a weight, by bitsandbytes, an optional package.

- 8: int8 with a scale for each row; inputs of 6 or more are computed without rounding (LLM.int8(), arXiv 2208.07339).
- 4: the 16 levels of nf4 with a scale for each 64 weights (QLoRA, arXiv 2305.14314, without its quantised scales).

Only the linear layers of the decoder blocks are quantised: 81 % of the reasoner's bytes, and what both papers measured.
Embeddings, `lm_head`, norms, the video encoder, the projector and ST-Fusion stay as they are stored.
"""

import logging
import re
import sys
from types import ModuleType

import torch
from torch import Tensor, nn

from virst_engine.errors import WeightsError

OUTLIER = 6.0  # LLM.int8()'s threshold
NF4_BLOCK = 64  # weights that share a scale
NF4_ROWS = 32  # that bitsandbytes packs together for CPUs with AVX512-BF16
_QUANTISED = re.compile(r"language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight")


def is_quantised(name: str) -> bool:
    """Whether this is the name of a weight that may be in fewer bits than it is stored in."""
    return _QUANTISED.fullmatch(name) is not None


def quantised_bytes(shape: tuple[int, ...], weight_bits: int) -> int:
    """Of a weight, out x in, in 8 or 4 bits, with its scales."""
    count = torch.Size(shape).numel()
    return count + 4 * shape[0] if weight_bits == 8 else count // 2 + 4 * (count // NF4_BLOCK)


def quantise_layers(model: nn.Module, weight_bits: int) -> dict[str, nn.Linear]:
    """Put layers of 8 or 4 bits in the place of those that `is_quantised` names; by the name of their weight.

    `model` and the new layers are without numbers, see `put_weight`. 16 bits: nothing changes, and there are none.
    Raises ValueError for other numbers of bits, WeightsError without bitsandbytes or for sizes that it gets wrong.
    """
    if weight_bits == 16:
        return {}
    if weight_bits not in (8, 4):
        raise ValueError(f"weights have 16, 8 or 4 bits, got {weight_bits}")
    bnb = load_bitsandbytes()
    placed: dict[str, nn.Linear] = {}
    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, nn.Linear) and is_quantised(f"{name}.weight")):
            continue
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        if weight_bits == 8:
            new = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        else:
            # bitsandbytes 0.50.2 on a CPU mixes up the scales of blocks that span rows.
            if layer.in_features % NF4_BLOCK or layer.out_features % NF4_ROWS:
                raise WeightsError(
                    f"4-bit weights need layers of a multiple of {NF4_BLOCK} inputs and of {NF4_ROWS} outputs, "
                    f"{name} has {sizes[0]} and {sizes[1]}; use --weight-bits 8"
                )
            new = bnb.nn.Linear4bit(*sizes, has_bias, quant_type="nf4", compress_statistics=False, device="meta")
        parent, _, own = name.rpartition(".")
        # In training mode bitsandbytes computes in another way.
        setattr(model.get_submodule(parent), own, new.train(layer.training))
        placed[f"{name}.weight"] = new
    return placed


def put_weight(layer: nn.Linear, weight: Tensor, device: str) -> None:
    """Quantise `weight` (out x in, of any float type) on `device`, into a layer of `quantise_layers`.

    `weight` must be on the CPU: bitsandbytes leaves int8 weights that are on a GPU already as they are.
    """
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.weight = packed.to(device)


def load_bitsandbytes() -> ModuleType:
    """Raises WeightsError where it is missing or does not load."""
    # At every int8 layer it warns that inputs become float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # On CPUs with AVX512-BF16 it would download a kernel, and run it, where the package `kernels` is installed.
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python spells "cannot be imported"
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise WeightsError(
            f"weights in 8 or 4 bits need bitsandbytes ({error}): pip install bitsandbytes, or use --weight-bits 16"
        ) from error
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    return bitsandbytes
