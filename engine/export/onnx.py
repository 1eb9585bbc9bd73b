# SPDX-License-Identifier: Apache-2.0
"""A model's stages -> ONNX files that ONNX Runtime runs and TensorRT compiles, each held against torch.

Opset 18, attention written out, one file per stage. Shapes are fixed but for the number of objects. In float32 the
numbers of memories, pointers and prompt tokens are free too: ONNX Runtime leaves out those that no object has, and
values are projected after the average, which is less work. Where scores are large, memory attention is there a second
time, in two files: what objects share, and the rest for one object. In bf16 and fp16 those numbers are fixed, and
values come first: so GPUs fuse memory attention. fp16 stays out of the mask decoder and memory encoder, whose errors
would grow.
"""

import fcntl
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from virst_engine.backends.manifest import (
    FILE,
    FORMAT,
    OBJECTS,
    PRECISIONS,
    PROMPT_ENCODER,
    Manifest,
    StageSpec,
    TensorSpec,
    file_sha256,
    write_manifest,
)
from virst_engine.backends.onnx_backend import ONE_BY_ONE, load_onnxruntime
from virst_engine.config import EngineParameters, MemoryParameters, ModelParameters
from virst_engine.errors import BackendError, ExportError
from virst_engine.export.onnx_graphs import (
    StageModule,
    exportable,
    for_export,
    rounded,
    stage_dtype,
    stage_module,
    with_tables,
)
from virst_engine.export.onnx_parity import check_range, check_stage, random_inputs
from virst_engine.model.sam2 import Sam2
from virst_engine.weights import load_segmenter, weights_sha256

log = logging.getLogger(__name__)

OPSET = 18
PROMPT_TOKENS = 16  # a box takes 3, VIRST's embeddings 10, n clicks n + 1
PACKAGES = ("virst_ros", "torch", "onnx", "onnxscript", "onnxruntime", "sam2")
PARTIAL = ".partial-"  # begins the name of the folder that an export works in
MOST_BYTES = 2**31 - 2**20  # a protobuf file ends there
# Attention scores of one object, from which on objects that take turns are faster than all of them at once.
LARGE_SCORE_BYTES = 4 << 20
# Axes that are free in float32, by the beginning of an input's name.
FREE_ROWS = {"spatial": "slots", "pointer": "rows", "sparse": "tokens"}
ON_CONSTANTS = ("Sin", "Cos", "Erf", "Range")  # what must not be computed from constants at run time
NEVER = ("IsNaN", "If", "Loop", "NonZero", "ScatterElements", "Attention")


