# SPDX-License-Identifier: Apache-2.0
"""Load SAM 2.1's published weights, in either of the two forms that their Hugging Face repositories hold:

- `sam2.1_hiera_*.pt` of Meta: {"model": weights of SAM2Base}, written by torch.save;
- `model.safetensors` of transformers: the same numbers under the names of Sam2VideoModel (engine/model/sam2_names.py).

Nothing here executes what a file contains. Tensors stay in the mapped file and are read when they are used: nobody may
write into the file while the model is alive (putting another file in its place is fine).
"""

import hashlib
import logging
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from virst_engine.errors import CheckpointError, WeightsError
from virst_engine.model.config import SAM2_1_SIZES, sam2_1
from virst_engine.model.sam2 import Sam2
from virst_engine.model.sam2_names import POSITION_MATRICES, from_transformers, to_transformers

log = logging.getLogger(__name__)

NAMED_AT_MOST = 20  # tensors of one kind in a message; the log has all of them
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def load_sam2(size: str, path: str | Path, image_size: int = 1024, sha256: str = "", device: str = "cpu") -> Sam2:
    """SAM 2.1 of one of `SAM2_1_SIZES` with published weights, in evaluation mode, float32.

    `path`: an official `.pt`, a `model.safetensors` of transformers, or a folder with one of them (`checkpoint_file`).
    What is in a file is seen from its bytes, whatever its name.
    `sha256`: what that file must hash to, 64 hexadecimal digits; empty = anything.
    Raises CheckpointError naming file, cause and remedy, WeightsError for a device that is not there, and ValueError
    for a size or an image size that cannot be.
    """
    config = sam2_1(size, image_size)
    file = checkpoint_file(size, path)
    with parameters_without_numbers():
        model = Sam2(config)
    try:
        if sha256:
            _check_sha256(file, sha256)
        state = sam2_state(read_tensors(file), model.state_dict(), size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_remedy(size)}") from error
    except Flaw as flaw:
        raise CheckpointError(f"{file} {flaw}; {_remedy(size)}") from flaw
    model.load_state_dict(state, strict=True, assign=True)
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"the model cannot run on device {device!r}: {error}; set model.device") from error


def checkpoint_file(size: str, path: str | Path) -> Path:
    """The file that `path` means. Raises CheckpointError when there is none.

    In a folder the official `.pt` comes first: it is what Meta published, and its names need no translation. Without
    it, `model.safetensors` is taken.
    """
    if not str(path):
        raise CheckpointError(f"the weights of SAM 2.1 {size} do not come with this package; {_remedy(size)}")
    path = Path(path).expanduser()
    wanted = (official_name(size), "model.safetensors")
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            raise CheckpointError(f"the weights of SAM 2.1 {size} are missing: no file {path}; {_remedy(size)}")
        for name in wanted:
            if (path / name).is_file():
                return path / name
        held = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_remedy(size)}") from error
    names = ", ".join(held[:NAMED_AT_MOST]) or "nothing"
    hint = f"give one of the folders in {path / 'snapshots'}, or " if "snapshots" in held else ""
    raise CheckpointError(f"{path} holds neither {wanted[0]} nor {wanted[1]}, but {names}; {hint}{_remedy(size)}")


def official_name(size: str) -> str:
    """Meta's file name, for example sam2.1_hiera_base_plus.pt."""
    return f"sam2.1_hiera_{size.replace('-', '_')}.pt"


def _remedy(size: str) -> str:
    return (
        f"get the official file with `hf download facebook/sam2.1-hiera-{size} {official_name(size)} --local-dir .` "
        "and give its path with the parameter model.weights"
    )


