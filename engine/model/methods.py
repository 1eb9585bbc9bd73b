# SPDX-License-Identifier: Apache-2.0
"""The reasoners of the methods beside VIRST: build them, start them from `tabletop-tiny`, store and load them."""

import json
from pathlib import Path

import torch

from virst_engine.errors import WeightsError
from virst_engine.model.stored import read_metadata, read_model_card, read_weights, write_weights
from virst_engine.model.tempvrs import TempVrs, TempVrsConfig
from virst_engine.model.virst import Virst
from virst_engine.model.visa import Visa, VisaConfig

FORMAT = "virst-reasoner-1"
CONFIGS: dict[str, type[VisaConfig] | type[TempVrsConfig]] = {"visa": VisaConfig, "tempvrs": TempVrsConfig}
REMEDY = "reinstall the package, train them with `virst train --method`, or give another file (reasoner.weights)"


def build_method(config: VisaConfig | TempVrsConfig) -> Visa | TempVrs:
    return Visa(config) if isinstance(config, VisaConfig) else TempVrs(config)


def start_from(reasoner: Visa | TempVrs, virst: Virst) -> None:
    """Take over what both have under one name: video encoder, projector, language model. [ST] becomes <SEG>, <TEP>."""
    own = reasoner.state_dict()
    known = {
        name: value for name, value in virst.state_dict().items() if name in own and own[name].shape == value.shape
    }
    reasoner.load_state_dict(known, strict=False)
    with torch.no_grad():
        reasoner.seg_embedding.copy_(virst.st_embedding[:1].expand_as(reasoner.seg_embedding))
        if isinstance(reasoner, TempVrs):
            reasoner.tep_embedding.copy_(virst.st_embedding[:1])


def save_method(reasoner: Visa | TempVrs, path: Path, card: dict[str, object] | None = None) -> None:
    """Write the weights of a reasoner without its segmenter, which `config.segmenter` names. Raises WeightsError."""
    method = "visa" if isinstance(reasoner, Visa) else "tempvrs"
    metadata = {"format": FORMAT, "method": method, "config": reasoner.config.to_json(), "card": json.dumps(card or {})}
    write_weights(path, reasoner, metadata)


def read_method_config(path: Path) -> VisaConfig | TempVrsConfig:
    """Raises WeightsError for a file that holds no reasoner."""
    metadata = read_metadata(path, FORMAT, REMEDY)
    method = metadata.get("method", "none")
    if method not in CONFIGS:
        raise WeightsError(f"{path} holds the method {method!r}; this version knows {', '.join(CONFIGS)}; {REMEDY}")
    try:
        return CONFIGS[method].from_json(metadata["config"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{path} holds a configuration that we cannot read ({error}); {REMEDY}") from error


def holds_method(path: Path) -> bool:
    """Whether this is a file of `save_method`."""
    try:
        read_metadata(path, FORMAT, REMEDY)
    except WeightsError:
        return False
    return True


def read_method_card(path: Path) -> dict[str, object]:
    """The facts that `save_method` stored. Raises WeightsError."""
    return read_model_card(path, read_metadata(path, FORMAT, REMEDY), REMEDY)


def load_method(path: Path, *, device: str = "cpu") -> Visa | TempVrs:
    """The reasoner of a file, in evaluation mode, float32. Raises WeightsError."""
    config = read_method_config(path)
    return read_weights(path, lambda: build_method(config), REMEDY, device=device)