def export_model(
    model: ModelParameters,
    engine: EngineParameters,
    memory: MemoryParameters,
    folder: Path,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """`export_stages` for the model, precision and memory that these parameters mean.

    Raises WeightsError, and what `export_stages` raises.
    """
    sam2, fusion_level = load_segmenter(model)
    if engine.pooled_keys:
        sam2.pool_memory(2)
    return export_stages(
        sam2,
        folder,
        name=model.name,
        weights_sha256=weights_sha256(model),
        anchors_attended=memory.anchors_attended,
        recent_frames=memory.recent_frames,
        pointers=memory.pointers,
        prompt_tokens=prompt_tokens,
        precision=engine.precision,
        fusion_level=fusion_level,
        on_step=on_step,
    )


def export_stages(
    sam2: Sam2,
    folder: Path,
    *,
    name: str,
    weights_sha256: str,
    anchors_attended: int = 3,
    recent_frames: int = 6,
    pointers: int = 16,
    prompt_tokens: int = PROMPT_TOKENS,
    precision: str = "fp32",
    fusion_level: int | None = None,
    values: str = "",
    one_by_one: bool | None = None,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """Write the stages of a model and check each with ONNX Runtime against torch; the manifest comes last.

    Files appear in `folder` when all of them have passed; until then, what was there stays.

    Args:
        weights_sha256: of the weights file, to recognise the model by.
        anchors_attended, recent_frames, pointers: sizes of the memory, as in MemoryParameters.
        prompt_tokens: most tokens of one prompt.
        fusion_level: the FPN level that the reasoner reads; None: none.
        values: "before" or "after": where memory attention projects its values; empty: what suits the precision.
        one_by_one: write memory attention for objects that take turns, too; None: in float32, where that is faster.
        on_step: called as (steps done, steps in all, what is next).

    Raises:
        ExportError: a stage differs from the model, or cannot be exported.
        BackendError: onnx, onnxscript or onnxruntime is missing.
    """
    _check_packages()
    if precision not in PRECISIONS:
        raise ExportError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    values = values or ("after" if precision == "fp32" else "before")
    if values not in ("before", "after"):
        raise ExportError(f"values must be projected before or after the average, got {values!r}")
    device = sam2.grid_cos.device
    if device.type != "cpu":
        raise ExportError(f"export from the CPU: the model is on {device}; load it with model.device cpu")
    slots, rows = anchors_attended + recent_frames, anchors_attended + pointers - 1
    specs = _specs(sam2, slots, rows, prompt_tokens, fusion_level)
    if one_by_one is None:
        one_by_one = precision == "fp32" and _score_bytes(sam2, slots, rows) >= LARGE_SCORE_BYTES
    if not one_by_one:
        specs = {stage: spec for stage, spec in specs.items() if stage not in ONE_BY_ONE}
    manifest = Manifest(
        model=name,
        weights_sha256=weights_sha256,
        image_size=sam2.config.image_size,
        memory_slots=slots,
        pointer_rows=rows,
        prompt_tokens=prompt_tokens,
        memory_frames=sam2.config.memory_frames,
        multimask_prompted=sam2.config.multimask_prompted,
        multimask_tracking=sam2.config.multimask_tracking,
        precision=precision,
        opset=OPSET,
        git_version=_git_version(),
        stages=specs,
        versions=_versions(),
        values=values,
        memory_pool=sam2.config.memory_pool,
    )
    steps = 2 * len(specs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial, lock = _partial_folder(folder)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written ({error}); choose another --out") from error
    try:
        for number, stage in enumerate(list(specs)):
            on_step(2 * number, steps, f"export {stage}")
            file = partial / f"{stage}.onnx"
            is_free = precision == "fp32"
            dtype = stage_dtype(stage, precision)
            _write_graph(sam2, stage, file, manifest, dtype, fusion_level, free_rows=is_free)
            _check_graph(file, stage, specs[stage])
            on_step(2 * number + 1, steps, f"check {stage}")
            model = sam2 if dtype is torch.float32 else rounded(with_tables(sam2), dtype).float()
            reference = stage_module(model, stage, torch.float32, fusion_level)
            difference = check_stage(
                stage, file, specs[stage], reference, memory_frames=manifest.memory_frames, free_rows=is_free
            )
            if dtype is torch.float16:
                _check_range(stage, specs[stage], model, fusion_level)
            log.info("%s: %.1f MB, differs from torch by %.1e", stage, file.stat().st_size / 1e6, difference)
            specs[stage] = replace(specs[stage], sha256=file_sha256(file))
        save_file(
            {key: value.contiguous() for key, value in sam2.prompts.state_dict().items()}, partial / PROMPT_ENCODER
        )
        _publish(partial, folder, replace(manifest, stages=specs))
    except OSError as error:
        raise ExportError(f"{folder} cannot be written ({error}); free some space, or choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
    on_step(steps, steps, "done")
    return replace(manifest, stages=specs)


def _check_range(stage: str, spec: StageSpec, model: Sam2, fusion_level: int | None) -> None:
    model = for_export(model, values="before", fusion_level=fusion_level)
    module = exportable(stage_module(model, stage, torch.float32, fusion_level))
    check_range(stage, spec, module, memory_frames=model.config.memory_frames)


def _partial_folder(folder: Path) -> tuple[Path, int]:
    """A new folder in `folder`, and a descriptor that locks it until it is closed, or its process is killed.

    What killed exports have left is removed.
    """
    parent = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)  # nobody looks at a new folder before it is locked
        for left in folder.glob(f"{PARTIAL}*"):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # an export under way
            finally:
                os.close(lock)
            log.info("%s is what an export left that did not end: removed", left)
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(parent)
    return partial, lock


def _publish(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Put the files in their place. An export that was there is unusable from the first to the last moment of this."""
    (folder / FILE).unlink(missing_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    write_manifest(folder, manifest)


def _specs(sam2: Sam2, slots: int, rows: int, tokens: int, fusion_level: int | None) -> dict[str, StageSpec]:
    """Names, dtypes and shapes of all tensors; checksums are still missing."""
    size, c, m, g = sam2.config.image_size, sam2.config.channels, sam2.config.memory_channels, sam2.config.grid

    def floats(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    def flags(*shape: int | str) -> TensorSpec:
        return TensorSpec("bool", shape)

    top, masks = floats(1, c, g, g), floats(OBJECTS, 4 * g, 4 * g)
    high_res = {"high_res_s0": floats(1, c // 8, 4 * g, 4 * g), "high_res_s1": floats(1, c // 4, 2 * g, 2 * g)}
    encoded = {"top": top, **high_res}
    if "fusion" in stage_module(sam2, "image_encoder", torch.float32, fusion_level).outputs:
        assert fusion_level is not None
        side = 4 * g >> fusion_level % 3
        encoded["fusion"] = floats(1, c, side, side)
    tensors = {
        "image_encoder": ({"pixels": floats(1, 3, size, size)}, encoded),
        "memory_attention": (
            {
                "top": top,
                "spatial": floats(OBJECTS, slots, m, g, g),
                "spatial_tpos": TensorSpec("int64", (OBJECTS, slots)),
                "spatial_valid": flags(OBJECTS, slots),
                "pointers": floats(OBJECTS, rows, c),
                "pointer_distance": floats(OBJECTS, rows),
                "pointer_valid": flags(OBJECTS, rows),
            },
            {"conditioned": floats(OBJECTS, c, g, g)},
        ),
        "memory_queries": ({"top": top}, {"tokens": floats(1, g * g, c), "queries": floats(1, g * g, c)}),
        "memory_read": (
            {
                "tokens": floats(1, g * g, c),
                "queries": floats(1, g * g, c),
                "spatial": floats(1, slots, m, g, g),
                "spatial_tpos": TensorSpec("int64", (1, slots)),
                "pointers": floats(1, rows, c),
                "pointer_distance": floats(1, rows),
            },
            {"conditioned": floats(1, c, g, g)},
        ),
        "mask_decoder": (
            {
                "conditioned": floats(OBJECTS, c, g, g),
                **high_res,
                "sparse": floats(OBJECTS, tokens, c),
                "sparse_valid": flags(OBJECTS, tokens),
                "multimask": flags(OBJECTS),
            },
            {
                "mask_logits": masks,
                "iou": floats(OBJECTS),
                "object_score_logits": floats(OBJECTS),
                "pointer": floats(OBJECTS, c),
            },
        ),
        "memory_encoder": (
            {"top": top, "mask_logits": masks, "object_score_logits": floats(OBJECTS), "binarize": flags(OBJECTS)},
            {"spatial": floats(OBJECTS, m, g, g)},
        ),
    }
    return {stage: StageSpec(f"{stage}.onnx", "", inputs, outputs) for stage, (inputs, outputs) in tensors.items()}


def _score_bytes(sam2: Sam2, slots: int, rows: int) -> int:
    """Of one object: one number per cell of the image and key."""
    cells, splits = sam2.config.grid**2, sam2.config.channels // sam2.config.memory_channels
    return 4 * cells * (slots * cells // sam2.config.memory_pool**2 + rows * splits)


def _write_graph(
    sam2: Sam2,
    stage: str,
    file: Path,
    manifest: Manifest,
    dtype: torch.dtype,
    fusion_level: int | None,
    *,
    free_rows: bool,
) -> None:
    spec = manifest.stages[stage]
    baked = for_export(with_tables(sam2), values=manifest.values, fusion_level=fusion_level, fused=stage in ONE_BY_ONE)
    baked = rounded(baked, dtype)
    module = exportable(stage_module(baked, stage, dtype, fusion_level))
    axes = _free_axes(spec, free_rows=free_rows)
    try:
        program = _exported(module, random_inputs(spec, 2, seed=0, memory_frames=manifest.memory_frames), axes)
    except Exception as error:  # whatever the exporter of the version at hand raises
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"torch {torch.__version__} cannot export {stage} ({type(error).__name__}: {reason}); "
            "requirements/constraints.txt names versions that can"
        ) from error
    metadata = {
        "format": FORMAT,
        "model": manifest.model,
        "weights_sha256": manifest.weights_sha256,
        "stage": stage,
        "image_size": manifest.image_size,
        "memory_slots": manifest.memory_slots,
        "pointer_rows": manifest.pointer_rows,
        "prompt_tokens": manifest.prompt_tokens,
        "memory_pool": manifest.memory_pool,
        "precision": manifest.precision,
        "values": manifest.values,
        "git_version": manifest.git_version,
    }
    program.model.metadata_props.update({key: str(value) for key, value in metadata.items()})
    program.model.producer_name = "virst export"
    program.save(str(file), external_data=False)


def _exported(module: StageModule, inputs: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Any:
    """torch's ONNX program of a stage, with constants folded."""
    from onnxscript import optimizer

    dims = {axis: torch.export.Dim(axis, min=1) for free in axes.values() for axis in free.values()}
    shapes = {name: {i: dims[axis] for i, axis in free.items()} for name, free in axes.items()}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(module.outputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            optimize=False,  # once, below
            verbose=False,
        )
        assert program is not None
        optimizer.optimize(program.model, input_size_limit=MOST_BYTES, output_size_limit=MOST_BYTES)
    return program


def _free_axes(spec: StageSpec, *, free_rows: bool) -> dict[str, dict[int, str]]:
    """By input, the names of the axes that are not fixed."""
    axes = {}
    for name, tensor in spec.inputs.items():
        axes[name] = {i: OBJECTS for i, size in enumerate(tensor.shape) if size == OBJECTS}
        for beginning, axis in FREE_ROWS.items():
            if free_rows and name.startswith(beginning):
                axes[name][1] = axis
    return axes


def _check_graph(file: Path, stage: str, spec: StageSpec) -> None:
    """Hold a file to what all of them must be. Raises ExportError."""
    import onnx

    model = onnx.load(str(file))
    graph = model.graph
    problems = []
    if [entry.version for entry in model.opset_import if entry.domain == ""] != [OPSET]:
        problems.append(f"its opset is not {OPSET}")
    if stage not in ONE_BY_ONE:  # which only ONNX Runtime reads
        problems += [f"it holds the operator {node.op_type} of {node.domain}" for node in graph.node if node.domain]
    for side, found, wanted in (("inputs", graph.input, spec.inputs), ("outputs", graph.output, spec.outputs)):
        shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in found}
        if list(shapes) != list(wanted):
            problems.append(f"its {side} are {', '.join(shapes)}")
            continue
        for name, shape in shapes.items():
            fixed = [
                (have, want)
                for have, want in zip(shape, wanted[name].shape, strict=True)
                if isinstance(have, int) or want == OBJECTS
            ]
            if any(have != want for have, want in fixed):
                problems.append(f"{name} is {shape}")
    operators = {node.op_type for node in graph.node}
    problems += [f"it holds the operator {name}" for name in NEVER if name in operators]
    problems += [f"it takes the {name} of a constant" for name in _operators_on_constants(graph, ON_CONSTANTS)]
    if any(
        node.op_type == "Resize" and attribute.s == b"cubic"
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "mode"
    ):
        problems.append("it resizes the position embedding")
    if problems:
        raise ExportError(f"{stage} is not what it should be: {'; '.join(problems)}; see requirements/constraints.txt")


def _operators_on_constants(graph: Any, names: tuple[str, ...]) -> Iterator[str]:
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type in names:
                yield node.op_type


def _check_packages() -> None:
    load_onnxruntime()
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise BackendError(
                f"the package {package} cannot be imported ({error}); pip install 'virst_ros[export]'"
            ) from error


def _git_version() -> str:
    """The commit of this checkout; empty outside of one."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        here = Path(__file__).resolve().parent
        run = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that are not there, of names that it does not need, of each node that it folds."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
