# SPDX-License-Identifier: Apache-2.0
"""An export folder's table of contents: which stages it holds, for which model, with which tensors.

`virst export` writes it; whoever runs or compiles the stages reads it, and takes no file that it does not vouch for.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from virst_engine.errors import ExportError
from virst_engine.types import StageSizes

FORMAT = "virst-stages-1"
FILE = "manifest.json"
PROMPT_ENCODER = "prompt_encoder.safetensors"
STAGES = ("image_encoder", "memory_attention", "mask_decoder", "memory_encoder")
OBJECTS = "objects"  # the name of the one axis whose size is free in the ONNX files
PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "bool")
REMEDY = "export it again: virst export MODEL --out DIR"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a stage: NumPy's name of the dtype; a size is a number, or `objects`."""

    dtype: str
    shape: tuple[int | str, ...]

    def for_objects(self, objects: int) -> tuple[int, ...]:
        return tuple(objects if size == OBJECTS else int(size) for size in self.shape)


@dataclass(frozen=True)
class StageSpec:
    """One ONNX file; tensors are named after the fields of the dataclasses in engine/types.py."""

    file: str
    sha256: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    @property
    def has_objects(self) -> bool:
        """False: the stage sees the frame alone, and runs once for all objects."""
        return any(OBJECTS in spec.shape for spec in (*self.inputs.values(), *self.outputs.values()))


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    model: str
    weights_sha256: str
    image_size: int
    memory_slots: int  # s: anchors attended + recent frames
    pointer_rows: int  # r: anchors attended + pointers - 1
    prompt_tokens: int  # n: rows of `sparse`; unused ones are marked by `sparse_valid`
    memory_frames: int  # P: rows of maskmem_tpos_enc
    multimask_prompted: bool  # what `multimask` is where nobody says: on a frame with a prompt ...
    multimask_tracking: bool  # ... and on one without
    precision: str
    opset: int
    git_version: str
    stages: Mapping[str, StageSpec]
    versions: Mapping[str, str] = field(default_factory=dict)
    values: str = "before"  # "after": memory attention projects values after the average; GPUs do not fuse that
    memory_pool: int = 1  # pool x pool cells of a memory are one key
    format: str = FORMAT

    @property
    def sizes(self) -> StageSizes:
        channels, grid = self.stages["image_encoder"].outputs["top"].for_objects(1)[1:3]
        return StageSizes(
            image_size=self.image_size,
            channels=channels,
            memory_channels=self.stages["memory_encoder"].outputs["spatial"].for_objects(1)[1],
            grid=grid,
            mask=4 * grid,
            memory_frames=self.memory_frames,
            prompt_tokens=self.prompt_tokens,
            reads_boxes=self.multimask_prompted,  # as Sam2Config.reads_boxes
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` last of all files: a folder without it is not finished."""
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export folder. Raises ExportError when there is none, or it is not one that we can use."""
    path = folder / FILE
    if not path.is_file():
        raise ExportError(f"{folder} is no export folder: it has no {FILE}. Make one: virst export MODEL --out DIR")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ExportError(f"{path} has format {values['format']!r}, this version reads {FORMAT!r}; {REMEDY}")
        stages = {name: _stage(name, spec) for name, spec in values.pop("stages").items()}
        manifest = Manifest(**values, stages=stages)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path} cannot be read ({error!r}); {REMEDY}") from error
    missing = [name for name in STAGES if name not in manifest.stages]
    if missing:
        raise ExportError(f"{path} lacks the stage {missing[0]}; {REMEDY}")
    if manifest.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ExportError(f"{path}: precision must be one of {known}, got {manifest.precision!r}; {REMEDY}")
    return manifest


def stage_path(folder: Path, manifest: Manifest, stage: str) -> Path:
    """The ONNX file of a stage, after a look at its bytes. Raises ExportError unless it is what was exported."""
    spec = manifest.stages[stage]
    path = folder / spec.file
    if not path.is_file():
        raise ExportError(f"{path} is missing, {folder / FILE} names it; {REMEDY}")
    found = file_sha256(path)
    if found != spec.sha256:
        raise ExportError(
            f"{path} is not the {stage} that was exported with {manifest.model}: its SHA-256 is {found[:12]}, "
            f"{FILE} says {spec.sha256[:12]}. It was changed, or belongs to another export; {REMEDY}"
        )
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stage(name: str, values: Mapping[str, Any]) -> StageSpec:
    file = str(values["file"])
    if Path(file).name != file:
        raise ValueError(f"the file of {name} must be in the export folder itself, got {file!r}")
    return StageSpec(file, str(values["sha256"]), _tensors(values["inputs"]), _tensors(values["outputs"]))


def _tensors(values: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorSpec]:
    specs = {}
    for name, spec in values.items():
        if spec["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {spec['dtype']!r}, known are {', '.join(DTYPES)}")
        shape = tuple(spec["shape"])
        if not all(size == OBJECTS or (type(size) is int and size > 0) for size in shape):
            raise ValueError(f"the sizes of {name} must be positive numbers or {OBJECTS!r}, got {shape}")
        specs[name] = TensorSpec(spec["dtype"], shape)
    return specs
