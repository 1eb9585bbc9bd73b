# SPDX-License-Identifier: Apache-2.0
"""The four stages as modules that torch can export: named tensors in and out, constants computed, precision applied.

Attention is written out (scaled queries times keys, plus mask, softmax, times values): TensorRT fuses that pattern on
all its versions, and opset 18 has no attention of its own. Only what nobody but ONNX Runtime on CPUs reads, memory
attention for one object, has operators of ONNX Runtime's own.
"""

import copy
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from virst_engine.errors import ExportError
from virst_engine.model.sam2 import Rope, RopeAttention, Sam2
from virst_engine.model.sam2_trunk import TrunkAttention
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryTensors, PromptTokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In fp16 the errors of the other two grow from frame to frame through the memory; bf16 has the range of fp32.
IN_FP16 = ("image_encoder", "memory_attention")
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def stage_dtype(stage: str, precision: str) -> torch.dtype:
    """What a stage computes in."""
    return torch.float32 if precision == "fp16" and stage not in IN_FP16 else DTYPES[precision]


class StageModule(nn.Module):
    """One stage. What comes in and goes out is float32, whatever is computed in between."""

    outputs: tuple[str, ...]

    def __init__(self, sam2: Sam2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.sam2, self.dtype = sam2, dtype

    def _here(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.dtype) for x in tensors]

    def _features(self, **levels: Tensor) -> ImageFeatures:
        """The levels that a stage reads; one of them stands in for the others."""
        levels = {name: x.to(self.dtype) for name, x in levels.items()}
        first = next(iter(levels.values()))
        names = ("top", "high_res_s0", "high_res_s1", "fusion")
        return ImageFeatures(**{name: levels.get(name, first) for name in names})


class ImageEncoderStage(StageModule):
    """`fusion_level`: the FPN level of the output `fusion`; None or the last one: there is none, it is `top`."""

    outputs: tuple[str, ...] = ("top", "high_res_s0", "high_res_s1")

    def __init__(self, sam2: Sam2, dtype: torch.dtype = torch.float32, fusion_level: int | None = None) -> None:
        super().__init__(sam2, dtype)
        self.fusion_level = -1 if fusion_level is None else fusion_level
        if self.fusion_level not in (-1, 2):
            self.outputs = (*self.outputs, "fusion")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.sam2.encode_image(pixels.to(self.dtype), self.fusion_level)
        return tuple(getattr(features, name).float() for name in self.outputs)


class MemoryAttentionStage(StageModule):
    outputs = ("conditioned",)

    def forward(
        self,
        top: Tensor,
        spatial: Tensor,
        spatial_tpos: Tensor,
        spatial_valid: Tensor,
        pointers: Tensor,
        pointer_distance: Tensor,
        pointer_valid: Tensor,
    ) -> Tensor:
        spatial, pointers = self._here(spatial, pointers)
        # Distances stay float32: half precision does not count to 300.
        memory = MemoryTensors(spatial, spatial_tpos, spatial_valid, pointers, pointer_distance, pointer_valid)
        return self.sam2.attend_memory(self._features(top=top), memory).float()


class MemoryQueriesStage(StageModule):
    """The part of memory attention that objects share."""

    outputs = ("tokens", "queries")

    def forward(self, top: Tensor) -> tuple[Tensor, ...]:
        tokens, queries = self.sam2.memory_queries(self._features(top=top))
        return tokens.float(), queries.float()


class MemoryReadStage(StageModule):
    """The rest of it, for one object whose memories and pointers are all there."""

    outputs = ("conditioned",)

    def forward(
        self,
        tokens: Tensor,
        queries: Tensor,
        spatial: Tensor,
        spatial_tpos: Tensor,
        pointers: Tensor,
        pointer_distance: Tensor,
    ) -> Tensor:
        tokens, queries, spatial, pointers = self._here(tokens, queries, spatial, pointers)
        valid = (spatial_tpos >= 0, pointer_distance >= 0.0)  # not read
        memory = MemoryTensors(spatial, spatial_tpos, valid[0], pointers, pointer_distance, valid[1])
        return self.sam2.read_memory(tokens, queries, memory, is_complete=True).float()


