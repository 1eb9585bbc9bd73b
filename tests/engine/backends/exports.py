# SPDX-License-Identifier: Apache-2.0
"""Export folders for tests: the manifest and prompt tables of a small model, its stages as functions of named tensors,
and stand-ins for the ONNX files."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.backends.fake_tensorrt import Kernel, graph_of
from tests.engine.model.small_models import SMALL_SAM2, liven
from virst_engine.backends.manifest import (
    OBJECTS,
    PROMPT_ENCODER,
    Manifest,
    StageSpec,
    TensorSpec,
    file_sha256,
    write_manifest,
)
from virst_engine.backends.torch_backend import TorchStages
from virst_engine.model.config import Sam2Config
from virst_engine.model.sam2 import Sam2
from virst_engine.types import ImageFeatures, MaskPrediction, MemoryTensors, PromptTokens

SLOTS, ROWS, TOKENS = 4, 5, 6


def small_sam2(config: Sam2Config = SMALL_SAM2) -> Sam2:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        sam2 = Sam2(config)
    liven(sam2, 5)
    return sam2


def stage_specs(config: Sam2Config) -> dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec]]]:
    """Inputs and outputs of the four stages, float32 at their borders."""
    size, c, m, g = config.image_size, config.channels, config.memory_channels, config.grid
    o = OBJECTS

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    top, s0, s1 = f32(1, c, g, g), f32(1, c // 8, 4 * g, 4 * g), f32(1, c // 4, 2 * g, 2 * g)
    fusion = f32(1, c, g, g)
    masks = {"mask_logits": f32(o, 4 * g, 4 * g), "object_score_logits": f32(o)}
    return {
        "image_encoder": (
            {"pixels": f32(1, 3, size, size)},
            {"top": top, "high_res_s0": s0, "high_res_s1": s1, "fusion": fusion},
        ),
        "memory_attention": (
            {
                "top": top,
                "spatial": f32(o, SLOTS, m, g, g),
                "spatial_tpos": TensorSpec("int64", (o, SLOTS)),
                "spatial_valid": TensorSpec("bool", (o, SLOTS)),
                "pointers": f32(o, ROWS, c),
                "pointer_distance": f32(o, ROWS),
                "pointer_valid": TensorSpec("bool", (o, ROWS)),
            },
            {"conditioned": f32(o, c, g, g)},
        ),
        "mask_decoder": (
            {
                "conditioned": f32(o, c, g, g),
                "high_res_s0": s0,
                "high_res_s1": s1,
                "sparse": f32(o, TOKENS, c),
                "sparse_valid": TensorSpec("bool", (o, TOKENS)),
                "multimask": TensorSpec("bool", (o,)),
            },
            {**masks, "iou": f32(o), "pointer": f32(o, c)},
        ),
        "memory_encoder": (
            {"top": top, **masks, "binarize": TensorSpec("bool", (o,))},
            {"spatial": f32(o, m, g, g)},
        ),
    }


def stage_kernels(sam2: Sam2) -> dict[str, Kernel]:
    """Each stage as a function of named tensors, computed by torch."""
    stages = TorchStages(sam2)

    def features(values: dict[str, Tensor]) -> ImageFeatures:
        unused = torch.zeros(1, 1, 1, 1)
        top = values.get("top", unused)
        return ImageFeatures(top, values.get("high_res_s0", unused), values.get("high_res_s1", unused), top)

    def image_encoder(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return vars(stages.image_encoder(values["pixels"]))

    def memory_attention(values: dict[str, Tensor]) -> dict[str, Tensor]:
        memory = MemoryTensors(**{name: value for name, value in values.items() if name != "top"})
        return {"conditioned": stages.memory_attention(features(values), memory)}

    def mask_decoder(values: dict[str, Tensor]) -> dict[str, Tensor]:
        prompts = PromptTokens(values["sparse"], values["sparse_valid"], values["multimask"])
        return vars(stages.mask_decoder(features(values), values["conditioned"], prompts))

    def memory_encoder(values: dict[str, Tensor]) -> dict[str, Tensor]:
        scores, masks = values["object_score_logits"], values["mask_logits"]
        prediction = MaskPrediction(masks, scores, scores, torch.zeros(len(scores), sam2.config.channels))
        return {"spatial": stages.memory_encoder(features(values), prediction, values["binarize"]).spatial}

    return {f.__name__: f for f in (image_encoder, memory_attention, mask_decoder, memory_encoder)}


def write_fake_export(folder: Path, sam2: Sam2, precision: str = "fp32") -> Manifest:
    """An export folder whose ONNX files only `fake_tensorrt` can read."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    stages = {}
    for name, (inputs, outputs) in stage_specs(sam2.config).items():
        file = folder / f"{name}.onnx"
        in_half = half if precision == "bf16" or name in ("image_encoder", "memory_attention") else "float32"
        layers = attention_layers(half) if name == "memory_attention" else []
        layers.append(["CAST", f"{name}_work", [next(iter(inputs))], in_half, [1], {}])
        file.write_text(graph_of(name, StageSpec("", "", inputs, outputs), layers))
        stages[name] = StageSpec(file.name, file_sha256(file), inputs, outputs)
    manifest = Manifest(
        model="small",
        weights_sha256="ab" * 32,
        image_size=sam2.config.image_size,
        memory_slots=SLOTS,
        pointer_rows=ROWS,
        prompt_tokens=TOKENS,
        memory_frames=sam2.config.memory_frames,
        multimask_prompted=sam2.config.multimask_prompted,
        multimask_tracking=sam2.config.multimask_tracking,
        precision=precision,
        opset=18,
        git_version="test",
        stages=stages,
    )
    save_file({name: value.contiguous() for name, value in sam2.prompts.state_dict().items()}, folder / PROMPT_ENCODER)
    write_manifest(folder, manifest)
    return manifest


