# SPDX-License-Identifier: Apache-2.0
"""Which backend runs the stages, and why: the word of `engine.backend`, or the fastest that fits this machine."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from virst_engine.backends.base import Stages
from virst_engine.backends.manifest import Manifest, read_manifest
from virst_engine.config import EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BackendError, ExportError

logger = logging.getLogger(__name__)


def preferred_backends(device: str, precision: str) -> tuple[str, ...]:
    """In which order `auto` tries to run exported stages of this precision on a device."""
    if torch.device(device).type == "cuda":
        return ("tensorrt", "onnxruntime", "torch")
    # CPUs emulate fp16.
    return ("torch",) if precision == "fp16" else ("onnxruntime", "torch")


def choose_stages(
    model: ModelParameters,
    engine: EngineParameters,
    memory: MemoryParameters,
    *,
    weights_sha256: str,
    video_size: int,
    torch_stages: Callable[[int], Stages],
) -> Stages:
    """The stages of a model, on the backend that `engine` asks for. The log says which one it is, and why.

    Args:
        weights_sha256: of the weights file: stages that were exported from another one are refused.
        video_size: `StageSizes.video_size`.
        torch_stages: loads the model for images of that size (0: what it was trained at) and runs it by torch.

    Raises:
        BackendError: that backend cannot run here. `auto` then takes the next one.
        ExportError: `engine.path` is no export of this model, or has no room for `memory`.
    """
    if not engine.path or engine.backend == "torch":
        why = "engine.backend asks for it" if engine.backend == "torch" else "no stages are exported (engine.path)"
        logger.info("%s runs by torch on %s: %s", model.name, model.device, why)
        return torch_stages(model.image_size)
    folder = Path(engine.path).expanduser()
    manifest = read_manifest(folder)
    _check_origin(folder, manifest, model, weights_sha256)
    _check_memory(folder, manifest, memory)
    pooled = f", {manifest.memory_pool} x {manifest.memory_pool} pooled keys" if manifest.memory_pool > 1 else ""
    logger.info("%s: stages in %s%s", folder, manifest.precision, pooled)
    if engine.precision not in ("fp32", manifest.precision) or engine.pooled_keys != (manifest.memory_pool > 1):
        logger.warning(
            "%s: engine.precision and engine.pooled_keys say otherwise; exported stages stay as they are: export again",
            folder,
        )
    if engine.backend == "tensorrt":
        logger.info("%s runs by TensorRT: engine.backend asks for it", model.name)
        return _tensorrt(folder, model, video_size)
    if engine.backend == "onnxruntime":
        logger.info("%s runs by ONNX Runtime on %s: engine.backend asks for it", model.name, model.device)
        return _onnxruntime(folder, model, video_size)

    reasons, order = [], preferred_backends(model.device, manifest.precision)
    if "tensorrt" in order:
        try:
            stages = _tensorrt(folder, model, video_size)
        except BackendError as error:
            reasons.append(f"not by TensorRT ({error})")
        else:
            logger.info("%s runs by TensorRT: its engines in %s fit this GPU", model.name, folder)
            return stages
    try:
        if "onnxruntime" not in order:
            raise BackendError("its stages are in fp16, which CPUs emulate: export fp32 for this device")
        stages = _onnxruntime(folder, model, video_size)
    except BackendError as error:
        reasons.append(f"not by ONNX Runtime ({error})")
        size = manifest.image_size  # as the other backends would have: what was measured at it stays true
        logger.warning("%s runs by torch on %s at %d px: %s", model.name, model.device, size, "; ".join(reasons))
        return torch_stages(size)
    why = "; ".join(reasons) or f"{folder} holds its stages, and {model.device} is no GPU for TensorRT"
    logger.info("%s runs by ONNX Runtime on %s: %s", model.name, model.device, why)
    return stages


def _check_origin(folder: Path, manifest: Manifest, model: ModelParameters, weights_sha256: str) -> None:
    again = f"export this one: virst export {model.name} --out {folder}"
    if manifest.model != model.name:
        raise ExportError(f"{folder} holds the stages of {manifest.model}, not of {model.name}; {again}")
    if manifest.weights_sha256 != weights_sha256:
        raise ExportError(
            f"{folder} was exported from weights {manifest.weights_sha256[:12]}, the model has "
            f"{weights_sha256[:12]}; {again}"
        )
    if model.image_size and manifest.image_size != model.image_size:
        raise ExportError(
            f"{folder} was exported for images of {manifest.image_size} px, model.image_size is "
            f"{model.image_size}; {again}"
        )


def _check_memory(folder: Path, manifest: Manifest, memory: MemoryParameters) -> None:
    slots, rows = memory.anchors_attended + memory.recent_frames, memory.anchors_attended + memory.pointers - 1
    if slots > manifest.memory_slots or rows > manifest.pointer_rows:
        raise ExportError(
            f"{folder} has room for {manifest.memory_slots} memories and {manifest.pointer_rows} object pointers, "
            f"memory.anchors_attended, recent_frames and pointers ask for {slots} and {rows}; lower them, or export "
            "with --anchors, --recent and --pointers"
        )


def _tensorrt(folder: Path, model: ModelParameters, video_size: int) -> Stages:
    from virst_engine.backends.tensorrt_backend import TensorRtStages

    index = torch.device(model.device).index or 0
    if index:  # TensorRT takes whatever GPU is the process's first
        raise BackendError(
            f"TensorRT runs on the first GPU of a process, model.device is {model.device}: set "
            f"CUDA_VISIBLE_DEVICES={index} and model.device to cuda:0"
        )
    return TensorRtStages(folder, device=model.device, video_size=video_size)


def _onnxruntime(folder: Path, model: ModelParameters, video_size: int) -> Stages:
    from virst_engine.backends.onnx_backend import OnnxRuntimeStages

    return OnnxRuntimeStages(folder, device=model.device, threads=model.threads, video_size=video_size)
