# SPDX-License-Identifier: Apache-2.0
"""From the published files of VIRST and of the models that it is built on, to one weights folder of `virst-7b`.

- VIRST's checkpoint: one file of torch.save, {"model_state_dict": weights}. Names begin with `base_model.model.`, LoRA
  adapters are beside the weights that they adapt (lora.py); here they are merged.
- The video language model: OpenGVLab/VideoChat-Flash-Qwen2-7B_res448, safetensors shards with an index.
- The segmenter: sam2.1_hiera_large, in either of its two forms (checkpoint.py).

What VIRST's checkpoint does not have is taken from the other two; without it, the folder holds the base models and
ST-Fusion as it is before training. Facts about the format are from reading about it, not from the files themselves:
every name is accounted for, so that a difference is told, not passed over. Nothing here executes what a file contains.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from virst_engine.errors import CheckpointError
from virst_engine.model.chat_tokenizer import TOKENIZER_FILES
from virst_engine.model.checkpoint import (
    FLOATS,
    Flaw,
    checkpoint_file,
    listed,
    read_tensors,
    sam2_state,
)
from virst_engine.model.lora import ADAPTED, RANK, SCALE, adapter_of, merge_adapter, plain_name
from virst_engine.model.st_fusion import InitialStFusion, SecondStFusion
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import BASE_VOCABULARY, Virst7bConfig
from virst_engine.model.weights_folder import SEGMENTER, SHARD_BYTES, WORDS_HEAD, Manifest, write_folder

PREFIX = "base_model.model."
WRAPPER = "module."  # of DeepSpeed, around everything
INDEX = "model.safetensors.index.json"
ST_EMBEDDING = "st_embedding"
EMBEDDINGS = ("language_model.embed_tokens.weight", WORDS_HEAD)
# Ours -> published, behind PREFIX; all other parts are called `model.` and our name.
_RENAMED = (
    ("language_model.", "model."),
    ("vision_tower.", "model.vision_tower.vision_tower.encoder."),
    ("lm_head.", "lm_head."),
)
BASE_PARTS = ("language_model.", "vision_tower.", "lm_head.", "mm_projector.")
UNTRAINED_PARTS = ("initial_seg_fusion_module.", "seg_prompter.", "occ_predictor.")  # new in VIRST
BASE_REMEDY = (
    "get the base model with `hf download OpenGVLab/VideoChat-Flash-Qwen2-7B_res448 --local-dir DIR` and give DIR with "
    "--base"
)
PUBLISHED_REMEDY = "download VIRST's checkpoint again from the link in the README of github.com/AIDASLab/VIRST"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def published_name(name: str) -> str:
    """The name of our tensor in VIRST's checkpoint behind PREFIX, and in the base model's files."""
    for ours, theirs in _RENAMED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return f"model.{name}"


def expected_state(config: Virst7bConfig) -> dict[str, Tensor]:
    """Our names and shapes, on the meta device."""
    with torch.device("meta"):
        return Virst7b(config).state_dict()


def published_shapes(config: Virst7bConfig, rank: int = RANK) -> dict[str, torch.Size]:
    """Every name that VIRST's checkpoint is expected to have, adapters included, and its shape."""
    shapes = {}
    for name, value in expected_state(config).items():
        if name == ST_EMBEDDING:  # the last row of the embeddings
            continue
        shapes[PREFIX + published_name(name)] = value.shape
        layer = PREFIX + published_name(name).removesuffix(".weight")
        if _is_adapted(name):
            shapes[f"{layer}.lora_A.default.weight"] = torch.Size((rank, value.shape[1]))
            shapes[f"{layer}.lora_B.default.weight"] = torch.Size((value.shape[0], rank))
    return shapes


def base_shapes(config: Virst7bConfig, vocabulary: int = BASE_VOCABULARY) -> dict[str, torch.Size]:
    """Every name of the base model's files and its shape."""
    return {
        published_name(name): torch.Size((vocabulary, value.shape[1])) if name in EMBEDDINGS else value.shape
        for name, value in expected_state(config).items()
        if name.startswith(BASE_PARTS)
    }


def _is_adapted(name: str) -> bool:
    return name.startswith("language_model.layers.") and name.endswith(tuple(f"{layer}.weight" for layer in ADAPTED))


@dataclass(frozen=True)
class Sources:
    """The files to convert. `published` None: the base models alone, ST-Fusion untrained."""

    base: Path  # folder of the base model; with a complete checkpoint of VIRST, its tokenizer files are enough
    published: Path | None = None
    sam2: Path | None = None  # file or folder of sam2.1_hiera_large; needed where VIRST's checkpoint lacks it