def attention_layers(dtype: str, between: str = "") -> list[list[object]]:
    """A self attention and a cross attention with a mask, as the parser leaves them; `between` breaks the second."""
    q, k, scores = [1, 1, 16, 32], [1, 1, 32, 80], [1, 1, 16, 80]
    none = {"op0": "NONE", "op1": "NONE"}
    turned = {"first_transpose": [0, 1, 3, 2, 4, 5, 6, 7]}
    layers: list[list[object]] = [
        ["CAST", "q", ["top"], dtype, q, {}],
        ["CAST", "k", ["top"], dtype, [1, 1, 16, 32], {}],
        ["SHUFFLE", "kt", ["k"], dtype, [1, 1, 32, 16], turned],
        ["CAST", "v", ["top"], dtype, [1, 1, 16, 32], {}],
        ["MATRIX_MULTIPLY", "self_scores", ["q", "kt"], dtype, [1, 1, 16, 16], none],
        ["SOFTMAX", "self_softmax", ["self_scores"], dtype, [1, 1, 16, 16], {}],
        ["SHUFFLE", "same", ["self_softmax"], dtype, [1, 1, 16, 16], {}],
        ["MATRIX_MULTIPLY", "self_average", ["same", "v"], dtype, q, none],
        ["CAST", "memory_kt", ["spatial"], dtype, k, {}],
        ["CAST", "memory_v", ["spatial"], dtype, [1, 1, 80, 32], {}],
        ["CAST", "bias", ["spatial_valid"], dtype, [1, 1, 1, 80], {}],
        ["MATRIX_MULTIPLY", "scores", ["self_average", "memory_kt"], dtype, scores, none],
        ["ELEMENTWISE", "masked", ["bias", "scores"], dtype, scores, {"op": "SUM"}],
        ["SOFTMAX", "softmax", ["masked"], dtype, scores, {}],
    ]
    if between:
        layers.append([between, "isnan", ["softmax"], dtype, scores, {}])
    layers.append(["MATRIX_MULTIPLY", "average", ["isnan" if between else "softmax", "memory_v"], dtype, q, none])
    layers.append(["CAST", "out", ["average"], dtype, q, {}])
    return layers