class MaskDecoderStage(StageModule):
    outputs = ("mask_logits", "iou", "object_score_logits", "pointer")

    def forward(
        self,
        conditioned: Tensor,
        high_res_s0: Tensor,
        high_res_s1: Tensor,
        sparse: Tensor,
        sparse_valid: Tensor,
        multimask: Tensor,
    ) -> tuple[Tensor, ...]:
        conditioned, sparse = self._here(conditioned, sparse)
        features = self._features(high_res_s0=high_res_s0, high_res_s1=high_res_s1)
        prediction = self.sam2.decode_mask(features, conditioned, PromptTokens(sparse, sparse_valid, multimask))
        return tuple(getattr(prediction, name).float() for name in self.outputs)


class MemoryEncoderStage(StageModule):
    outputs = ("spatial",)

    def forward(self, top: Tensor, mask_logits: Tensor, object_score_logits: Tensor, binarize: Tensor) -> Tensor:
        (logits,) = self._here(mask_logits)
        pointer = object_score_logits[:, None]  # goes by, unused
        prediction = MaskPrediction(logits, object_score_logits, object_score_logits, pointer)
        return self.sam2.encode_memory(self._features(top=top), prediction, binarize).spatial.float()


KINDS: dict[str, type[StageModule]] = {
    "memory_attention": MemoryAttentionStage,
    "memory_queries": MemoryQueriesStage,
    "memory_read": MemoryReadStage,
    "mask_decoder": MaskDecoderStage,
    "memory_encoder": MemoryEncoderStage,
}


def stage_module(sam2: Sam2, stage: str, dtype: torch.dtype, fusion_level: int | None = None) -> StageModule:
    if stage == "image_encoder":
        return ImageEncoderStage(sam2, dtype, fusion_level).eval()
    return KINDS[stage](sam2, dtype).eval()


def with_tables(sam2: Sam2) -> Sam2:
    """A copy that computes the positions of image cells once, now."""
    sam2 = copy.deepcopy(sam2).eval().requires_grad_(False)
    trunk, prompts = sam2.image_encoder.trunk, sam2.sam_prompt_encoder
    cells = sam2.config.image_size // 4
    # The trunk's bicubic embedding, and the sines of the decoder.
    for module, method, table in (
        (trunk, "_get_pos_embed", trunk._get_pos_embed((cells, cells))),
        (prompts, "get_dense_pe", prompts.get_dense_pe()),
    ):
        module.register_buffer("position_table", table.detach(), persistent=False)
        setattr(module, method, _constant(module))
    return sam2


def rounded(sam2: Sam2, dtype: torch.dtype) -> Sam2:
    """Round weights and tables to `dtype`, in place. Convolutions stay float32 where `dtype` is bfloat16.

    Opset 18 knows no convolution in bfloat16. They are 2 to 5 % of the work.
    """
    sam2.to(dtype)
    if dtype is torch.bfloat16:
        for module in sam2.modules():
            if isinstance(module, CONVOLUTIONS):
                module.float()
    return sam2


def _constant(module: nn.Module) -> Callable[..., Tensor]:
    return lambda *_: cast(Tensor, module.position_table)


class _BakedRopeAttention(RopeAttention):
    """Whose projections give evens before odds by themselves."""

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return cast(Tensor, layer(x))


class _FusedRopeAttention(_BakedRopeAttention):
    """With two operators of ONNX Runtime, which no other runtime has, where torch writes them to a file.

    Attention goes block by block: no score leaves the processor's cache.
    """

    def rotate(self, x: Tensor, rope: Rope) -> Tensor:
        if not _writes_operators():
            return super().rotate(x, rope)
        return _rotary_embedding(x, torch.arange(x.shape[1]), rope)

    def rotate_memory(self, x: Tensor, rope: Rope, slots: int | torch.SymInt) -> Tensor:
        if not _writes_operators():
            return super().rotate_memory(x, rope, slots)
        cells = rope[0].shape[0]
        # A last row of the tables, which turns nothing, is the place of all that has none.
        cos, sin = (F.pad(table, (0, 0, 0, 1), value=value) for table, value in zip(rope, (1.0, 0.0), strict=True))
        places = torch.arange(cells).repeat(slots)
        places = torch.cat((places, torch.full((x.shape[1] - slots * cells,), cells)))
        return _rotary_embedding(x, places, (cos, sin))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _writes_operators() or bias is not None:
            return super().attend(q, k, v, bias)
        v = self.v_proj(v) if self.projects_values_first else v
        attributes: dict[str, Any] = {"num_heads": 1}
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            attributes,
            dtype=q.dtype,
            shape=(*q.shape[:2], v.shape[2]),
            version=1,
        )
        return self.out_proj(out if self.projects_values_first else self.v_proj(out))


