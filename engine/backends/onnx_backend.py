# SPDX-License-Identifier: Apache-2.0
"""The stages run by ONNX Runtime: on the CPU, or on a GPU where its package for GPUs is installed."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from virst_engine.backends.exported import FRAME_INPUTS, ExportedStages, Tensors
from virst_engine.backends.manifest import OBJECTS, STAGES, read_manifest, stage_path
from virst_engine.errors import BackendError

log = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Memory attention in two parts: what objects share, and the rest for one object of which every memory is there. Where
# its scores are large, this is faster than all objects at once: they stay in the cache, and need no mask.
ONE_BY_ONE = ("memory_queries", "memory_read")
# Its fused operator takes ten times as long as a sum and a layer norm (onnxruntime 1.32, CPU).
SLOW_FUSIONS = ("SkipLayerNormFusion",)
# Inputs that say which rows along axis 1 are there, and the inputs that have those rows.
ROWS = {
    "spatial_valid": ("spatial", "spatial_tpos", "spatial_valid"),
    "pointer_valid": ("pointers", "pointer_distance", "pointer_valid"),
}


class OnnxRuntimeStages(ExportedStages):
    """`Stages` on the folder of `virst export`, one ONNX Runtime session per stage.

    Where the graphs allow it (float32), memories, pointers and prompt tokens that no object has are left out. On a CPU,
    as many objects as there are threads go at the same time, each on a thread of its own: threads that share an
    operator wait for each other at its end, and not all of them can be cut in equal parts.
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
            threads: CPU threads, and objects that go at the same time; 0 = as many as torch uses.
            providers: ONNX Runtime's execution providers, first choice first; none = what fits `device`.

        Raises:
            ExportError: the folder is no export, or a file in it was changed.
            BackendError: no onnxruntime, none for this device, or it cannot run these stages.
        """
        manifest, runtime, where = read_manifest(folder), load_onnxruntime(), torch.device(device)
        wanted = tuple(providers) or ((CPU,) if where.type == "cpu" else (CUDA,))
        _check_providers(runtime, wanted)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                "torch cannot use a GPU here, which onnxruntime-gpu shares with it; set model.device to cpu"
            )
        super().__init__(folder, manifest, where, video_size=video_size)
        if wanted == (CPU,) and manifest.precision == "bf16":
            raise BackendError(
                "ONNX Runtime has no bfloat16 on CPUs; export the model with --precision fp32, or run it on a GPU"
            )
        if wanted == (CPU,) and manifest.precision == "fp16":
            log.warning("%s computes in fp16, which ONNX Runtime does in float32 on CPUs; fp32 is faster here", folder)
        on_cpu = wanted == (CPU,)
        wanted_stages = [
            stage
            for stage in (*STAGES, *ONE_BY_ONE)
            if stage in manifest.stages and (stage not in ONE_BY_ONE or where.type == "cpu")
        ]

        def open_stages(stages: Sequence[str], threads: int) -> dict[str, Any]:
            return {
                stage: open_session(
                    runtime, stage_path(folder, manifest, stage), providers=wanted, device=self.device, threads=threads
                )
                for stage in stages
            }

        threads = threads or torch.get_num_threads()
        self._sessions = open_stages(wanted_stages, threads)
        self._takes_turns = ONE_BY_ONE[0] in self._sessions
        self._at_once = threads if on_cpu else 1
        # Sessions for objects that go at the same time. An image and its queries are shared, and gaps in memories rare.
        shared = {"image_encoder", ONE_BY_ONE[0]} | ({"memory_attention"} if self._takes_turns else set())
        own = [stage for stage in wanted_stages if stage not in shared]
        self._one_thread = open_stages(own, 1) if self._at_once > 1 else {}
        self._pool = ThreadPoolExecutor(self._at_once, "onnxruntime")  # starts threads when they are needed
        self._inputs = {stage: [i.name for i in session.get_inputs()] for stage, session in self._sessions.items()}
        # Axes that have a name in the file are free.
        shapes = [i.shape for session in self._sessions.values() for i in session.get_inputs()]
        self._has_free_rows = any(len(s) > 1 and isinstance(s[1], str) and s[1] != OBJECTS for s in shapes)
        self.takes_fewer_memories = self._has_free_rows

    def run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        """Outputs are new tensors."""
        if self.device.type != "cpu":
            return self._run_on_device(stage, inputs, objects)
        if stage == "memory_attention":
            if self._takes_turns:
                return self._read_in_turns(inputs, objects)
            if self._has_free_rows:
                inputs = _without_empty_rows(inputs)
        if stage == "image_encoder" or objects < max(self._at_once, 2):
            return self._run_on_cpu(stage, inputs, self._sessions)
        # With large scores, each object alone: what it needs stays in the cache. Small ones are not worth the calls.
        parts = objects if self._takes_turns and self._at_once > 1 else self._at_once
        cuts = [objects * part // parts for part in range(parts + 1)]
        return _join(self._run_each(stage, [_objects(inputs, start, stop) for start, stop in pairwise(cuts)]))

    def _read_in_turns(self, inputs: Tensors, objects: int) -> Tensors:
        """Memory attention, object by object; where one has no memory or no pointer, by the graph with a mask."""
        shared, read = ONE_BY_ONE
        frame = self._run_on_cpu(shared, {"top": inputs["top"]}, self._sessions)
        alone = [_without_empty_rows(_objects(inputs, i, i + 1)) for i in range(objects)]
        complete = [all(bool(own[valid].all()) for valid in ROWS) for own in alone]
        of_complete = iter(
            self._run_each(read, [frame | own for own, is_complete in zip(alone, complete, strict=True) if is_complete])
        )
        return _join(
            [
                next(of_complete) if is_complete else self._run_on_cpu("memory_attention", own, self._sessions)
                for own, is_complete in zip(alone, complete, strict=True)
            ]
        )

    def _run_each(self, stage: str, calls: Sequence[Tensors]) -> list[Tensors]:
        """As many runs at the same time as there are threads; those left over one after the other, on all threads."""
        side_by_side = len(calls) - len(calls) % self._at_once if self._at_once > 1 else 0
        running: list[Future[Tensors]] = []
        try:
            for call in calls[:side_by_side]:
                running.append(self._pool.submit(self._run_on_cpu, stage, call, self._one_thread))
            found = [each.result() for each in running]
        finally:  # where one has failed: nothing of this frame runs on beside the next
            for each in running:
                each.cancel()
            wait(running)
        return found + [self._run_on_cpu(stage, call, self._sessions) for call in calls[side_by_side:]]

    def _missing(self, what: str, found: int, exported: int) -> int:
        missing = super()._missing(what, found, exported)
        return 0 if self._has_free_rows else missing

    def _run_on_cpu(self, stage: str, inputs: Tensors, sessions: dict[str, Any]) -> Tensors:
        names = list(self.manifest.stages[stage].outputs)
        given = {name: inputs[name].detach().contiguous().numpy() for name in self._inputs[stage]}
        found = sessions[stage].run(names, given)
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    def _run_on_device(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        spec, session = self.manifest.stages[stage], self._sessions[stage]
        binding = session.io_binding()
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


def _objects(inputs: Tensors, start: int, stop: int) -> Tensors:
    """A stage's inputs for some of its objects."""
    return {name: value if name in FRAME_INPUTS else value[start:stop] for name, value in inputs.items()}


