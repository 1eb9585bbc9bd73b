# SPDX-License-Identifier: Apache-2.0
"""Ours beside what a user would take instead: equal weights, frames and prompts, in one run, frame by frame in turn.

Speed is measured in one process, where the systems take turns at every frame, so that whatever else the machine does
hits all of them. Memory is measured in a process of its own for each.
"""

import copy
import importlib.util
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from virst_engine.backends.choice import preferred_backends
from virst_engine.backends.torch_backend import PRECISIONS, TorchStages
from virst_engine.config import ModelParameters
from virst_engine.errors import BackendError, VirstError
from virst_engine.evaluate.bench import OBJECT_COUNTS, flatness
from virst_engine.evaluate.peers import (
    MOST_OBJECTS,
    STAGES,
    Footage,
    OurTracker,
    System,
    comparison_config,
    comparison_model,
    flop_per_frame,
    with_pooled_memory,
)
from virst_engine.evaluate.provenance import command_line, device_description, versions
from virst_engine.model.sam2 import Sam2
from virst_engine.timing import StageTimer, percentiles, resident_mib
from virst_engine.types import ClickPrompt

PEERS = ("sam2", "transformers")
BACKENDS = ("torch", "torch-compiled", "onnxruntime", "tensorrt")
EXPORTED = ("onnxruntime", "tensorrt")  # run what `virst export` writes
POOLED = " pooled"  # ends the name of one of ours with pooled memory keys
WARM_UP_FRAMES = 17  # from here on all memories and object pointers are there, in every system
SETTLED_FRAME = 500  # from here on memory is compared; sooner in a video that is too short
CURVE_POINTS = 500


@dataclass(frozen=True)
class PeerSettings:
    """What is compared."""

    # threads 0 = torch's choice, as the peers' users have it. Without `weights` they are random.
    model: ModelParameters = field(default_factory=lambda: ModelParameters(name="sam2.1-tiny", threads=0))
    against: tuple[str, ...] = PEERS
    objects: tuple[int, ...] = OBJECT_COUNTS
    frames: int = 300  # of each measurement of speed, per system
    memory_frames: int = 0  # 0 = as many
    backends: tuple[str, ...] = ()  # of ours, () = those that this machine has
    pooled: bool = False  # ours with pooled memory keys, too
    precision: str = "fp32"  # of the computation, in all systems
    seed: int = 0

    def __post_init__(self) -> None:
        _check_names("a peer", self.against, PEERS)
        _check_names("a backend", self.backends, BACKENDS)
        _check_names("the precision", (self.precision,), tuple(PRECISIONS))
        if not self.against:
            raise ValueError(f"a comparison needs peers: {', '.join(PEERS)}")
        if not self.objects or not all(1 <= count <= MOST_OBJECTS for count in self.objects):
            raise ValueError(f"the video has 1 to {MOST_OBJECTS} objects, asked for {self.objects}")
        if self.frames < 2 or self.memory_frames < 0:
            raise ValueError("a comparison needs frames >= 2 and memory_frames >= 0")
        comparison_config(self.model)

    @property
    def our_backends(self) -> tuple[str, ...]:
        return self.backends or available_backends(self.model.device)

    @property
    def our_systems(self) -> tuple[str, ...]:
        return tuple(system for backend in self.our_backends for system in self.systems_of(backend))

    def systems_of(self, backend: str) -> tuple[str, ...]:
        return (backend, backend + POOLED) if self.pooled else (backend,)

    @property
    def ratio_of(self) -> str:
        """Which of ours `ratio` is about: what `engine.backend: auto` runs where its stages are exported."""
        measured = self.our_backends
        order = preferred_backends(self.model.device, self.precision)
        # torch-compiled is torch with engine.compiled.
        for name in (*order[:-1], "torch-compiled", *order[-1:]):
            if name in measured:
                return name
        return measured[0]

    @property
    def peer_systems(self) -> tuple[str, ...]:
        on_gpu = torch.device(self.model.device).type == "cuda"
        optimized = ("sam2 vos_optimized",) if on_gpu and "sam2" in self.against else ()
        return (*self.against, *optimized)


