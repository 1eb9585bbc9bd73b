# SPDX-License-Identifier: Apache-2.0
"""Exported stages -> TensorRT engines: one per stage, and one per number of objects that it runs for.

Shapes are fixed, so that TensorRT can choose kernels and a CUDA graph can be recorded. Precision is that of the ONNX
files; here it is checked. Memory attention in half precision is two thirds of a frame's work; it is built so that it
fails unless every attention becomes one fused kernel: unfused, each layer writes and reads a matrix of 4096 x 36,936.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from virst_engine.backends.engine_store import (
    EngineRecord,
    folder_key,
    read_engine,
    read_facts,
    read_record,
    record_of,
    save_engine,
    writable_root,
)
from virst_engine.backends.manifest import STAGES, TensorSpec, read_manifest, stage_path
from virst_engine.backends.tensorrt_api import TENSORRT, TENSORRT_RTX, Platform, TensorRt, gpu_here, load_tensorrt
from virst_engine.errors import BackendError, EngineMismatch, ExportError

log = logging.getLogger(__name__)

OBJECT_BUCKETS = (1, 4, 8)
FUSED_STAGE = "memory_attention"
HALF = {"fp16": "HALF", "bf16": "BF16"}
# In fp16 the errors of these two grow from frame to frame through the memory; bf16 and fp32 are safe.
NOT_IN_FP16 = ("mask_decoder", "memory_encoder")
MUST_BE_HALF = ("image_encoder", FUSED_STAGE)


@dataclass(frozen=True)
class BuiltEngine:
    """One engine file after `build_engines`."""

    path: Path
    record: EngineRecord
    kept: bool  # it was there already
    build_s: float  # when it was built
    fused_attentions: int
    engine_bytes: int


def build_engines(
    folder: Path,
    *,
    objects: Sequence[int] = OBJECT_BUCKETS,
    targets: Sequence[str] = (),
    rtx: bool = False,
    workspace_mib: int = 0,
    force: bool = False,
    require_fused: bool = True,
    device: str = "cuda:0",
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
    tensorrt: TensorRt | None = None,
) -> tuple[BuiltEngine, ...]:
    """Compile the stages of an export folder for this GPU, or with TensorRT-RTX for `targets`, and keep the engines.

    Engines that are there and valid stay. Each file is complete before it gets its name.

    Args:
        folder: of `virst export`; engines go into its folder engines/, or into the user's cache if it is read-only.
        objects: numbers of objects; at run time the next larger one serves, and more than the largest take turns.
        targets: compute capabilities such as SM86; TensorRT-RTX alone, which then needs no GPU.
        workspace_mib: most memory that a kernel may use for intermediate results; 0 = no limit.
        force: build also what is there.
        require_fused: False lets TensorRT compute half-precision memory attention in several kernels.
        on_step: called as (engines done, engines in all, what is next).
        tensorrt: the module to use; None: the installed one.

    Raises:
        ExportError: a stage is missing, was changed, or is not what the manifest says.
        BackendError: TensorRT is missing, there is no GPU, or it cannot compile a stage.
    """
    manifest = read_manifest(folder)
    sizes = sorted(set(objects))
    if not sizes or sizes[0] < 1:
        raise BackendError(f"engines need numbers of objects of 1 or more, got {list(objects)}; for example 1,4,8")
    onnx_files = {stage: stage_path(folder, manifest, stage) for stage in STAGES}
    trt = tensorrt or load_tensorrt(TENSORRT_RTX if rtx or targets else TENSORRT)
    platform = _platform(trt, tuple(targets), device)
    store = writable_root(folder) / folder_key(manifest, platform)

    jobs = [(stage, n) for stage in STAGES for n in (sizes if manifest.stages[stage].has_objects else [0])]
    built = []
    for done, (stage, n) in enumerate(jobs):
        must_fuse = require_fused and stage == FUSED_STAGE and manifest.precision in HALF
        record = record_of(manifest, stage, n, platform, attention="fused" if must_fuse else "free")
        what = f"{stage}{f' for {n} objects' if n > 1 else ''}"
        path = store / record.file_name
        if not force and _is_there(path, record):
            on_step(done, len(jobs), f"{what}: kept")
            built.append(BuiltEngine(path, record, True, **read_facts(path)))
            continue
        on_step(done, len(jobs), what)
        started = time.perf_counter()
        plan, fused = compile_stage(trt, onnx_files[stage], record, workspace_mib)
        seconds = time.perf_counter() - started
        path = save_engine(store, record, plan, build_s=round(seconds, 2), fused_attentions=fused)
        log.info("%s: %.1f s, %.1f MB, %d fused attentions", path, seconds, len(plan) / 1e6, fused)
        built.append(BuiltEngine(path, record, False, **read_facts(path)))
    on_step(len(jobs), len(jobs), "done")
    return tuple(built)


def tensorrt_for(device: str) -> TensorRt:
    """The installed TensorRT that compiles for this GPU: TensorRT itself, else TensorRT-RTX, which knows fewer GPUs.

    Raises BackendError when there is none, for each of the two with its reason.
    """
    reasons = []
    for flavour in (TENSORRT, TENSORRT_RTX):
        try:
            trt = load_tensorrt(flavour)
            _platform(trt, (), device)
        except BackendError as error:
            reasons.append(str(error))
        else:
            return trt
    raise BackendError("; ".join(dict.fromkeys(reasons)))


def compile_stage(trt: TensorRt, onnx_file: Path, record: EngineRecord, workspace_mib: int = 0) -> tuple[bytes, int]:
    """The engine of one stage, and how many attentions in it are fused for certain.

    Raises ExportError for an ONNX file that does not fit its record, BackendError when TensorRT cannot compile it.
    """
    builder = trt.builder()
    network = trt.network(builder)
    errors = trt.parse(network, onnx_file)
    if errors:
        raise BackendError(f"{trt.title} cannot read {onnx_file}: {errors[0]}; export it again with this version")
    _fix_shapes(network, record)
    _check_tensors(trt, network, record)
    _check_precision(trt, network, record)
    fused = 0
    if record.attention == "fused":
        if hasattr(network, "add_attention"):
            fused = require_fused_attention(trt.module, network)
        else:
            log.warning("%s cannot require fused attention (10.14 can); it fuses what it recognises", trt.title)
    plan = builder.build_serialized_network(network, trt.config(builder, record.targets, workspace_mib))
    if plan is None:
        where, reason = record.gpu or " and ".join(record.targets), trt.last_error()
        if fused and "decompos" in reason:
            raise BackendError(
                f"{trt.title} has no fused attention kernel for {record.stage} ({record.precision}) on {where}; "
                "build with --unfused, which is slower"
            )
        way_out = "; with --unfused it may compute attention as it likes" if fused else ""
        raise BackendError(f"{trt.title} cannot build {record.stage} for {where}: {reason}{way_out}")
    return bytes(plan), fused


def require_fused_attention(trt: Any, network: Any) -> int:
    """Replace each MatMul - (Add) - Softmax - MatMul of a parsed network by an IAttention that must not be decomposed.

    What is added to the scores becomes its mask. The queries of a single head are dealt to two heads that share its
    keys: the same numbers, and the one form in which TensorRT-RTX 1.7 has a kernel for fewer than 2 ** 24 scores too.
    The old layers stay behind without a use.

    Returns:
        How many there were.

    Raises:
        ExportError: something else stands between a Softmax and its products, which would keep it from being fused.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    producers: dict[str, Any] = {}
    readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for layer in layers:
        for i in range(layer.num_outputs):
            producers[layer.get_output(i).name] = layer
        for i in range(layer.num_inputs):
            if layer.get_input(i) is not None:
                readers[layer.get_input(i).name].append((layer, i))

    softmaxes = [layer for layer in layers if layer.type == trt.LayerType.SOFTMAX]
    for softmax in softmaxes:
        scores, mask = _scores_and_mask(trt, producers, softmax)
        average = _average(trt, readers, softmax)
        keys = scores.get_input(1)
        if scores.op1 == trt.MatrixOperation.NONE:  # a transpose of its own came before: turned back, both vanish
            turned = network.add_shuffle(keys)
            turned.first_transpose = trt.Permutation([0, 1, 3, 2])
            keys = turned.get_output(0)
        queries, values = scores.get_input(0), average.get_input(1)
        width, value_width = queries.shape[-1], values.shape[-1]
        if width != value_width:
            raise _cannot_fuse(softmax, f"queries have {width} channels and values {value_width}")
        shape = tuple(queries.shape)
        splits = shape[1] == 1 and shape[2] % 2 == 0 and (mask is None or mask.shape[2] == 1)
        if splits:
            queries = _reshaped(network, queries, (shape[0], 2, shape[2] // 2, shape[3]))
        attention = network.add_attention(queries, keys, values, trt.AttentionNormalizationOp.SOFTMAX, False)
        attention.decomposable = False
        if mask is not None:
            attention.mask = mask
        result = attention.get_output(0)
        if splits:
            result = _reshaped(network, result, shape)
        after = readers[average.get_output(0).name]
        if not after:  # nothing would use the new one
            raise _cannot_fuse(softmax, "what it averages is an output of the whole stage")
        for layer, i in after:
            layer.set_input(i, result)
    return len(softmaxes)


def _reshaped(network: Any, tensor: Any, shape: tuple[int, ...]) -> Any:
    layer = network.add_shuffle(tensor)
    layer.reshape_dims = shape
    return layer.get_output(0)


def _scores_and_mask(trt: Any, producers: dict[str, Any], softmax: Any) -> tuple[Any, Any]:
    """The product that gives a Softmax its scores, and the tensor that is added to them or None."""
    before = producers.get(softmax.get_input(0).name)
    if before is not None and before.type == trt.LayerType.MATRIX_MULTIPLY:
        before.__class__ = trt.IMatrixMultiplyLayer
        return before, None
    if before is not None and before.type == trt.LayerType.ELEMENTWISE:
        before.__class__ = trt.IElementWiseLayer
        for i in (0, 1):
            product = producers.get(before.get_input(i).name)
            is_product = product is not None and product.type == trt.LayerType.MATRIX_MULTIPLY
            if is_product and before.op == trt.ElementWiseOperation.SUM:
                product.__class__ = trt.IMatrixMultiplyLayer
                return product, before.get_input(1 - i)
    raise _not_attention(softmax, before)


def _average(trt: Any, readers: dict[str, list[tuple[Any, int]]], softmax: Any) -> Any:
    """The product of a Softmax with the values. In between the parser leaves shuffles that change nothing."""
    tensor = softmax.get_output(0)
    axes = list(range(len(tensor.shape)))
    after = readers[tensor.name]
    while len(after) == 1 and after[0][0].type == trt.LayerType.SHUFFLE:
        shuffle = after[0][0]
        shuffle.__class__ = trt.IShuffleLayer
        turns = [list(permutation)[: len(axes)] for permutation in (shuffle.first_transpose, shuffle.second_transpose)]
        if turns != [axes, axes] or tuple(shuffle.get_output(0).shape) != tuple(tensor.shape):
            break
        after = readers[shuffle.get_output(0).name]
    if len(after) != 1 or after[0][0].type != trt.LayerType.MATRIX_MULTIPLY or after[0][1] != 0:
        raise _not_attention(softmax, after[0][0] if after else None)
    return after[0][0]


def _not_attention(softmax: Any, beside: Any) -> ExportError:
    what = "nothing" if beside is None else f"{beside.name} ({beside.type.name})"
    return _cannot_fuse(softmax, f"it stands beside {what}, not between two matrix products")


def _cannot_fuse(softmax: Any, why: str) -> ExportError:
    return ExportError(
        f"{softmax.name} cannot become one fused attention: {why}; export the model again with this version, "
        "or build with --unfused"
    )


def _platform(trt: TensorRt, targets: tuple[str, ...], device: str) -> Platform:
    """What to compile for: the GPU that is here, or with TensorRT-RTX any that it knows."""
    if not trt.is_rtx:
        if targets:
            raise BackendError("--target is for TensorRT-RTX: TensorRT compiles for the GPU that it runs on; add --rtx")
        return trt.platform(*gpu_here(torch.device(device)))
    known = trt.known_targets()
    if not targets and not torch.cuda.is_available():
        raise BackendError(f"no GPU here: say what to compile for with --target, one or more of {', '.join(known)}")
    wanted = tuple(target.strip().upper() for target in targets) or gpu_here(torch.device(device))[1:]
    unknown = [target for target in wanted if target not in known]
    if unknown:
        raise BackendError(
            f"{trt.title} has no code for {unknown[0]}, only for {', '.join(known)}; "
            "on another GPU, build with TensorRT itself: virst build DIR"
        )
    return Platform(trt.flavour, trt.version, "", tuple(sorted(set(wanted), key=lambda name: int(name[2:]))))


def _is_there(path: Path, wanted: EngineRecord) -> bool:
    try:
        return read_record(path) == wanted and bool(read_engine(path))
    except EngineMismatch:
        return False


def _fix_shapes(network: Any, record: EngineRecord) -> None:
    """Give the object axis its size."""
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        spec = record.inputs.get(tensor.name)
        if spec is not None and len(tensor.shape) == len(spec.shape):
            sizes = zip(tensor.shape, spec.shape, strict=True)
            tensor.shape = tuple(want if have == -1 else have for have, want in sizes)


def _check_tensors(trt: TensorRt, network: Any, record: EngineRecord) -> None:
    """Hold the file to the manifest: names, dtypes and shapes."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for side, tensors, wanted in (("input", inputs, record.inputs), ("output", outputs, record.outputs)):
        found = {tensor.name: TensorSpec(trt.dtype_name(tensor.dtype), tuple(tensor.shape)) for tensor in tensors}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ExportError(
                    f"{record.stage}: its {side} {name} is {_text(found.get(name))} in the ONNX file, "
                    f"{_text(wanted.get(name))} in the manifest; export the model again"
                )


def _check_precision(trt: TensorRt, network: Any, record: EngineRecord) -> None:
    """Hold the file to its precision: nobody sees from outside what a stage computes in."""
    types = trt.module.DataType
    used = set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        used |= {layer.get_output(j).dtype for j in range(layer.num_outputs)}
    allowed = {"fp32": [], "bf16": [types.BF16], "fp16": [types.HALF]}[record.precision]
    if record.stage in NOT_IN_FP16 and record.precision == "fp16":
        allowed = []
    wrong = [half for half in (types.HALF, types.BF16) if half in used and half not in allowed]
    if wrong:
        name = trt.dtype_name(wrong[0])
        grows = record.stage in NOT_IN_FP16 and record.precision == "fp16"
        why = "its errors would grow from frame to frame" if grows else f"the manifest says {record.precision}"
        raise ExportError(f"{record.stage} computes in {name}, and {why}; export the model again")
    if record.stage in MUST_BE_HALF and allowed and allowed[0] not in used:
        raise ExportError(
            f"{record.stage} does not compute in {record.precision}, as the manifest says; export the model again"
        )


def _text(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