@dataclass
class _Published:
    """VIRST's checkpoint, mapped: weights and adapters under our names' published form."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # weight -> A, B


def convert(
    sources: Sources,
    out: Path,
    config: Virst7bConfig,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda _bytes: None,
) -> Manifest:
    """Write the weights folder `out` of the sources; the video language model in `dtype`, the rest in float32.

    Raises CheckpointError naming the file, the cause and the remedy, WeightsError where `out` cannot be written, and
    ValueError for a dtype that is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    expected = expected_state(config)
    published = _read_published(sources.published, config) if sources.published else _Published()
    lacking = [name for name in expected if name != ST_EMBEDDING and published_name(name) not in published.weights]
    base = _read_base(sources.base, expected) if any(name.startswith(BASE_PARTS) for name in lacking) else {}
    segmenter = _read_segmenter(sources, expected) if any(name.startswith(SEGMENTER) for name in lacking) else {}
    fresh = _untrained(config, lacking, sources.published)
    tokenizer = [sources.base / name for name in TOKENIZER_FILES if (sources.base / name).is_file()]
    if not tokenizer:
        raise CheckpointError(f"{sources.base} has no tokenizer ({', '.join(TOKENIZER_FILES)}); {BASE_REMEDY}")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, wanted in expected.items():
            is_tied = name == WORDS_HEAD and name not in published.weights and name not in base
            source = EMBEDDINGS[0] if name == ST_EMBEDDING or is_tied else name
            theirs = published_name(source)
            file: Path | None = sources.published
            if theirs in published.weights:
                value = published.weights[theirs]
            elif source.startswith(SEGMENTER):
                value, file = segmenter[source], sources.sam2
            elif source in fresh:
                value, file = fresh[source], None
            else:
                value, file = base[theirs], sources.base
            if source in EMBEDDINGS:
                value = value[: config.language.vocabulary]  # the rest are rows of no token
            if theirs in published.adapters:
                value = merge_adapter(value, published.adapters[theirs]["A"], published.adapters[theirs]["B"], SCALE)
            if name == ST_EMBEDDING:  # the row of [SEG]; the released code has it for all [ST] tokens
                value = value[-1:].expand(wanted.shape[0], -1)
            value = value.to(DTYPES[dtype] if name.startswith(BASE_PARTS) else torch.float32)
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{file} has numbers that are not finite in {theirs}, as {dtype}; {PUBLISHED_REMEDY}"
                )
            yield name, value

    facts: dict[str, Any] = {
        "published": sources.published.name if sources.published else "",
        "merged adapters": len(published.adapters),
        "of the base models": sum(name.startswith((*BASE_PARTS, SEGMENTER)) for name in lacking),
        "untrained": sorted({name.split(".")[0] for name in fresh}),
    }
    return write_folder(out, config, tensors(), facts, tokenizer, shard_bytes, written)


def _read_published(file: Path, config: Virst7bConfig) -> _Published:
    """Mapped and checked; raises CheckpointError."""
    try:
        found = _sort_published(read_tensors(file, "model_state_dict", "VIRST"))
        _check_published(found, config)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {PUBLISHED_REMEDY}") from error
    except Flaw as flaw:
        raise CheckpointError(f"{file} {flaw}; {PUBLISHED_REMEDY}") from flaw
    return found


def _sort_published(tensors: Mapping[str, Tensor]) -> _Published:
    found = _Published()
    foreign = set()
    for name, value in tensors.items():
        own = plain_name(name.removeprefix(WRAPPER))
        if not own.startswith(PREFIX):
            foreign.add(name)
            continue
        own = own.removeprefix(PREFIX)
        adapter = adapter_of(own)
        if adapter is None:
            found.weights[own] = value
        else:
            found.adapters.setdefault(adapter[0], {})[adapter[1]] = value
    if foreign:
        raise Flaw(f"is no checkpoint of VIRST: it {listed(f'has names that do not begin with {PREFIX}', foreign)}")
    return found


def _check_published(found: _Published, config: Virst7bConfig) -> None:
    shapes = {name.removeprefix(PREFIX): shape for name, shape in published_shapes(config).items()}
    _check_base_model({name: value.shape for name, value in found.weights.items()}, config.language.hidden)
    tensors = dict(found.weights)
    for weight, sides in found.adapters.items():
        layer = weight.removesuffix(".weight")
        tensors |= {f"{layer}.lora_{side}.default.weight": value for side, value in sides.items()}
    adapters = {name for name in shapes if adapter_of(name)}
    _raise_flaws(
        {
            "has unknown": tensors.keys() - shapes.keys(),
            "lacks (of its adapters)": adapters - tensors.keys() if found.adapters else set(),
            "has wrong shapes for": _wrong_shapes({name: value.shape for name, value in tensors.items()}, shapes),
            "has the wrong type for": _wrong_types(tensors),
        }
    )


