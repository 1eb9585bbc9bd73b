# SPDX-License-Identifier: Apache-2.0
"""The stages run by TensorRT: engines of `virst build`, each with buffers of its own and a recorded CUDA graph.

A step is: copy what goes in, replay, hand out views of what came out. Nothing waits for the GPU, and after the first
call of an engine nothing is allocated.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from virst_engine.backends.engine_store import EngineRecord, read_engine, read_record, rebuild, usable_engines
from virst_engine.backends.exported import ExportedStages, Tensors, concatenate
from virst_engine.backends.manifest import OBJECTS, Manifest, TensorSpec, read_manifest
from virst_engine.backends.tensorrt_api import TENSORRT, TENSORRT_RTX, TensorRt, gpu_here, load_tensorrt
from virst_engine.errors import BackendError, EngineMismatch

log = logging.getLogger(__name__)


class Gpu(Protocol):
    """What engines need of CUDA; the tests put the host's memory in its place."""

    device: torch.device

    def describe(self) -> tuple[str, str]:
        """The GPU's name and its compute capability, as SM86."""
        ...

    def pinned(self, like: Tensor) -> Tensor:
        """Host memory that the GPU can copy from while the CPU goes on."""
        ...

    def record(self, enqueue: Callable[[int], bool]) -> Callable[[], None]:
        """Run `enqueue(stream handle)` once, then record what it does; calling the result does it again."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until everything enqueued so far is done."""
        ...


class Cuda:
    """A CUDA device, through torch. Everything runs on torch's current stream."""

    def __init__(self, device: str) -> None:
        """Raises BackendError when there is no such device."""
        found = torch.device(device)
        self._gpu = gpu_here(found)
        self.device = found if ":" in device else torch.device("cuda", torch.cuda.current_device())

    def describe(self) -> tuple[str, str]:
        return self._gpu

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def record(self, enqueue: Callable[[int], bool]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.device)  # recording is not allowed on the default stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            # The first run allocates and, with TensorRT-RTX, compiles: neither can be recorded.
            if not enqueue(stream.cuda_stream):
                raise BackendError(
                    "TensorRT cannot run an engine that it loaded; build it again: virst build DIR --force"
                )
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                enqueue(stream.cuda_stream)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize


class EngineRunner:
    """One engine: its execution context, its buffers and its recorded graph."""

    def __init__(self, trt: TensorRt, path: Path, record: EngineRecord, gpu: Gpu) -> None:
        """Raises EngineMismatch for an engine with other tensors than its record, BackendError when it cannot run."""
        self._engine = trt.load(read_engine(path))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{trt.title} cannot run {path.name}: {trt.last_error()}; build for fewer objects")
        self._gpu = gpu
        self._staging: dict[str, tuple[Tensor, Callable[[], None]]] = {}
        self.buffers: Tensors = {}
        wanted = {**record.inputs, **record.outputs}
        found = {}
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            dtype, shape = self._engine.get_tensor_dtype(name), self._engine.get_tensor_shape(name)
            found[name] = TensorSpec(trt.dtype_name(dtype), tuple(shape))
        if found != wanted:
            name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise EngineMismatch(
                f"{path}: {name} is {found.get(name)}, its record says {wanted.get(name)}. "
                f"{rebuild('DIR', trt.flavour)}"
            )
        for name, spec in wanted.items():
            self.buffers[name] = torch.zeros(spec.for_objects(0), dtype=getattr(torch, spec.dtype), device=gpu.device)
            self._context.set_tensor_address(name, self.buffers[name].data_ptr())
        self._inputs, self._outputs = tuple(record.inputs), tuple(record.outputs)
        self._replay = gpu.record(self._context.execute_async_v3)

    @property
    def device_memory_bytes(self) -> int:
        """Buffers and the memory for intermediate results; weights come on top."""
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())
        return buffers + int(self._engine.device_memory_size_v2)

    def __call__(self, inputs: Tensors, objects: int) -> Tensors:
        """Rows past `objects` keep what an earlier call left: rows do not touch each other, and nobody reads them."""
        for name in self._inputs:
            self._copy_in(name, inputs[name])
        self._replay()
        return {name: self._rows(name, objects) for name in self._outputs}

    def _rows(self, name: str, objects: int) -> Tensor:
        buffer = self.buffers[name]
        return buffer if buffer.shape[0] <= objects else buffer[:objects]

    def _copy_in(self, name: str, value: Tensor) -> None:
        target = self.buffers[name][: value.shape[0]]
        if value.device == target.device:
            target.copy_(value)
            return
        # From the host: through pinned memory, once the copy before has left it.
        if name not in self._staging:
            self._staging[name] = (self._gpu.pinned(self.buffers[name]), lambda: None)
        pinned, wait = self._staging[name]
        wait()
        staged = pinned[: value.shape[0]]
        staged.copy_(value)
        target.copy_(staged, non_blocking=True)
        self._staging[name] = (pinned, self._gpu.mark())