def parse_objects(text: str) -> tuple[int, ...]:
    """`1,4,8` as numbers. Raises ValueError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"numbers of objects look like 1,4,8, got {text!r}") from None


def available_backends(device: str) -> tuple[str, ...]:
    """What this machine can run ours with."""
    on_gpu = torch.device(device).type == "cuda"

    def installed(package: str) -> bool:
        return importlib.util.find_spec(package) is not None

    found = ["torch", "torch-compiled"] if on_gpu else ["torch"]
    if not on_gpu and installed("onnxruntime") and installed("onnx"):
        found.append("onnxruntime")
    if on_gpu and installed("onnx") and _can_build_engines(device):
        found.append("tensorrt")
    return tuple(found)


def _can_build_engines(device: str) -> bool:
    """Whether a TensorRT is here that compiles for this GPU; TensorRT-RTX has no code for an H100."""
    from virst_engine.export.tensorrt import tensorrt_for

    try:
        tensorrt_for(device)
    except BackendError:
        return False
    return True


# Systems


@dataclass(frozen=True)
class Workshop:
    """What systems are made of."""

    settings: PeerSettings
    model: Sam2
    footage: Footage
    exports: Path  # where `export_system` put its folders

    def build(self, name: str, frames: int) -> System:
        """One of `our_systems` or `peer_systems`, for a video of this many frames.

        Raises BackendError or ExportError when a backend of ours cannot run here.
        """
        device, precision = self.settings.model.device, self.settings.precision
        if name.startswith("sam2"):
            from virst_engine.evaluate.sam2_peer import Sam2Predictor

            optimized = name != "sam2"
            return Sam2Predictor(
                self.model, self.footage, frames, device=device, precision=precision, vos_optimized=optimized
            )
        if name == "transformers":
            from virst_engine.evaluate.transformers_peer import TransformersSession

            return TransformersSession(self.model, self.footage, device=device, precision=precision)
        return OurTracker(name, self._stages(name), self.footage, device)

    def _stages(self, name: str) -> Any:
        backend, model = name.removesuffix(POOLED), self.settings.model
        if backend == "onnxruntime":
            from virst_engine.backends.onnx_backend import OnnxRuntimeStages

            # As many as torch has, which obeys OMP_NUM_THREADS.
            threads = model.threads or torch.get_num_threads()
            return OnnxRuntimeStages(export_folder(self.exports, name), device=model.device, threads=threads)
        if backend == "tensorrt":
            from virst_engine.backends.tensorrt_backend import TensorRtStages

            return TensorRtStages(export_folder(self.exports, name), device=model.device)
        sam2 = with_pooled_memory(self.model) if name.endswith(POOLED) else self.model
        return TorchStages(sam2, precision=self.settings.precision, compiled=backend == "torch-compiled")


def export_folder(exports: Path, name: str) -> Path:
    return exports / ("pooled" if name.endswith(POOLED) else "plain")


def export_system(
    settings: PeerSettings, name: str, model: Sam2, exports: Path, on_step: Callable[[str], None]
) -> None:
    """Export what one of `our_systems` runs, and compile it if it needs that. Raises ExportError, BackendError."""
    memory = OurTracker.memory_parameters()
    backend, folder = name.removesuffix(POOLED), export_folder(exports, name)
    if backend not in EXPORTED:
        return
    if not folder.exists():
        from virst_engine.export.onnx import export_stages

        on_step(f"exporting {'pooled ' if name.endswith(POOLED) else ''}stages")
        export_stages(
            copy.deepcopy(with_pooled_memory(model) if name.endswith(POOLED) else model).cpu(),
            folder,
            name=settings.model.name,
            weights_sha256="",  # these stages live as long as this run
            anchors_attended=memory.anchors_attended,
            recent_frames=memory.recent_frames,
            pointers=memory.pointers,
            precision=settings.precision,
        )
    if backend == "tensorrt":
        from virst_engine.export.tensorrt import build_engines, tensorrt_for

        device = settings.model.device
        on_step(f"compiling engines for {name}")
        build_engines(folder, objects=settings.objects, device=device, rtx=tensorrt_for(device).is_rtx)


def build_ours(
    workshop: Workshop, frames: int, on_step: Callable[[str], None]
) -> tuple[dict[str, list[System]], dict[str, str]]:
    """Backend -> its systems; and backend -> why it cannot run here, for those that nobody asked for by name.

    Raises VirstError when one that was asked for cannot, or when none can.
    """
    settings = workshop.settings
    built: dict[str, list[System]] = {}
    skipped: dict[str, str] = {}
    for backend in settings.our_backends:
        try:
            names = settings.systems_of(backend)
            for name in names:
                export_system(settings, name, workshop.model, workshop.exports, on_step)
            built[backend] = [workshop.build(name, frames) for name in names]
        except VirstError as error:
            if settings.backends:
                raise
            skipped[backend] = str(error)
            on_step(f"{backend} skipped: {error}")
    if not built:
        reasons = "; ".join(f"{backend}: {why}" for backend, why in skipped.items())
        raise BackendError(f"no backend of ours runs here ({reasons}); name one with --backends")
    return built, skipped


# The run


def run_peers(
    settings: PeerSettings,
    *,
    on_step: Callable[[str], None] = lambda what: None,
    with_memory: bool = True,
) -> dict[str, Any]:
    """The whole comparison, as it goes into the JSON file. Times are milliseconds, memory is MiB or MB (10^6 bytes).

    Args:
        on_step: called with a few words before each part.
        with_memory: also the processes that measure memory, one per system.

    Raises:
        VirstError: a system cannot run here; the message names it.
    """
    started_s = time.perf_counter()
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    on_step("building the models")
    asked = settings
    with tempfile.TemporaryDirectory(prefix="virst_bench_") as folder, torch.no_grad():
        model = comparison_model(settings.model, settings.seed)
        footage = Footage(Path(folder), model.config.image_size)
        workshop = Workshop(settings, model, footage, Path(folder) / "exports")
        frames = 1 + WARM_UP_FRAMES + settings.frames
        built, skipped = build_ours(workshop, frames, on_step)
        settings = replace(settings, backends=tuple(built))  # from here on, what runs
        ours, peers = settings.our_systems, settings.peer_systems
        systems = [system for each in built.values() for system in each]
        systems += [workshop.build(name, frames) for name in peers]
        del built
        peak = matmul_gflops(settings.model.device, settings.precision)
        flop, speeds = {}, {}
        for objects in settings.objects:
            on_step(f"{objects} objects, {settings.frames} frames, {len(systems)} systems in turn")
            for name in ours:
                flop[name, objects] = flop_per_frame(
                    TorchStages(_counted(model, name, settings.precision), precision=settings.precision),
                    footage,
                    objects,
                    settings.model.device,
                )
            speeds[objects] = measure_speed(
                systems, footage.prompts[:objects], settings.frames, device=settings.model.device
            )
        peak = max(peak, matmul_gflops(settings.model.device, settings.precision))
        del systems
        memories = {}
        if with_memory:
            for name in (*ours, *peers):
                if not name.endswith(POOLED):
                    memories[name] = _memory_in_own_process(settings, name, Path(folder) / "exports", on_step)
    result = {
        **_ratios(settings, speeds),
        "memory_mb_per_1000_frames": {name: found.row["mb_per_1000_frames"] for name, found in memories.items()},
        **_agreements(settings, speeds),
        "pooled": _pooled_ratios(settings, speeds),
        "systems": {
            name: {str(objects): _row(speed, name, objects, flop, peak) for objects, speed in speeds.items()}
            for name in (*ours, *peers)
        },
        "skipped": {backend: f"skipped: {why}" for backend, why in skipped.items()},
        "memory": {name: found.row for name, found in memories.items()},
        "curves": {name: found.curve for name, found in memories.items()},
        "model": settings.model.name,
        "image_size": model.config.image_size,
        "weights": settings.model.weights or f"random, seed {settings.seed}",
        "peak_gflops": {"value": round(peak, 1), "measured_by": "matmul", "precision": settings.precision},
        "threads": torch.get_num_threads(),
    }
    return {
        **result,
        "settings": asdict(asked),
        "versions": versions(),
        "device": device_description(settings.model.device),
        "command": command_line(),
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def _counted(model: Sam2, name: str, precision: str) -> Sam2:
    """The model whose operations are those that this system of ours does."""
    counted = with_pooled_memory(model) if name.endswith(POOLED) else with_pooled_memory(model, 1)
    if name.removesuffix(POOLED) in EXPORTED and precision == "fp32":
        for layer in counted.memory_attention.layers:  # as `export_stages` does in float32
            layer.cross_attn_image.projects_values_first = False
    return counted


@dataclass
class Speed:
    """One number of objects: what every frame took in every system, in the order of frames."""

    ms: dict[str, list[float]]
    cpu_ms: dict[str, list[float]]  # of all threads of this process: what a busy machine does not change much
    stage_ms: dict[str, list[dict[str, float]]]
    # Of the first system with each other one, over all frames: least IoU of an object's masks, largest difference of
    # its low-resolution logits.
    iou: dict[str, float]
    logit_difference: dict[str, float]
    mask_percent: float  # of the picture, mean over objects and frames: IoU of empty masks would mean nothing


def measure_speed(
    systems: Sequence[System], prompts: Sequence[ClickPrompt], frames: int, *, device: str = "cpu"
) -> Speed:
    """Let the systems segment a video side by side: each frame goes to all of them before the next one.

    Who is first changes with every frame. The first frames, with their prompts and while memories fill, do not count.
    """
    names = [system.name for system in systems]
    others = names[1:]
    speed = Speed(
        ms={name: [] for name in names},
        cpu_ms={name: [] for name in names},
        stage_ms={name: [] for name in names},
        iou=dict.fromkeys(others, 1.0),
        logit_difference=dict.fromkeys(others, 0.0),
        mask_percent=0.0,
    )
    areas = []
    for system in systems:
        system.begin(prompts)
    for number in range(1, 1 + WARM_UP_FRAMES + frames):
        first = number % len(systems)
        masks: dict[str, Bool[np.ndarray, "o height width"]] = {}
        for system in (*systems[first:], *systems[:first]):
            timer = StageTimer(device)
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            masks[system.name] = system.step(number, timer)  # on the host: the device is done with it
            end_s, end_cpu_s = time.perf_counter(), time.process_time()
            if number > WARM_UP_FRAMES:
                speed.ms[system.name].append(1e3 * (end_s - begin_s))
                speed.cpu_ms[system.name].append(1e3 * (end_cpu_s - begin_cpu_s))
                speed.stage_ms[system.name].append(timer.ms())
        reference, logits = masks[names[0]], systems[0].logits()
        areas.append(100 * float(reference.mean()))
        for system in systems[1:]:
            name = system.name
            speed.iou[name] = min(speed.iou[name], least_iou(reference, masks[name]))
            difference = float((system.logits() - logits).abs().max())
            speed.logit_difference[name] = max(speed.logit_difference[name], difference)
    for system in systems:
        system.end()
    speed.mask_percent = float(np.mean(areas))
    return speed


def least_iou(one: Bool[np.ndarray, "o height width"], other: Bool[np.ndarray, "o height width"]) -> float:
    """The lowest IoU of an object's two masks; 1 for two empty ones."""
    union = (one | other).sum(axis=(1, 2))
    both = (one & other).sum(axis=(1, 2))
    return float(np.where(union > 0, both / np.maximum(union, 1), 1.0).min())