def _check_base_model(shapes: Mapping[str, torch.Size], hidden: int) -> None:
    """Name the likely confusions: another size of Qwen2, or a language model that sees nothing."""
    embeddings = shapes.get("model.embed_tokens.weight")
    if embeddings is not None and embeddings[-1] != hidden:
        found = embeddings[-1]
        raise Flaw(f"holds another base model: its hidden size is {found}, VideoChat-Flash-Qwen2-7B has {hidden}")
    if embeddings is not None and not any(name.startswith("model.vision_tower.") for name in shapes):
        raise Flaw("holds a language model without a video encoder, not VideoChat-Flash-Qwen2-7B_res448")


def _read_base(folder: Path, expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All tensors of the base model, mapped and checked; raises CheckpointError."""
    wanted = {published_name(name): value for name, value in expected.items() if name.startswith(BASE_PARTS)}
    hidden = wanted["model.embed_tokens.weight"].shape[1]
    tensors: dict[str, Tensor] = {}
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise Flaw(f"lacks {len(missing)} of its {len(shards)} shards, for example {missing[0]}")
        for shard in shards:
            try:
                with safe_open(folder / shard, framework="pt", device="cpu") as opened:
                    tensors |= {name: opened.get_tensor(name) for name in list(opened.keys())}
            except Exception as error:  # SafetensorError, and whatever torch says to a type that it does not have
                raise Flaw(f"has a shard that is truncated or damaged, {shard} ({error})") from error
        shapes = {name: value.shape for name, value in tensors.items()}
        _check_base_model(shapes, hidden)
        rows = {published_name(name) for name in EMBEDDINGS}
        trimmed = {
            name: torch.Size((min(shape[0], wanted[name].shape[0]), *shape[1:])) if name in rows else shape
            for name, shape in shapes.items()
            if name in wanted
        }
        tied = {WORDS_HEAD} if _is_tied(folder) else set()
        _raise_flaws(
            {
                "lacks": wanted.keys() - tensors.keys() - tied,
                "has unknown": tensors.keys() - wanted.keys(),
                "has wrong shapes for": _wrong_shapes(trimmed, {name: value.shape for name, value in wanted.items()}),
                "has the wrong type for": _wrong_types(tensors),
            }
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read ({error!r}); {BASE_REMEDY}") from error
    except Flaw as flaw:
        raise CheckpointError(f"{folder} {flaw}; {BASE_REMEDY}") from flaw
    return tensors


def _is_tied(folder: Path) -> bool:
    """Whether this base model writes words with its embeddings, and so has no `lm_head`."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("tie_word_embeddings") is True


def _read_segmenter(sources: Sources, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM 2.1's weights with our prefix; raises CheckpointError."""
    own = {name.removeprefix(SEGMENTER): value for name, value in expected.items() if name.startswith(SEGMENTER)}
    remedy = (
        "get the official file with `hf download facebook/sam2.1-hiera-large sam2.1_hiera_large.pt --local-dir .` and "
        "give it with --sam2"
    )
    if sources.sam2 is None:
        raise CheckpointError(f"the sources hold no weights of SAM 2.1 large; {remedy}")
    file = checkpoint_file("large", sources.sam2)
    try:
        state = sam2_state(read_tensors(file), own, "large")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {remedy}") from error
    except Flaw as flaw:
        raise CheckpointError(f"{file} {flaw}; {remedy}") from flaw
    return {SEGMENTER + name: value for name, value in state.items()}


def _untrained(config: Virst7bConfig, lacking: list[str], published: Path | None) -> dict[str, Tensor]:
    """Parts that only VIRST's checkpoint has, as they start; the same for everyone."""
    names = {name for name in lacking if name.startswith(UNTRAINED_PARTS)}
    if not names:
        return {}
    if published is not None:
        theirs = {PREFIX + published_name(name) for name in names}
        raise CheckpointError(f"{published} {listed('lacks', theirs)}; {PUBLISHED_REMEDY}")
    channels, hidden = config.sam2.channels, config.language.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = nn.ModuleDict(
            {
                "initial_seg_fusion_module": InitialStFusion(channels, hidden, config.fusion),
                "seg_prompter": SecondStFusion(channels, hidden, config.fusion),
                "occ_predictor": nn.Linear(channels, 1),
            }
        )
    return parts.state_dict()


def _raise_flaws(wrong: dict[str, set[str]]) -> None:
    flaws = [listed(kind, names) for kind, names in wrong.items() if names]
    if flaws:
        raise Flaw("; ".join(flaws))


def _wrong_shapes(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> set[str]:
    return {
        f"{name} {list(shape)} instead of {list(wanted[name])}"
        for name, shape in found.items()
        if name in wanted and shape != wanted[name]
    }


def _wrong_types(tensors: Mapping[str, Tensor]) -> set[str]:
    return {
        f"{name} {value.dtype}"
        for name, value in tensors.items()
        if value.dtype not in FLOATS or value.layout != torch.strided
    }
