# SPDX-License-Identifier: Apache-2.0
"""The stages run by ONNX Runtime: on the CPU, or on a GPU where its package for GPUs is installed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from virst_engine.backends.exported import ExportedStages, Tensors
from virst_engine.backends.manifest import OBJECTS, STAGES, read_manifest, stage_path
from virst_engine.errors import BackendError

log = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Inputs that say which rows along axis 1 are there, and the inputs that have those rows.
ROWS = {
    "spatial_valid": ("spatial", "spatial_tpos", "spatial_valid"),
    "pointer_valid": ("pointers", "pointer_distance", "pointer_valid"),
    "sparse_valid": ("sparse", "sparse_valid"),
}


class OnnxRuntimeStages(ExportedStages):
    """`Stages` on the folder of `virst export`, one ONNX Runtime session per stage.

    Where the graphs allow it (float32), memories, pointers and tokens that no object has are left out of the work.
    """

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        threads: int = 0,
        video_size: int = 128,
        providers: Sequence[str] = (),
    ) -> None:
        """
        Args:
            threads: CPU threads of a session; 0 = one per core.
            providers: ONNX Runtime's execution providers, first choice first; none = what fits `device`.

        Raises:
            ExportError: the folder is no export, or a file in it was changed.
            BackendError: no onnxruntime, none for this device, or it cannot run these stages.
        """
        manifest = read_manifest(folder)
        super().__init__(folder, manifest, torch.device(device), video_size=video_size)
        runtime = load_onnxruntime()
        wanted = tuple(providers) or ((CPU,) if self.device.type == "cpu" else (CUDA,))
        if wanted == (CPU,) and manifest.precision == "bf16":
            raise BackendError(
                "ONNX Runtime has no bfloat16 on CPUs; export the model with --precision fp32, or run it on a GPU"
            )
        if wanted == (CPU,) and manifest.precision == "fp16":
            log.warning("%s computes in fp16, which CPUs emulate: fp32 is faster here", folder)
        self._sessions = {
            stage: open_session(
                runtime, stage_path(folder, manifest, stage), providers=wanted, device=self.device, threads=threads
            )
            for stage in STAGES
        }
        self._inputs = {stage: [i.name for i in session.get_inputs()] for stage, session in self._sessions.items()}
        # Axes that have a name in the file are free.
        free = {i.name for session in self._sessions.values() for i in session.get_inputs() if _is_free(i.shape)}
        self._rows = {name: rows for name, rows in ROWS.items() if name in free}

    def run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        """Outputs are new tensors."""
        for name in self._rows:
            if name in inputs:
                inputs = self._without_empty_rows(inputs, name)
        session = self._sessions[stage]
        outputs = self.manifest.stages[stage].outputs
        if self.device.type == "cpu":
            given = {name: inputs[name].detach().contiguous().numpy() for name in self._inputs[stage]}
            found = session.run(list(outputs), given)
            return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}
        return self._run_on_device(session, stage, inputs, objects)

    def _run_on_device(self, session: Any, stage: str, inputs: Tensors, objects: int) -> Tensors:
        spec, binding = self.manifest.stages[stage], session.io_binding()
        given = {name: inputs[name].to(self.device).contiguous() for name in self._inputs[stage]}
        made = {
            name: torch.empty(tensor.for_objects(objects), dtype=getattr(torch, tensor.dtype), device=self.device)
            for name, tensor in spec.outputs.items()
        }
        kind, index = self.device.type, self.device.index or 0
        for bind, tensors, specs in (
            (binding.bind_input, given, spec.inputs),
            (binding.bind_output, made, spec.outputs),
        ):
            for name, tensor in tensors.items():
                bind(name, kind, index, _element_type(specs[name].dtype), tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        session.run_with_iobinding(binding)
        return made

    def _without_empty_rows(self, inputs: Tensors, valid: str) -> Tensors:
        """Leave out what no object has along axis 1; at least one row stays."""
        kept = inputs[valid].any(dim=0)
        if bool(kept.all()):
            return inputs
        kept[0] |= not bool(kept.any())
        index = kept.nonzero()[:, 0]
        return {
            name: value.index_select(1, index) if name in self._rows[valid] else value for name, value in inputs.items()
        }


def load_onnxruntime() -> Any:
    """The package. Raises BackendError when it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"the package onnxruntime cannot be imported ({error}); pip install onnxruntime, "
            "on a GPU onnxruntime-gpu, or set engine.backend to torch"
        ) from error
    return onnxruntime


def open_session(
    runtime: Any,
    model: Path | bytes,
    *,
    providers: Sequence[str] = (CPU,),
    device: torch.device | None = None,
    threads: int = 0,
) -> Any:
    """A session of an ONNX file or its bytes, on the first of `providers`; the CPU takes what is left over.

    ONNX Runtime goes on without a provider that it cannot start; here that is an error.

    Raises:
        BackendError: a provider is missing or does not start, or no provider has kernels for an operator.
    """
    available = runtime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        package = "onnxruntime" if missing == [CPU] else "onnxruntime-gpu"
        raise BackendError(
            f"this onnxruntime has no {missing[0]}, only {', '.join(available)}; install {package}, "
            "or choose another device"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; providers that do not start are found out below
    # Threads that wait by spinning take the cores from the camera and from ROS.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings = [
        (name, {"device_id": (device.index if device else None) or 0} if name != CPU else {}) for name in providers
    ]
    if CPU not in providers:
        settings.append((CPU, {}))
    what = str(model) if isinstance(model, Path) else "the graph"
    try:
        session = runtime.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=settings
        )
    except Exception as error:  # whatever type the version at hand raises
        reason = " ".join(str(error).split())[:300]
        raise BackendError(f"ONNX Runtime cannot run {what} on {providers[0]}: {reason}") from error
    started = session.get_providers()
    lost = [name for name in providers if name not in started]
    if lost:
        raise BackendError(
            f"ONNX Runtime could not start {lost[0]} for {what} and would run on {started[0]}; "
            "its CUDA and cuDNN versions must be those of this onnxruntime"
        )
    return session


def _is_free(shape: Sequence[int | str]) -> bool:
    return len(shape) > 1 and isinstance(shape[1], str) and shape[1] != OBJECTS


def _element_type(dtype: str) -> Any:
    """What IOBinding wants for a dtype: NumPy's type, or ONNX's number of one that NumPy does not have."""
    return 16 if dtype == "bfloat16" else np.dtype(dtype).type

