# SPDX-License-Identifier: Apache-2.0
"""Compiled engines on disk. Beside each lies a record that says in clear what it was made from and for.

An engine runs only where everything in its record is true: TensorRT itself does not know which weights are in it, and
a few of its versions run foreign engines to wrong masks.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from virst_engine.backends.manifest import Manifest, TensorSpec
from virst_engine.backends.tensorrt_api import TENSORRT, TENSORRT_RTX, Platform
from virst_engine.errors import BackendError, EngineMismatch

FORMAT = "virst-engine-1"
FACTS = ("build_s", "fused_attentions", "engine_bytes")  # how an engine came out; nothing that it depends on


@dataclass(frozen=True)
class EngineRecord:
    """Everything that an engine depends on. Two engines with the same record are interchangeable."""

    model: str
    weights_sha256: str
    onnx_sha256: str
    stage: str
    objects: int  # rows of its object axis; 0: it has none
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    flavour: str
    version: str
    gpu: str
    targets: tuple[str, ...]
    attention: str  # "fused": built so that it would have failed otherwise; "free": as TensorRT thought best
    format: str = FORMAT

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        return f"{self.stage}{f'-{self.objects}' if self.objects else ''}.engine"


def record_of(manifest: Manifest, stage: str, objects: int, platform: Platform, attention: str) -> EngineRecord:
    """The record that an engine must have to run `stage` for `objects` rows on `platform`."""
    spec = manifest.stages[stage]
    rows = objects if spec.has_objects else 0

    def fixed(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tensor.for_objects(rows)) for name, tensor in tensors.items()}

    return EngineRecord(
        model=manifest.model,
        weights_sha256=manifest.weights_sha256,
        onnx_sha256=spec.sha256,
        stage=stage,
        objects=rows,
        precision=manifest.precision,
        inputs=fixed(spec.inputs),
        outputs=fixed(spec.outputs),
        flavour=platform.flavour,
        version=platform.version,
        gpu=platform.gpu,
        targets=platform.targets,
        attention=attention,
    )


def folder_key(manifest: Manifest, platform: Platform) -> str:
    """The name of the folder that keeps the engines of one export for one platform."""
    stages = {name: spec.sha256 for name, spec in manifest.stages.items()}
    values = [manifest.weights_sha256, manifest.precision, stages, asdict(platform)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def engine_roots(folder: Path) -> tuple[Path, Path]:
    """Where engines of an export folder may lie: in it, or in the user's cache when it cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "engines", cache / "virst_ros" / "engines"


def writable_root(folder: Path) -> Path:
    """The first of `engine_roots` that can be written to. Raises BackendError when none can."""
    roots = engine_roots(folder)
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            return root
    raise BackendError(f"neither {roots[0]} nor {roots[1]} can be written to; make one of them writable")


