# SPDX-License-Identifier: Apache-2.0
"""Weights of `virst-7b` on disk: a folder of safetensors files (shards), a manifest.json, and the tokenizer's files.

Both writing and loading go tensor by tensor: a shard is the most that is held besides the model itself. Nothing that a
folder contains is executed.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from virst_engine.errors import WeightsError
from virst_engine.model.checkpoint import FLOATS, listed, parameters_without_numbers
from virst_engine.model.quantised import is_quantised, put_weight, quantise_layers, quantised_bytes
from virst_engine.model.sam2 import Sam2
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig

FORMAT = "virst-folder-1"
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 30
REMEDY = "convert the published files again with `virst weights convert`"
SEGMENTER = "seg_model."
WORDS_HEAD = "lm_head.weight"  # writes answers in words; a folder may be without
BFLOAT16_SINCE = (8, 0)  # compute capability; older GPUs emulate it


@dataclass(frozen=True)
class StoredTensor:
    shard: str
    dtype: str  # torch's name, without "torch."
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. `facts`: where it comes from, for people and reports."""

    config: Virst7bConfig
    tensors: dict[str, StoredTensor]
    shards: dict[str, dict[str, Any]]  # file -> bytes, sha256
    facts: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Of the configuration and the checksums of the shards: what tells these weights from others, read or not."""
        shards = {name: shard["sha256"] for name, shard in self.shards.items()}
        content = json.dumps([json.loads(self.config.to_json()), shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def has_words(self) -> bool:
        return WORDS_HEAD in self.tensors

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards.values())


def find_folder(path: str) -> Path:
    """The weights folder that `path` means, as a user wrote it. Raises WeightsError when it is none."""
    how = (
        "`virst weights convert VIRST.pt --base VideoChat-Flash-Qwen2-7B_res448 --out FOLDER` makes one of the "
        "published files (README, VIRST at full size); give it with the parameter model.weights"
    )
    if not path:
        raise WeightsError(f"the weights of virst-7b do not come with this package; {how}")
    folder = Path(path).expanduser()
    if not folder.exists():
        raise WeightsError(f"the weights of virst-7b are missing: no folder {folder}; {how}")
    if not (folder / MANIFEST).is_file():
        what = "a file" if folder.is_file() else f"a folder without {MANIFEST}"
        raise WeightsError(f"{folder} is {what}, not a weights folder of virst-7b; {how}")
    return folder


def write_folder(
    out: Path,
    config: Virst7bConfig,
    tensors: Iterable[tuple[str, Tensor]],
    facts: dict[str, Any],
    copied: Iterable[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda _bytes: None,
) -> Manifest:
    """Write `tensors` as they come, and copies of the files `copied`; `out` appears when everything is there.

    `written` is told the bytes of every shard. Raises WeightsError where `out` already holds something, or cannot be
    written; then nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} already holds something and is not overwritten; give another folder with --out")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stored: dict[str, StoredTensor] = {}
        shards: dict[str, dict[str, Any]] = {}
        for number, shard in enumerate(_shards(tensors, shard_bytes), start=1):
            name = f"model-{number:05d}.safetensors"
            for tensor, value in shard.items():
                stored[tensor] = StoredTensor(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            save_file(shard, partial / name)
            size = (partial / name).stat().st_size
            shards[name] = {"bytes": size, "sha256": _sha256(partial / name)}
            written(size)
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        manifest = Manifest(config, stored, shards, facts)
        content = {
            "format": FORMAT,
            "config": json.loads(config.to_json()),
            "facts": facts,
            "shards": shards,
            "tensors": {name: vars(tensor) for name, tensor in stored.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise WeightsError(f"{out} cannot be written ({error}); make room or give another folder with --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises WeightsError for a folder without one, or with one that this version did not write."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, wanted {FORMAT!r}")
        tensors = {
            name: StoredTensor(raw["shard"], raw["dtype"], tuple(raw["shape"]))
            for name, raw in content["tensors"].items()
        }
        shards = {
            name: {"bytes": int(raw["bytes"]), "sha256": str(raw["sha256"])} for name, raw in content["shards"].items()
        }
        config = Virst7bConfig.from_json(json.dumps(content["config"]))
        return Manifest(config, tensors, shards, content["facts"])
    except OSError as error:
        raise WeightsError(f"the weights of virst-7b are missing: no file {file} ({error}); {REMEDY}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file} is no manifest that this version can read ({error!r}); {REMEDY}") from error


def load_reasoner_model(
    folder: Path, device: str = "cpu", budget_gib: float = 0.0, windows: int = 1, weight_bits: int = 16
) -> Virst7b:
    """Everything of the folder that turns a clip and a sentence into prompts, on `device`, in evaluation mode.

    `seg_model` stays without numbers, and so does `lm_head` where the folder has none.
    `budget_gib`: memory that this process may take on the device; it will get no more on a GPU. 0 = what a GPU has
    free. `windows`: of frames, of which the reasoner keeps what it made. `weight_bits`: 16 = all weights as they are
    stored, 8 or 4 = those of the language model's layers quantised one by one (engine/model/quantised.py).
    Raises WeightsError for a folder that is damaged or of another model, for too little memory, for a GPU that does
    not compute in the folder's precision, and for 8 or 4 bits without bitsandbytes.
    """
    manifest = read_manifest(folder)
    model = Virst7b.without_numbers(manifest.config)
    quantised = quantise_layers(model, weight_bits)
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(SEGMENTER)}
    if not manifest.has_words:
        del wanted[WORDS_HEAD]
    if _is_gpu(device):
        _check_gpu(manifest, wanted, device)
    _check_memory(manifest, device, budget_gib, windows, weight_bits)
    _fill(model, folder, manifest, wanted, device, quantised)
    for module in (model.language_model.rotary_emb, model.vision_tower):
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(device))
    return model


def load_segmenter_model(folder: Path, device: str = "cpu") -> Sam2:
    """SAM 2 alone out of the folder, in evaluation mode. Raises WeightsError as `load_reasoner_model` does."""
    manifest = read_manifest(folder)
    holder = nn.Module()
    with parameters_without_numbers():
        model = Sam2(manifest.config.sam2)
    holder.add_module(SEGMENTER[:-1], model)
    _fill(holder, folder, manifest, holder.state_dict(), device, {})
    return model.eval().to(device)


def weights_bytes(manifest: Manifest, segmenter: bool = False, weight_bits: int = 16) -> int:
    """Of the reasoner's weights on their device, or of the segmenter's."""
    return sum(
        quantised_bytes(tensor.shape, weight_bits) if weight_bits != 16 and is_quantised(name) else tensor.bytes
        for name, tensor in manifest.tensors.items()
        if name.startswith(SEGMENTER) is segmenter
    )


def working_bytes(config: Virst7bConfig, windows: int = 1, weight_bits: int = 16) -> int:
    """About what answers take besides the weights: the widest activations of a part, and what is kept."""
    vision, language, sam2, fusion = config.vision, config.language, config.sam2, config.fusion
    clip = vision.clip_frames * vision.grid**2 * (vision.feedforward + 8 * vision.channels) * 2
    sequence = vision.max_frames * vision.tokens_per_frame + 512
    words = sequence * (3 * language.feedforward + 8 * language.hidden) * 2
    maps = config.seg_frames * sam2.grid**2 * sam2.channels * 4 * 3
    tokens = (sam2.grid // math.prod(fusion.tokenizer_strides)) ** 2
    window = vision.max_frames * vision.tokens_per_frame * language.hidden * 2
    window += config.seg_frames * tokens * (language.hidden + sam2.channels) * 4
    # A quantised layer is in 16 bits while it is loaded, and while many tokens at once pass through one of 4 bits.
    unpacked = language.feedforward * language.hidden * 2 if weight_bits != 16 else 0
    return max(clip, words, maps) + windows * window + unpacked


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda") and torch.cuda.is_available()


def _check_gpu(manifest: Manifest, wanted: dict[str, Tensor], device: str) -> None:
    try:
        capability = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise WeightsError(f"the model cannot be put on device {device!r} ({error}); set model.device") from error
    dtypes = {manifest.tensors[name].dtype for name in wanted if name in manifest.tensors}
    if "bfloat16" in dtypes and capability < BFLOAT16_SINCE:
        raise WeightsError(
            f"{device} does not compute in bfloat16 (compute capability {capability[0]}.{capability[1]}, 8.0 is "
            "needed); convert the weights with --dtype float16, or use a newer GPU"
        )


def _check_memory(manifest: Manifest, device: str, budget_gib: float, windows: int, weight_bits: int) -> None:
    weights = weights_bytes(manifest, weight_bits=weight_bits)
    needed = (weights + working_bytes(manifest.config, windows, weight_bits)) / 2**30
    there, has = budget_gib or math.inf, f"the budget is {budget_gib:.2f} GiB"
    if _is_gpu(device):
        free, all_of_it = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        if budget_gib:  # whatever else is on this GPU keeps its share
            torch.cuda.set_per_process_memory_fraction(min(budget_gib / all_of_it, 1.0), device)
        if not budget_gib or free < budget_gib:
            there, has = free, f"{device} has {free:.2f} GiB free"
    if needed > there:
        fewer = {16: "load fewer bits of each weight (--weight-bits 8 or 4), ", 8: "use --weight-bits 4, "}
        raise WeightsError(
            f"virst-7b needs {needed:.2f} GiB of device memory ({weights / 2**30:.2f} of them for weights), {has}; "
            f"allow more (--memory-budget-gib), {fewer.get(weight_bits, '')}end what else is on that GPU, use a larger "
            "one, or convert the weights with --dtype bfloat16"
        )


def _fill(
    model: nn.Module,
    folder: Path,
    manifest: Manifest,
    wanted: dict[str, Tensor],
    device: str,
    quantised: dict[str, nn.Linear],
) -> None:
    """Put the folder's tensors `wanted` into the model, shard by shard; the weights of `quantised` one by one."""
    _check_tensors(folder, manifest, wanted)
    for shard in sorted({manifest.tensors[name].shard for name in wanted}):
        file = folder / shard
        names = {name for name in wanted if manifest.tensors[name].shard == shard}
        _check_shard(file, manifest)
        try:
            state: dict[str, Tensor] = {}
            for where, of_them in ((device, names - quantised.keys()), ("cpu", names & quantised.keys())):
                with safe_open(file, framework="pt", device=where) as opened:
                    state |= {name: opened.get_tensor(name) for name in of_them}
            _check_content(file, manifest, state)
            for name in names & quantised.keys():
                put_weight(quantised[name], state.pop(name), device)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged ({error}); {REMEDY}") from error
        except (RuntimeError, AssertionError) as error:  # of torch
            raise WeightsError(f"the model cannot be put on device {device!r} ({error}); set model.device") from error
        model.load_state_dict(state, strict=False, assign=True)


def _check_content(file: Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        stored = manifest.tensors[name]
        if (str(value.dtype), tuple(value.shape)) != (f"torch.{stored.dtype}", stored.shape):
            raise WeightsError(
                f"{file} is not the file that the manifest describes: {name} is {value.dtype} "
                f"{list(value.shape)}, wanted {stored.dtype} {list(stored.shape)}; {REMEDY}"
            )


def _check_tensors(folder: Path, manifest: Manifest, wanted: dict[str, Tensor]) -> None:
    stored, floats = manifest.tensors, {str(dtype).removeprefix("torch.") for dtype in FLOATS}
    wrong = {
        "lacks": wanted.keys() - stored.keys(),
        "has wrong shapes for": {
            f"{name} {list(stored[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items()
            if name in stored and stored[name].shape != tuple(value.shape)
        },
        "has the wrong type for": {
            f"{name} {stored[name].dtype}" for name in wanted if name in stored and stored[name].dtype not in floats
        },
    }
    flaws = [listed(kind, names) for kind, names in wrong.items() if names]
    if flaws:
        raise WeightsError(f"{folder} {'; '.join(flaws)}; {REMEDY}")


def _check_shard(file: Path, manifest: Manifest) -> None:
    wanted = manifest.shards.get(file.name, {}).get("bytes")
    if not file.is_file():
        raise WeightsError(f"a shard is missing: no file {file}; copy the whole folder, or {REMEDY}")
    found = file.stat().st_size
    if found != wanted:
        raise WeightsError(
            f"{file} is truncated or another file: it has {found} bytes, wanted {wanted}; copy it again, or {REMEDY}"
        )


def verify_folder(folder: Path) -> None:
    """Read every shard and compare its SHA-256. Raises WeightsError for the first that differs."""
    manifest = read_manifest(folder)
    for name, shard in manifest.shards.items():
        _check_shard(folder / name, manifest)
        found = _sha256(folder / name)
        if found != shard["sha256"]:
            raise WeightsError(
                f"{folder / name} is damaged: its SHA-256 is {found}, wanted {shard['sha256']}; {REMEDY}"
            )


def _shards(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Groups of at most `most` bytes; a larger tensor is a group of its own. A group is dropped before the next."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = value.clone(memory_format=torch.contiguous_format)  # sources may share memory, files may not
        size += value.nbytes
    if shard:
        yield shard


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