def _join(parts: Sequence[Tensors]) -> Tensors:
    """Outputs for several objects, below each other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]


def _without_empty_rows(inputs: Tensors) -> Tensors:
    """Leave out the memories and pointers that no object has; at least one stays. By NumPy: torch takes 0.5 ms."""
    inputs = dict(inputs)
    for valid, names in ROWS.items():
        kept = inputs[valid].numpy().any(axis=0)
        if not kept.all():
            index = kept.nonzero()[0] if kept.any() else np.zeros(1, np.int64)
            inputs |= {name: torch.from_numpy(inputs[name].numpy().take(index, axis=1)) for name in names}
    return inputs


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
    _check_providers(runtime, providers)
    options = runtime.SessionOptions()
    # Never ONNX Runtime's own 0: that binds threads to cores, also to cores that this process must not use.
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors; providers that do not start are found out below
    # Threads that wait by spinning take the cores from the camera and from ROS.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Blocks of work that get smaller: the last thread of an operator ends soon after the others.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    settings = [
        (name, {"device_id": (device.index if device else None) or 0} if name != CPU else {}) for name in providers
    ]
    if CPU not in providers:
        settings.append((CPU, {}))
    what = str(model) if isinstance(model, Path) else "the graph"
    try:
        session = runtime.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=settings,
            disabled_optimizers=SLOW_FUSIONS if tuple(providers) == (CPU,) else (),
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


def _check_providers(runtime: Any, providers: Sequence[str]) -> None:
    available = runtime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        package = "onnxruntime" if missing == [CPU] else "onnxruntime-gpu"
        raise BackendError(
            f"this onnxruntime has no {missing[0]}, only {', '.join(available)}; install {package}, "
            "or choose another device"
        )


def _element_type(dtype: str) -> Any:
    """What IOBinding wants for a dtype: NumPy's type, or ONNX's number of one that NumPy does not have."""
    return 16 if dtype == "bfloat16" else np.dtype(dtype).type
