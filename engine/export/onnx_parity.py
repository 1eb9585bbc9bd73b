# SPDX-License-Identifier: Apache-2.0
"""ONNX files against their model: random inputs, ONNX Runtime on one side, torch on the other.

ONNX Runtime has no bfloat16 on CPUs, and computes what is fp16 in float32. Half-precision graphs are therefore compared
with all their types set to float32, against torch with the same rounded weights: that holds the graph to the model.
What rounding in between does to masks shows only in a closed loop, on the device that does it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from virst_engine.backends.manifest import StageSpec
from virst_engine.backends.onnx_backend import load_onnxruntime, open_session
from virst_engine.errors import ExportError
from virst_engine.export.onnx_graphs import StageModule

# Of the largest number in an output. Measured: 1e-6 where only the order of sums differs.
TOLERANCE = 1e-4
# Numbers that stand in a graph, such as the root of 2 in GELU, are rounded with it; torch's are not. Measured: 1e-4.
HALF_TOLERANCE = 1e-2
LARGEST_IN_FP16 = 65504.0
OBJECT_COUNTS = (1, 2)
HALF_TYPES = ("FLOAT16", "BFLOAT16")
# Inputs with one row per memory, pointer or token, along axis 1.
ROWS = (
    "spatial", "spatial_tpos", "spatial_valid", "pointers", "pointer_distance", "pointer_valid",
    "sparse", "sparse_valid",
)  # fmt: skip


def check_stage(
    stage: str, file: Path, spec: StageSpec, reference: StageModule, *, memory_frames: int, free_rows: bool
) -> float:
    """Run a stage's file and `reference` on the same inputs, for several numbers of objects, some memories left empty.

    Args:
        reference: computes in float32, with the weights of the file.
        memory_frames: rows of the model's temporal encoding.
        free_rows: also with fewer memories and prompt tokens than `spec` has room for.

    Returns:
        The largest difference, relative to the largest number of the output.

    Raises:
        ExportError: they differ by more than TOLERANCE (HALF_TOLERANCE in half precision), or something is not finite.
    """
    in_half = {name for name in HALF_TYPES if has_constants_of(file, name)}
    session = open_session(load_onnxruntime(), in_float32(file) if in_half else file)
    tolerance = HALF_TOLERANCE if in_half else TOLERANCE
    counts = OBJECT_COUNTS if spec.has_objects else (1,)
    worst = 0.0
    for seed, objects in enumerate(counts):
        inputs = random_inputs(spec, objects, seed, memory_frames)
        variants = [inputs]
        if free_rows and any(name in inputs for name in ROWS):
            variants.append(_fewer(inputs))
        for given in variants:
            worst = max(worst, _largest_difference(stage, session, given, reference, tolerance))
    return worst


def check_range(stage: str, spec: StageSpec, module: StageModule, *, memory_frames: int) -> float:
    """Look at every number in between. Raises ExportError when one does not fit into fp16.

    Args:
        module: computes as the graph does, in float32.
        memory_frames: rows of the model's temporal encoding.

    Returns:
        The largest one.
    """
    with torch.no_grad(), _Largest() as seen:
        module(**random_inputs(spec, 1, seed=0, memory_frames=memory_frames))
    if not seen.largest < LARGEST_IN_FP16:
        raise ExportError(
            f"{stage} computes with numbers up to {seen.largest:.0f}, fp16 ends at {LARGEST_IN_FP16:.0f}; "
            "export with --precision bf16 or fp32"
        )
    return seen.largest


class _Largest(TorchDispatchMode):
    """The largest magnitude of all that is computed while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                found = float(x.abs().max())
                self.largest = max(self.largest, found) if found == found else found
        return out


def _largest_difference(
    stage: str, session: Any, inputs: Mapping[str, Tensor], reference: StageModule, tolerance: float
) -> float:
    with torch.inference_mode():
        expected = reference(**inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(list(reference.outputs), {name: value.numpy() for name, value in inputs.items()})
    worst = 0.0
    for name, want, have in zip(reference.outputs, expected, found, strict=True):
        wanted = want.numpy()
        if wanted.shape != have.shape:
            raise ExportError(f"{stage}: {name} is {have.shape} in the ONNX file, {wanted.shape} in the model")
        difference = float(np.abs(wanted - have).max() / max(float(np.abs(wanted).max()), 1e-6))
        if not difference <= tolerance:  # NaN, too
            raise ExportError(
                f"{stage}: {name} of the ONNX file differs from the model by {difference:.1e} of its largest number, "
                f"allowed are {tolerance:.0e}; nothing is written. Report it with the versions of torch and onnxruntime"
            )
        worst = max(worst, difference)
    return worst


def random_inputs(spec: StageSpec, objects: int, seed: int, memory_frames: int) -> dict[str, Tensor]:
    """Inputs as a stage may see them: at least one memory and one token of each object is there, and some are not.

    `memory_frames`: rows of the temporal encoding; memories refer to all of them, as far as there are so many memories.
    """
    generator = torch.Generator().manual_seed(seed)

    def flags(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) > 0.4

    values: dict[str, Tensor] = {}
    for name, tensor in spec.inputs.items():
        shape = tensor.for_objects(objects)
        if tensor.dtype == "bool":
            values[name] = flags(*shape)
            if name in ("spatial_valid", "sparse_valid"):
                values[name][:, 0] = True
        elif tensor.dtype == "int64":
            # Rows of the temporal encoding, in turn so that none is left out.
            order = torch.randperm(memory_frames, generator=generator)
            values[name] = order[torch.arange(math.prod(shape)) % memory_frames].reshape(shape)
        elif name == "pointer_distance":
            values[name] = torch.randint(0, 40, shape, generator=generator).float()
        else:
            values[name] = torch.randn(shape, generator=generator)
    if "binarize" in values:
        # Two values, so that no pixel between them is near 0, where a last bit would decide.
        logits = values["mask_logits"] * 4
        steps = torch.where(logits > 0, 7.0, -5.0)
        values["mask_logits"] = torch.where(values["binarize"][:, None, None], steps, logits)
    return values


def _fewer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every second memory, pointer and token."""
    return {name: value[:, ::2].contiguous() if name in ROWS else value for name, value in inputs.items()}


def has_constants_of(file: Path, dtype: str) -> bool:
    """Whether a graph computes with constants of this ONNX type."""
    import onnx

    wanted = getattr(onnx.TensorProto, dtype)
    return any(tensor.data_type == wanted for tensor in onnx.load(str(file)).graph.initializer)


def in_float32(file: Path) -> bytes:
    """The graph of a file with its half-precision types replaced by float32."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(file))
    half = {getattr(onnx.TensorProto, name) for name in HALF_TYPES}

    def widened(tensor: Any) -> Any:
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

    for tensor in model.graph.initializer:
        if tensor.data_type in half:
            tensor.CopyFrom(widened(tensor))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in half:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in half:
                attribute.t.CopyFrom(widened(attribute.t))
    del model.graph.value_info[:]
    return model.SerializeToString()