def _writes_operators() -> bool:
    """Whether torch is writing a file; otherwise it has to compute. torch before 2.8 cannot write them."""
    return torch.onnx.is_in_onnx_export() and hasattr(torch.onnx, "ops")


def _rotary_embedding(x: Tensor, places: Tensor, rope: Rope) -> Tensor:
    """Each token as a sequence of its own: of one sequence, the tables would have to be as long."""
    tokens = x.flatten(0, 1)[:, None]
    attributes: dict[str, Any] = {"interleaved": 0}
    turned = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        (tokens, places[:, None], *rope),
        attributes,
        dtype=x.dtype,
        shape=tokens.shape,
        version=1,
    )
    return turned.reshape(x.shape)


def for_export(sam2: Sam2, *, values: str, fusion_level: int | None = None, fused: bool = False) -> Sam2:
    """Change a model of `with_tables` so that its graphs do no work that can be done once; it is changed in place.

    Args:
        values: "before" or "after": where memory attention projects its values (RopeAttention). "after" is for CPUs,
            where the trunk's attention projects queries, keys and values apart.
        fusion_level: the FPN level that is an output too.
        fused: for one object, and only for ONNX Runtime on CPUs: with operators of its own.
    """
    for module in sam2.modules():
        if isinstance(module, RopeAttention):
            for layer in (module.q_proj, module.k_proj):
                layer.weight.data = layer.weight.data[module.halves]
                layer.bias.data = layer.bias.data[module.halves]
            module.__class__ = _FusedRopeAttention if fused else _BakedRopeAttention
            _fold_output_into_values(module)
            module.projects_values_first = values == "before" or module.kv_in_dim == module.internal_dim
            if not module.projects_values_first:
                _multiply_with_bias(module.k_proj)
        if type(module).__name__ == "LayerNorm2d":
            module.forward = _layer_norm_2d(module)
        if isinstance(module, TrunkAttention):
            module.projects_apart = values == "after"
    if values == "after":
        for block in sam2.image_encoder.trunk.blocks:
            _multiply_with_bias(block.mlp.layers[0])
        for block in sam2.memory_encoder.fuser.layers:
            _multiply_with_bias(block.pwconv1)
        for layer in sam2.memory_attention.layers:
            _add_bias_after(layer)
    _fold_high_res_convolutions(sam2, fusion_level)
    for lateral in sam2.image_encoder.neck.convs:
        _multiply_by_cells(lateral)
    return sam2


def _multiply_by_cells(lateral: Any) -> None:
    """Make a 1 x 1 convolution a product of two matrices: the trunk has channels last."""
    convolution = lateral.conv
    linear: Any = nn.Linear(convolution.in_channels, convolution.out_channels)
    linear.weight.data, linear.bias.data = convolution.weight.data[:, :, 0, 0], convolution.bias.data
    lateral.conv = linear.requires_grad_(False)
    lateral.forward = lambda x: linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _multiply_with_bias(linear: Any) -> None:
    """Make the bias the weights of one more channel, a channel of ones.

    ONNX Runtime writes a bias all over the result and adds the product to it. Where the result has many more channels
    than what goes in, that takes longer than to write what goes in once more.
    """
    weight = torch.cat((linear.weight.data, linear.bias.data[:, None]), dim=1)
    linear.weight.data, linear.bias = weight, None
    linear.forward = lambda x: F.linear(F.pad(x, (0, 1), value=1.0), linear.weight)