class Flaw(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path; who catches it adds the remedy."""


def _check_sha256(file: Path, wanted: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise Flaw(f"has the SHA-256 {found}; {wanted!r} is none, it needs 64 hexadecimal digits")
    if found != wanted.lower():
        raise Flaw(f"is not the file that was asked for: its SHA-256 is {found}, wanted {wanted.lower()}")


def read_tensors(file: Path, under: str = "model", kind: str = "SAM 2") -> Mapping[str, Tensor]:
    """All tensors of a file, mapped; in a file of torch.save they are `under` this key. Raises Flaw and OSError."""
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(file, under, kind)
    if start[8:9] == b"{":
        return _read_safetensors(file)
    if not start:
        raise Flaw("is empty")
    if start.startswith(b"version https://git-lfs"):
        raise Flaw("is a Git LFS pointer instead of the weights (`git lfs pull` brings them)")
    if start.startswith(b"\x80"):
        raise Flaw("is a bare pickle, which may hold code and is not opened")
    raise Flaw("is no checkpoint, neither of torch.save nor safetensors")


def _read_torch(file: Path, under: str, kind: str) -> Mapping[str, Tensor]:
    if not zipfile.is_zipfile(file):  # the table of contents is at the end
        raise Flaw(f"is truncated: it ends after {file.stat().st_size} bytes without its table of contents")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch and its unpickler say many things to a file that was tampered with
        if code := re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error)):
            raise Flaw(f"holds code ({code[1]}), which was not executed") from error
        raise Flaw(f"is damaged ({type(error).__name__} of torch.load)") from error
    weights = content.get(under) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise Flaw(f'is no checkpoint of {kind}: it has no weights under "{under}"')
    other = [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if other:
        raise Flaw(f"holds other things than weights, for example {other[0]!r}")
    return weights


def _read_safetensors(file: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in list(opened.keys())}
    except Exception as error:  # SafetensorError, and whatever torch says to a type that it does not have
        raise Flaw(f"is truncated or damaged ({error})") from error


@dataclass(frozen=True)
class _Naming:
    """How to tell what is in a file by the names of its tensors."""

    decoder: str
    trunk: str
    new_in_2_1: tuple[str, ...]


SAM2_NAMING = _Naming(
    decoder="sam_mask_decoder.",
    trunk="image_encoder.trunk",
    new_in_2_1=("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"),
)
TRANSFORMERS_NAMING = _Naming(
    decoder="mask_decoder.",
    trunk="vision_encoder.backbone",
    new_in_2_1=(
        "occlusion_spatial_embedding_parameter",
        "temporal_positional_encoding_projection_layer.weight",
        "temporal_positional_encoding_projection_layer.bias",
    ),
)


def sam2_state(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], size: str) -> dict[str, Tensor]:
    """The file's tensors under sam2's names, as float32. Every one has to be one of `expected`; otherwise Flaw."""
    if any(name.startswith(SAM2_NAMING.decoder) for name in tensors):
        _check_model(tensors, SAM2_NAMING, size)
        check_names_and_shapes(tensors, expected)
    elif any(name.startswith(TRANSFORMERS_NAMING.decoder) for name in tensors):
        _check_model(tensors, TRANSFORMERS_NAMING, size)
        tensors = _with_both_position_matrices(tensors)
        check_names_and_shapes(tensors, to_transformers(expected))
        tensors = from_transformers(tensors, expected)
    else:
        raise Flaw(f"holds another model than SAM 2: {', '.join(sorted(tensors)[:3]) or 'no tensors'}")
    check_values(tensors)
    return {name: value.float() for name, value in tensors.items()}


def _check_model(tensors: Mapping[str, Tensor], naming: _Naming, size: str) -> None:
    """Name the likely confusions; `check_names_and_shapes` finds the others."""
    if not any(name.startswith("memory_attention.") for name in tensors):
        raise Flaw("has no memory attention: it holds a model for single images")
    if not any(name in tensors for name in naming.new_in_2_1):
        raise Flaw(f"holds SAM 2, not SAM 2.1: it lacks {', '.join(naming.new_in_2_1)}")
    found = _size_of(tensors, naming.trunk)
    if found and found != size:
        raise Flaw(f"holds SAM 2.1 {found}, not {size} (set model.name to sam2.1-{found} to use it)")


def _size_of(tensors: Mapping[str, Tensor], trunk: str) -> str:
    """The size whose trunk has this many blocks of this width; empty if there is none."""
    position = tensors.get(f"{trunk}.pos_embed")
    width = position.shape[1] if position is not None and position.ndim == 4 else 0
    blocks = {match[1] for name in tensors if (match := re.match(rf"{re.escape(trunk)}\.blocks\.(\d+)\.", name))}
    for size in SAM2_1_SIZES:
        config = sam2_1(size)
        if (width, len(blocks)) == (config.embed_dim, sum(config.stages)):
            return size
    return ""


def _with_both_position_matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """They are one matrix in sam2; transformers stores it twice, or once while they are tied."""
    found = [tensors[name] for name in POSITION_MATRICES if name in tensors]
    if len(found) == 2 and not torch.equal(found[0], found[1]):
        raise Flaw(f"holds two different matrices {' and '.join(POSITION_MATRICES)}, where SAM 2 has one")
    return {**dict.fromkeys(POSITION_MATRICES, found[0]), **tensors} if found else dict(tensors)


def check_names_and_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise Flaw unless both have the same names and shapes; nothing is read."""
    wrong = {
        "lacks": expected.keys() - tensors.keys(),
        "has unknown": tensors.keys() - expected.keys(),
        "has wrong shapes for": {
            f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
            for name, value in tensors.items()
            if name in expected and value.shape != expected[name].shape
        },
    }
    flaws = [listed(kind, names) for kind, names in wrong.items() if names]
    if flaws:
        raise Flaw("; ".join(flaws))


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise Flaw unless all are finite floating-point numbers; reads everything."""
    other = {
        f"{name} {value.dtype}"
        for name, value in tensors.items()
        if value.dtype not in FLOATS or value.layout != torch.strided
    }
    if other:
        raise Flaw(f"{listed('has the wrong type for', other)}; float32, float16 or bfloat16 is needed")
    broken = {name for name, value in tensors.items() if not bool(torch.isfinite(value).all())}
    if broken:
        raise Flaw(f"is damaged: it {listed('has numbers that are not finite in', broken)}")


def listed(kind: str, names: set[str]) -> str:
    """`kind`, how many there are and the first of them; all of them in the log."""
    first = sorted(names)
    if len(first) > NAMED_AT_MOST:
        log.error("a checkpoint %s %d tensors: %s", kind, len(first), ", ".join(first))
    more = f" and {len(first) - NAMED_AT_MOST} more, see the log" if len(first) > NAMED_AT_MOST else ""
    return f"{kind} {len(first)} tensors: {', '.join(first[:NAMED_AT_MOST])}{more}"


@contextmanager
def parameters_without_numbers() -> Iterator[None]:
    """Modules that this thread builds get their parameters on the meta device: those of a file take their place.

    Buffers become what they always are, unlike under `torch.device("meta")`: tables of the input size are computed, not
    loaded.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:  # the hook is called for every thread's modules
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        handle.remove()