def matmul_gflops(device: str, precision: str) -> float:
    """GFLOP/s of the best of several large matrix products: what this device can do with this type."""
    on_gpu = torch.device(device).type == "cuda"
    side, runs = (8192, 20) if on_gpu else (1536, 6)
    dtype = PRECISIONS[precision] or torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(runs):
        begin_s = time.perf_counter()
        product = a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin_s)
    del product
    return 2 * side**3 / best_s / 1e9


# Memory


@dataclass(frozen=True)
class Memory:
    """One system alone in its process."""

    row: dict[str, Any]
    curve: dict[str, list[float]]


def measure_memory(settings: PeerSettings, name: str, exports: Path) -> Memory:
    """Run one system over the whole video; for a process that does nothing else."""
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    frames, objects = settings.memory_frames or settings.frames, min(settings.objects)
    with tempfile.TemporaryDirectory(prefix="virst_bench_") as folder, torch.no_grad():
        model = comparison_model(settings.model, settings.seed)
        footage = Footage(Path(folder), model.config.image_size)
        system = Workshop(settings, model, footage, exports).build(name, 1 + frames)
        del model
        return watch_memory(system, footage.prompts[:objects], frames, device=settings.model.device)


def watch_memory(system: System, prompts: Sequence[ClickPrompt], frames: int, *, device: str = "cpu") -> Memory:
    """Memory of this process (and of the device, on a GPU) and time after every frame."""
    memory_mib, ms, cpu_ms = np.zeros(frames), np.zeros(frames), np.zeros(frames)
    system.begin(prompts)
    start_mib = used_mib(device)
    for number in range(1, 1 + frames):
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        system.step(number, StageTimer(device))
        ms[number - 1] = 1e3 * (time.perf_counter() - begin_s)
        cpu_ms[number - 1] = 1e3 * (time.process_time() - begin_cpu_s)
        memory_mib[number - 1] = used_mib(device)
    settled = min(SETTLED_FRAME, frames // 3)
    later = memory_mib[settled:]
    slope_mib = float(np.polyfit(np.arange(later.size), later, 1)[0]) if later.size > 1 else 0.0
    row = {
        "frames": frames,
        "objects": len(prompts),
        "start_mib": round(start_mib, 1),
        "settled_frame": settled,
        "settled_mib": round(float(later[0]), 1),
        "last_mib": round(float(later[-1]), 1),
        "peak_mib": round(_peak_mib(device), 1),
        "mb_per_1000_frames": round(1000 * slope_mib * 2**20 / 1e6, 2),
        "ahead_mb_per_1000_frames": round(1000 * system.bytes_per_frame_ahead / 1e6, 2),
        "largest_change_percent": round(100 * float(np.abs(later / later[0] - 1).max()), 2),
        "frame_ms": percentiles(list(ms)),
        **flatness(ms),
        "late_over_early_cpu": flatness(cpu_ms)["late_over_early"],
    }
    blocks = np.array_split(np.arange(frames), min(frames, CURVE_POINTS))
    curve: dict[str, list[float]] = {
        "frame": [float(block[-1]) + 1 for block in blocks],
        "frame_ms": [round(float(np.median(ms[block])), 3) for block in blocks],
        "memory_mib": [round(float(memory_mib[block[-1]]), 2) for block in blocks],
    }
    if torch.device(device).type == "cpu":  # of all threads: what a busy machine does not change much
        curve["cpu_ms"] = [round(float(np.median(cpu_ms[block])), 3) for block in blocks]
    return Memory(row, curve)


def used_mib(device: str) -> float:
    """Resident memory of this process, and what torch holds of the GPU's if there is one."""
    on_gpu = torch.device(device).type == "cuda"
    return resident_mib() + (torch.cuda.memory_allocated(device) / 2**20 if on_gpu else 0.0)


def _peak_mib(device: str) -> float:
    on_gpu = torch.device(device).type == "cuda"
    try:  # not getrusage: its ru_maxrss begins with that of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        on_host = next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        on_host = math.nan
    return on_host + (torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else 0.0)


def _memory_in_own_process(settings: PeerSettings, name: str, exports: Path, on_step: Callable[[str], None]) -> Memory:
    on_step(f"memory of {name} over {settings.memory_frames or settings.frames} frames")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_memory, settings, name, exports).result()
        except BrokenProcessPool as error:
            raise VirstError(
                f"the process that measured the memory of {name} was ended by the system, most likely because the "
                "memory of this machine is full; ask for fewer --memory-frames"
            ) from error