def save_engine(
    folder: Path, record: EngineRecord, plan: bytes, *, build_s: float = 0.0, fused_attentions: int = 0
) -> Path:
    """Write an engine and, after it, its record; a reader never sees half of either."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    facts = {
        "key": record.key,
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "engine_bytes": len(plan),
        "build_s": build_s,
        "fused_attentions": fused_attentions,
    }
    _write(path, plan)
    _write(path.with_suffix(".json"), (json.dumps({**asdict(record), **facts}, indent=1) + "\n").encode())
    return path


def read_record(path: Path) -> EngineRecord:
    """The record of the engine file `path`. Raises EngineMismatch when it is missing, damaged or not ours."""
    sidecar = path.with_suffix(".json")
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        record = _record(values)
        if record.key != values["key"]:
            raise ValueError("it was changed by hand: its key does not fit")
        lacking = [name for name in FACTS if name not in values]
        if lacking:
            raise ValueError(f"it does not say {lacking[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineMismatch(f"{sidecar} is no record of an engine ({error}). {rebuild('DIR')}") from error
    return record


def read_facts(path: Path) -> dict[str, Any]:
    """How the engine of a valid record came out: build_s, fused_attentions, engine_bytes."""
    values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return {name: values[name] for name in FACTS}


def read_engine(path: Path) -> bytes:
    """The bytes of an engine. Raises EngineMismatch unless they are those that its record was written for."""
    sidecar, flavour = path.with_suffix(".json"), TENSORRT
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        wanted, flavour = values["engine_sha256"], values["flavour"]
        plan = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineMismatch(f"{path} cannot be read ({error}). {rebuild('DIR', flavour)}") from error
    if hashlib.sha256(plan).hexdigest() != wanted:
        again = rebuild("DIR", flavour)
        raise EngineMismatch(f"{path} is damaged: it is not the file that {sidecar.name} describes. {again}")
    return plan


def usable_engines(folder: Path, manifest: Manifest, here: Platform) -> dict[str, dict[int, Path]]:
    """Stage -> rows of its object axis (0: it has none) -> engine, for all that run on this machine.

    Raises:
        EngineMismatch: for a stage there is none; the message names what is different about the nearest one.
    """
    usable: dict[str, dict[int, Path]] = {stage: {} for stage in manifest.stages}
    nearest: dict[str, tuple[int, str]] = {}
    for path in stored_engines(folder):
        stage = path.stem.partition("-")[0]
        if stage not in usable:
            continue
        try:
            found = read_record(path)
            wrong = differences(found, record_of(manifest, found.stage, found.objects or 1, here, attention=""))
        except (EngineMismatch, KeyError) as error:
            nearest.setdefault(stage, (99, str(error).removesuffix(f". {rebuild('DIR')}")))
            continue
        if not wrong:
            usable[found.stage].setdefault(found.objects, path)
        elif len(wrong) < nearest.get(stage, (100, ""))[0]:
            nearest[stage] = (len(wrong), f"{path} was built for {wrong[0][1]}, this is {wrong[0][2]}")
    for stage, engines in usable.items():
        if not engines:
            none = f"there is none in {' or '.join(str(root) for root in engine_roots(folder))}"
            why, again = nearest.get(stage, (0, none))[1], rebuild(folder, here.flavour)
            raise EngineMismatch(f"no engine runs {stage} here: {why}. {again}")
    return usable


def differences(found: EngineRecord, wanted: EngineRecord) -> list[tuple[str, str, str]]:
    """Field, what was found, what is wanted: for each thing that keeps an engine from running, in words."""
    pairs = [
        ("model", found.model, wanted.model),
        ("weights_sha256", f"weights {found.weights_sha256[:12]}", f"weights {wanted.weights_sha256[:12]}"),
        ("onnx_sha256", f"export {found.onnx_sha256[:12]}", f"export {wanted.onnx_sha256[:12]}"),
        ("precision", found.precision, wanted.precision),
        ("inputs", f"inputs {_shapes(found.inputs)}", f"inputs {_shapes(wanted.inputs)}"),
        ("outputs", f"outputs {_shapes(found.outputs)}", f"outputs {_shapes(wanted.outputs)}"),
        ("version", f"{found.flavour} {found.version}", f"{wanted.flavour} {wanted.version}"),
    ]
    here = f"{wanted.gpu} ({', '.join(wanted.targets)})"
    if found.flavour == TENSORRT_RTX:  # not tied to one GPU, but to what it was compiled for
        built_for = " and ".join(found.targets)
        pairs.append(("targets", built_for, built_for if set(wanted.targets) <= set(found.targets) else here))
    else:
        pairs.append(("gpu", f"{found.gpu} ({', '.join(found.targets)})", here))
    return [pair for pair in pairs if pair[1] != pair[2]]


def stored_engines(folder: Path) -> Iterator[Path]:
    """Every engine file of an export folder, whatever it was built for; the folder's own first."""
    for root in engine_roots(folder):
        yield from sorted(root.glob("*/*.engine"))


def rebuild(folder: Path | str, flavour: str = TENSORRT) -> str:
    """The remedy, for this flavour of TensorRT."""
    return f"Build it: virst build {folder}{' --rtx' if flavour == TENSORRT_RTX else ''}"


def _shapes(tensors: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))


def _record(values: Mapping[str, Any]) -> EngineRecord:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']!r}, this version reads {FORMAT!r}")
    known = {f.name: values[f.name] for f in fields(EngineRecord)}
    for side in ("inputs", "outputs"):
        known[side] = {name: TensorSpec(t["dtype"], tuple(t["shape"])) for name, t in values[side].items()}
    return EngineRecord(**{**known, "targets": tuple(values["targets"])})


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
