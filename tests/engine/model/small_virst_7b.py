# SPDX-License-Identifier: Apache-2.0
"""`virst-7b` with every part at widths that run in milliseconds, its tokenizer, and its published files in small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.engine.model.small_models import SMALL_SAM2, liven
from virst_engine.model import virst_checkpoint
from virst_engine.model.config import FusionConfig, LanguageModelConfig
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import UmtConfig, Virst7bConfig, with_preset

BYTES = 256  # a tokenizer of single bytes: every text can be written, no merges
VOCABULARY = BYTES + 3 + 1  # the chat's marks and [SEG]

SMALL_7B = Virst7bConfig(
    sam2=replace(SMALL_SAM2, image_size=64),
    vision=UmtConfig(
        image_size=32, patch_size=8, channels=16, layers=2, heads=2, feedforward=24, trained_grid=2,
        tokens_per_frame=2, max_frames=16,
    ),
    language=LanguageModelConfig(
        hidden=32, layers=2, heads=4, kv_heads=2, feedforward=48, vocabulary=VOCABULARY, rope_theta=1e4,
        max_positions=1024,
    ),
    fusion=FusionConfig(
        st_tokens=3, shared_st_embedding=False, initial_heads=4, heads=2, layers=2, feedforward=48, max_frames=16,
        feature_level=-1, tokenizer_strides=(2, 1, 1),
    ),
    seg_frames=16,
)  # fmt: skip


def small_virst_7b(config: Virst7bConfig = SMALL_7B, seed: int = 0) -> Virst7b:
    """In evaluation mode; the same weights for the same seed, constants included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Virst7b(config)
    liven(model, seed)
    return model


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of single bytes in `folder`, without the chat's marks."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE(vocab=byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_vocabulary() -> dict[str, int]:
    return {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


RANK = 2  # of the adapters in small

# A stream reads as many memories as the published model has.
SMALL_STREAMING_7B = with_preset(
    replace(SMALL_7B, sam2=replace(SMALL_7B.sam2, memory_frames=7, max_pointers=16)), "released"
)


def sure_virst_7b() -> Virst7b:
    """Random, for streams; whatever it segments is there."""
    model = small_virst_7b(SMALL_STREAMING_7B, seed=2)
    with torch.no_grad():
        model.seg_model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 50.0
    return model


def write_converted(folder: Path) -> Path:
    """`sure_virst_7b` in `folder`, as `virst weights convert` writes it of published files, in many small shards."""
    model = sure_virst_7b()
    published = folder.with_name(f"{folder.name}.pt")
    published.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": published_state(model)}, published)
    base = write_base(folder.with_name(f"{folder.name}-base"), model)
    with pytest.MonkeyPatch.context() as patch:
        shapes = virst_checkpoint.published_shapes
        patch.setattr(virst_checkpoint, "published_shapes", lambda config: shapes(config, RANK))
        virst_checkpoint.convert(
            virst_checkpoint.Sources(base, published), folder, SMALL_STREAMING_7B, "float32", shard_bytes=40_000
        )
    return folder


def published_state(model: Virst7b, seed: int = 0) -> dict[str, torch.Tensor]:
    """What VIRST's training would have saved of `model` (one shared row of E_ST), before its adapters are merged.

    Merging the adapters gives the weights of `model` again, but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "st_embedding":
            continue
        value = value.clone()
        if name == "language_model.embed_tokens.weight":
            value[-1] = model.st_embedding[0]
        theirs = name if name.startswith("lm_head.") else f"model.{name}"
        theirs = theirs.replace("model.language_model.", "model.")
        theirs = theirs.replace("model.vision_tower.", "model.vision_tower.vision_tower.encoder.")
        theirs = f"base_model.model.{theirs}"
        if name.startswith("language_model.layers.") and name.endswith("_proj.weight"):
            a = torch.randn(RANK, value.shape[1], generator=generator) * 0.1
            b = torch.randn(value.shape[0], RANK, generator=generator) * 0.1
            state[theirs.replace(".weight", ".lora_A.default.weight")] = a
            state[theirs.replace(".weight", ".lora_B.default.weight")] = b
            value = value - 0.25 * b @ a
        state[theirs] = value
    return state


def base_state(model: Virst7b, rows: int = VOCABULARY + 13) -> dict[str, torch.Tensor]:
    """The base model's tensors, embeddings with rows of no token."""
    parts = ("language_model.", "vision_tower.", "mm_projector.", "lm_head.")
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(parts):
            continue
        if value.shape[0] == VOCABULARY and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = torch.cat((value, torch.zeros(rows - VOCABULARY, value.shape[1])))
        theirs = name if name.startswith("lm_head.") else f"model.{name}"
        theirs = theirs.replace("model.language_model.", "model.")
        state[theirs.replace("model.vision_tower.", "model.vision_tower.vision_tower.encoder.")] = value
    return state


def write_base(folder: Path, model: Virst7b, shards: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """The base model's folder: shards, their index, and a tokenizer."""
    state = base_state(model)
    names = sorted(state)
    write_tokenizer(folder)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: state[name].to(dtype).contiguous() for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