# Figures


def _ratios(settings: PeerSettings, speeds: dict[int, Speed]) -> dict[str, Any]:
    ours = [name for name in settings.our_systems if not name.endswith(POOLED)]
    of_all = {
        own: {
            peer: {str(objects): _ratio(speed.ms[own], speed.ms[peer]) for objects, speed in speeds.items()}
            for peer in settings.peer_systems
        }
        for own in ours
    }
    chosen = of_all[settings.ratio_of]
    ratios = {
        "ratio": {peer: {o: row["median"] for o, row in rows.items()} for peer, rows in chosen.items()},
        "ratio_of": settings.ratio_of,
        "ratios": of_all,
    }
    if torch.device(settings.model.device).type == "cpu":
        ratios["cpu_time_ratios"] = {
            own: {
                peer: {str(objects): _ratio(speed.cpu_ms[own], speed.cpu_ms[peer]) for objects, speed in speeds.items()}
                for peer in settings.peer_systems
            }
            for own in ours
        }
    return ratios


def _ratio(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Of equal frames, measured one right after the other."""
    ratios = np.asarray(ours) / np.asarray(other)
    low, median, high = (round(float(q), 3) for q in np.percentile(ratios, (25, 50, 75)))
    return {"median": median, "quartiles": [low, high], "n": len(ratios)}


def _agreements(settings: PeerSettings, speeds: dict[int, Speed]) -> dict[str, Any]:
    others = [name for name in (*settings.our_systems, *settings.peer_systems)[1:] if not name.endswith(POOLED)]
    return {
        "agreement_with": settings.our_systems[0],
        "agreement": {name: round(min(speed.iou[name] for speed in speeds.values()), 5) for name in others},
        "largest_logit_difference": {
            name: float(f"{max(speed.logit_difference[name] for speed in speeds.values()):.3g}") for name in others
        },
        "mask_percent_of_picture": round(float(np.mean([speed.mask_percent for speed in speeds.values()])), 2),
    }


def _pooled_ratios(settings: PeerSettings, speeds: dict[int, Speed]) -> dict[str, Any]:
    """Backend -> objects -> pooled / unpooled, of the whole frame and of memory attention."""
    if not settings.pooled:
        return {}
    plain = [name for name in settings.our_systems if not name.endswith(POOLED)]
    stage = "memory_attention"
    return {
        name: {
            str(objects): {
                "frame": _ratio(speed.ms[name + POOLED], speed.ms[name]),
                stage: _ratio(*([ms[stage] for ms in speed.stage_ms[own]] for own in (name + POOLED, name))),
            }
            for objects, speed in speeds.items()
        }
        for name in plain
    }


def _row(
    speed: Speed, name: str, objects: int, flop: dict[tuple[str, int], dict[str, float]], peak: float
) -> dict[str, Any]:
    ms, stage_ms = speed.ms[name], speed.stage_ms[name]
    stages = [stage for stage in STAGES if any(stage in timings for timings in stage_ms)]
    by_stage = {stage: [timings.get(stage, 0.0) for timings in stage_ms] for stage in stages}
    rest = np.asarray(ms) - np.sum([by_stage[stage] for stage in stages], axis=0)
    row: dict[str, Any] = {
        "fps": round(1e3 / float(np.mean(ms)), 2),
        "frame_ms": percentiles(ms),
        "stage_ms": {**{stage: percentiles(each) for stage, each in by_stage.items()}, "rest": percentiles(list(rest))},
        "frames": len(ms),
    }
    if name in PEERS or name.startswith("sam2"):
        return row
    counted = flop[name, objects]
    row["gflop"] = {stage: round(count / 1e9, 3) for stage, count in counted.items()}
    row["share_of_peak"] = {
        stage: round(count / 1e6 / float(np.median(by_stage[stage])) / peak, 3) for stage, count in counted.items()
    }
    row["share_of_peak"]["frame"] = round(sum(counted.values()) / 1e6 / float(np.median(ms)) / peak, 3)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The tables that people read."""
    systems, counts = result["systems"], list(next(iter(result["systems"].values())))
    header = "".join(f" {count} object{'s' if count != '1' else ''} |" for count in counts)
    rule = "---|" * len(counts)
    lines = [
        f"# {result['model']} at {result['image_size']} px beside {', '.join(result['ratio'])}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['device']}, {result['threads']} threads, {result['peak_gflops']['precision']}; weights"
        f" {result['weights']}; {result['seconds']:.0f} s.",
        "",
        f"| ms per frame, p50 / p95 / p99 |{header}",
        f"|---|{rule}",
    ]
    for name, rows in systems.items():
        cells = (" / ".join(f"{row['frame_ms'][p]:.1f}" for p in ("p50", "p95", "p99")) for row in rows.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, why in result["skipped"].items():
        one_line = " ".join(why.split()).replace("|", "/")
        lines.append(f"| {name} | {one_line} |" + " - |" * (len(counts) - 1))
    lines += [
        "",
        f"`engine.backend: auto` chooses {result['ratio_of']} where its stages are exported.",
        "",
        f"| ratio: ours / peer, median (quartiles) |{header}",
        f"|---|{rule}",
    ]
    for own, peers in result["ratios"].items():
        for peer, rows in peers.items():
            lines.append(f"| {own} / {peer} | " + " | ".join(map(_ratio_cell, rows.values())) + " |")
    for own, peers in result.get("cpu_time_ratios", {}).items():
        for peer, rows in peers.items():
            lines.append(f"| {own} / {peer}, CPU time | " + " | ".join(map(_ratio_cell, rows.values())) + " |")
    for own, rows in result["pooled"].items():
        for part in ("frame", "memory_attention"):
            cells = (_ratio_cell(row[part]) for row in rows.values())
            lines.append(f"| {own}: pooled / unpooled, {part.replace('_', ' ')} | " + " | ".join(cells) + " |")
    for count in counts:
        plural = "s" if count != "1" else ""
        lines += ["", f"| ms of a stage, p50, {count} object{plural} | " + " | ".join(systems) + " |"]
        lines.append("|---|" + "---|" * len(systems))
        for stage in (*STAGES, "rest"):
            times = [rows[count]["stage_ms"].get(stage) for rows in systems.values()]
            lines.append(f"| {stage} | " + " | ".join("-" if t is None else f"{t['p50']:.1f}" for t in times) + " |")
        shares = [rows[count].get("share_of_peak", {}).get("frame") for rows in systems.values()]
        cells = ("-" if share is None else f"{100 * share:.0f} %" for share in shares)
        lines.append(f"| share of {result['peak_gflops']['value']:.0f} GFLOP/s (matmul) | " + " | ".join(cells) + " |")
    if result["memory"]:
        lines += [
            "",
            "| memory of a process of its own | frames | MB per 1,000 frames | loaded ahead, MB per 1,000 | MiB at the"
            " start / end / peak | largest change, % | late / early frame time | of the CPU |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in result["memory"].items():
            mib = " / ".join(f"{row[key]:.0f}" for key in ("start_mib", "last_mib", "peak_mib"))
            growth = f"{row['mb_per_1000_frames']:.1f} | {row['ahead_mb_per_1000_frames']:.0f}"
            change = f"{row['largest_change_percent']:.2f} | {row['late_over_early']:.3f}"
            change += f" | {row['late_over_early_cpu']:.3f}"
            lines.append(f"| {name} | {row['frames']} | {growth} | {mib} | {change} |")
    agreement = ", ".join(
        f"{name} {iou:.4f} (logits within {result['largest_logit_difference'][name]:g})"
        for name, iou in result["agreement"].items()
    )
    lines += [
        "",
        f"Least IoU of a mask with that of {result['agreement_with']}: {agreement}; masks fill"
        f" {result['mask_percent_of_picture']:.1f} % of the picture.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _ratio_cell(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    return f"{row['median']:.2f} ({low:.2f} to {high:.2f})"


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{what} is named twice in {', '.join(names)}")
