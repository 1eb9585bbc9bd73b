# SPDX-License-Identifier: Apache-2.0
"""`virst-7b` with every part at widths that run in milliseconds, its tokenizer, and its published files in small."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.engine.model.small_models import SMALL_SAM2, liven
from virst_engine.model.config import FusionConfig, LanguageModelConfig
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import UmtConfig, Virst7bConfig

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