def _add_bias_after(layer: Any) -> None:
    """relu(x + b) = max(x, -b) + b: the last b is added by the bias of the next product."""
    first, second = layer.linear1, layer.linear2
    assert layer.activation is F.relu
    least = -first.bias.data
    layer.activation = lambda x: torch.maximum(x, least)
    second.bias.data = (second.bias.double() + second.weight.double() @ first.bias.double()).to(second.bias.dtype)
    first.bias = None


def _fold_output_into_values(attention: Any) -> None:
    """With one head, what is projected to values and averaged, and then projected again, is projected once."""
    first, second = attention.v_proj, attention.out_proj
    folded: Any = nn.Linear(first.in_features, second.out_features)
    matrix = second.weight.double()
    folded.weight.data = (matrix @ first.weight.double()).to(first.weight.dtype)
    folded.bias.data = (matrix @ first.bias.double() + second.bias.double()).to(first.bias.dtype)
    attention.v_proj, attention.out_proj = folded.requires_grad_(False), nn.Identity()


def _layer_norm_2d(module: Any) -> Callable[[Tensor], Tensor]:
    """sam2's LayerNorm2d as the one operator that layer normalization is; it computes in float32 inside."""

    def forward(x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), module.weight.shape, module.weight, module.bias, module.eps)
        return x.permute(0, 3, 1, 2)

    return forward


def _fold_high_res_convolutions(sam2: Sam2, fusion_level: int | None) -> None:
    """Make one of the two 1 x 1 convolutions in a row (FPN, then conv_s0 or conv_s1) that nobody looks in between."""
    neck, decoder = sam2.image_encoder.neck, sam2.sam_mask_decoder
    for level, name in ((0, "conv_s0"), (1, "conv_s1")):
        if {level, level - 1} & set(neck.fpn_top_down_levels) or level == fusion_level:
            continue
        lateral = neck.convs[len(neck.convs) - 1 - level]
        first, second = lateral.conv, getattr(decoder, name)
        matrix = second.weight[:, :, 0, 0].double()
        folded: Any = nn.Conv2d(first.in_channels, second.out_channels, kernel_size=1)
        folded.weight.data = (matrix @ first.weight[:, :, 0, 0].double())[:, :, None, None].to(first.weight.dtype)
        folded.bias.data = (matrix @ first.bias.double() + second.bias.double()).to(first.bias.dtype)
        lateral.conv = folded.requires_grad_(False)
        setattr(decoder, name, nn.Identity())


def exportable(module: StageModule) -> StageModule:
    """Let a module run under ExportableFunctions whoever calls it; it is changed in place."""
    forward = module.forward

    @wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with ExportableFunctions(module.dtype):
            return forward(*args, **kwargs)

    module.forward = within
    return module


class ExportableFunctions(TorchFunctionMode):
    """While it is active, attention is written out, and types are `dtype` or those that opset 18 has operators for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.gelu:
            return _gelu(*args, **kwargs)
        if function is F.linear and args[0].ndim == 3 and self._dtype is torch.float32:
            # ONNX Runtime adds the bias within a product of two matrices, not within one of many.
            return function(args[0].flatten(0, 1), *args[1:], **kwargs).unflatten(0, args[0].shape[:2])
        if function in (torch.conv2d, torch.conv_transpose2d):
            x, weight, *rest = args
            return function(x.to(weight.dtype), weight, *rest, **kwargs).to(x.dtype)
        if function in (F.max_pool2d, torch.max_pool2d) and args[0].dtype is torch.bfloat16:
            return function(args[0].float(), *args[1:], **kwargs).to(torch.bfloat16)
        out = function(*args, **kwargs)
        # The FPN adds its coarser level in float32.
        return out.to(self._dtype) if function is F.interpolate and kwargs["mode"] == "nearest" else out


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """In the order of products that ONNX Runtime recognises, and runs as one operator."""
    assert approximate == "none", "SAM 2 uses the exact GELU"
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) * 0.5


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    if dropout_p or (attn_mask is not None and attn_mask.dtype is torch.bool):
        raise ExportError("attention with dropout or a mask of bools has no exportable form; use a bias of floats")
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1) @ v
