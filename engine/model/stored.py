# SPDX-License-Identifier: Apache-2.0
"""Weights files of this repository: safetensors in float16, with configuration and model card in the header.

Nothing here executes what a file contains.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from virst_engine.errors import WeightsError

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def write_weights(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """All tensors of a model. Raises WeightsError for weights that are not finite, or too large for float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    broken = _not_finite(tensors)
    if broken:
        raise WeightsError(
            f"{path} is not written: {len(broken)} tensors are not finite in float16, for example {broken[0]}; "
            "go back to an earlier checkpoint of the training"
        )
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)  # a reader never sees half a file


def read_metadata(path: Path, wanted: str, remedy: str) -> dict[str, str]:
    """The header of a file of the format `wanted`. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no readable safetensors file ({error}); {remedy}") from error
    found = metadata.get("format", "none")
    if found != wanted or "config" not in metadata:
        raise WeightsError(
            f"{path} is a safetensors file, but not one that this version of `virst train` writes "
            f"(format {found}, wanted {wanted}); {remedy}"
        )
    return metadata


def read_model_card(path: Path, metadata: dict[str, str], remedy: str) -> dict[str, Any]:
    """The facts about a file's origin. Raises WeightsError."""
    try:
        return dict(json.loads(metadata["card"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has no readable model card ({error!r}); {remedy}") from error


def read_weights(
    path: Path, build: Callable[[], Model], remedy: str, *, device: str = "cpu", may_lack: tuple[str, ...] = ()
) -> Model:
    """The model of a weights file, in evaluation mode, float32.

    Args:
        build: makes the model of the file's configuration.
        may_lack: beginnings of names that are left as `build` made them where the file lacks them.

    Raises:
        WeightsError: whatever is wrong, with cause and remedy.
    """
    try:
        model = build()
    except Exception as error:  # whatever torch, sam2 or transformers say to sizes that make no sense
        raise WeightsError(f"{path} holds a configuration that we cannot build ({error!r}); {remedy}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}); {remedy}") from error
    expected = model.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if may_lack:
        new = {name for name in missing if name.startswith(may_lack)}
        if new:
            log.warning("%s is of an earlier version: %s starts from nothing", path, min(new).partition(".")[0])
        tensors |= {name: expected[name] for name in new}
        missing = missing - new
    shapes = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    for kind, names in (("lacks", missing), ("has unknown", unexpected), ("has wrong shapes for", shapes)):
        if names:
            raise WeightsError(f"{path} {kind} {len(names)} tensors, for example {min(names)}; {remedy}")
    broken = _not_finite(tensors)
    if broken:
        raise WeightsError(
            f"{path} is damaged: {len(broken)} tensors are not finite, for example {broken[0]}; {remedy}"
        )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in tensors.items()})
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(f"the model cannot run on device {device!r}: {error}; set model.device") from error


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