class TensorRtStages(ExportedStages):
    """`Stages` on the engines of an export folder that were built for this GPU, this TensorRT and these weights."""

    name = "tensorrt"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cuda:0",
        video_size: int = 128,
        tensorrt: TensorRt | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        """
        Args:
            folder: of `virst export` and `virst build`.
            tensorrt: the module to use; None: TensorRT if engines for it are there, else TensorRT-RTX.
            gpu: what stands for CUDA; None: torch's `device`.

        Raises:
            ExportError: the folder is not a complete export.
            EngineMismatch: no engines, or only stale or foreign ones.
            BackendError: no CUDA device, no TensorRT.
        """
        manifest = read_manifest(folder)
        gpu = gpu or Cuda(device)
        super().__init__(folder, manifest, gpu.device, video_size=video_size)
        self.tensorrt, engines = _engines_here(folder, manifest, tensorrt, gpu)
        self.buckets = _buckets(manifest, engines, folder, self.tensorrt.flavour)
        self._runners = {
            (stage, n): EngineRunner(self.tensorrt, path, read_record(path), gpu)
            for stage, by_objects in engines.items()
            for n, path in sorted(by_objects.items())
            if n == 0 or n in self.buckets
        }
        log.info(
            "%s, engines of %s for %s objects: %.0f MiB of device memory besides the weights",
            self.tensorrt.title,
            folder,
            ", ".join(map(str, self.buckets)),
            self.device_memory_bytes / 2**20,
        )

    @property
    def device_memory_bytes(self) -> int:
        """What buffers and intermediate results of all engines take on the GPU; it does not grow."""
        return sum(runner.device_memory_bytes for runner in self._runners.values())

    def run(self, stage: str, inputs: Tensors, objects: int) -> Tensors:
        if not self.manifest.stages[stage].has_objects:
            return self._runners[stage, 0](inputs, objects)
        most = self.buckets[-1]
        if objects <= most:
            bucket = next(n for n in self.buckets if n >= objects)
            return self._runners[stage, bucket](inputs, objects)
        return concatenate(
            self.run(stage, self._rows(stage, inputs, first, first + most), min(most, objects - first))
            for first in range(0, objects, most)
        )

    def _rows(self, stage: str, inputs: Tensors, first: int, last: int) -> Tensors:
        specs = self.manifest.stages[stage].inputs
        return {name: x[first:last] if OBJECTS in specs[name].shape else x for name, x in inputs.items()}


def _engines_here(
    folder: Path, manifest: Manifest, tensorrt: TensorRt | None, gpu: Gpu
) -> tuple[TensorRt, dict[str, dict[int, Path]]]:
    """The TensorRT whose engines are there. Raises the error that tells most: a mismatch before a missing package."""
    if tensorrt is not None:
        return tensorrt, usable_engines(folder, manifest, tensorrt.platform(*gpu.describe()))
    errors: list[BackendError] = []
    for flavour in (TENSORRT, TENSORRT_RTX):
        try:
            trt = load_tensorrt(flavour)
            return trt, usable_engines(folder, manifest, trt.platform(*gpu.describe()))
        except BackendError as error:
            errors.append(error)
    raise next((error for error in errors if isinstance(error, EngineMismatch)), errors[0])


def _buckets(manifest: Manifest, paths: dict[str, dict[int, Path]], folder: Path, flavour: str) -> tuple[int, ...]:
    """Numbers of objects that every stage has an engine for."""
    per_stage = [set(rows) for stage, rows in paths.items() if manifest.stages[stage].has_objects]
    common = tuple(sorted(set.intersection(*per_stage)))
    if not common:
        again = rebuild(folder, flavour)
        raise EngineMismatch(f"the engines in {folder} are for different numbers of objects. {again}")
    return common
